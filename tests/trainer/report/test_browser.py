"""A report in a real browser: whole without a network, readable in light and dark, on a desk and on a phone."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.services.chromium import Chromium, running_chromium
from tests.trainer.run_folder import LAYERS, conflict_record, squad_summary, write_run_folder
from trainer.report.build import write_report
from trainer.squads.export import CURVE_PICTURE, SQUAD_FILE, SQUAD_FORMAT

PHONE, DESK = 375, 1280
SHOWN = "[...document.querySelectorAll('.slide')].filter(s => s.checkVisibility()).map(s => s.dataset.name)"


@pytest.fixture(scope="module")
def page(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run that has everything a report can show."""
    folder = tmp_path_factory.mktemp("browser")
    run = folder / "a-run-with-a-name-that-is-longer-than-a-phone-is-wide"
    shutil.copytree(tiny_run, run)
    written = write_run_folder(folder / "written")
    for name in ("metrics.jsonl", "evaluation", "routing"):
        (written / name).rename(run / name)
    (run / "conflict").mkdir()
    (run / "conflict" / "step_00000040.json").write_text(conflict_record().model_dump_json())
    squad = run / "squads" / "normal"
    squad.mkdir(parents=True)
    (squad / SQUAD_FILE).write_text(json.dumps({"format": SQUAD_FORMAT, **squad_summary().model_dump(mode="json")}))
    Image.new("RGBA", (1440, 400)).save(squad / CURVE_PICTURE)
    return write_report(run, rooms=2)


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with running_chromium() as started:
        yield started


@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize(("scheme", "background"), [("light", "rgb(246, 247, 249)"), ("dark", "rgb(15, 17, 21)")])
def test_the_page_is_whole(browser: Chromium, page: Path, width: int, scheme: str, background: str) -> None:
    browser.open(page, width=width, scheme=scheme)
    sizes = browser.evaluate(
        "Promise.all([...document.images].map(i => i.decode().then(() => [i.naturalWidth, i.naturalHeight])))"
    )
    assert len(sizes) == 11  # rooms, curves, experts, affinity, conflicts, squad
    assert all(side > 0 for size in sizes for side in size)
    assert browser.complaints == []
    assert [url for url in browser.requests if not url.startswith("data:")] == [page.as_uri()]
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == background
    assert browser.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert browser.evaluate("innerWidth") == width  # a wide page makes a phone zoom out


def test_on_a_phone_what_is_wide_scrolls_inside_and_by_keyboard(browser: Chromium, page: Path) -> None:
    browser.open(page, width=PHONE)
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    wide = "[...document.querySelectorAll('.scroll, pre')].filter(e => e.scrollWidth > e.clientWidth)"
    assert browser.evaluate(f"{wide}.length") > 5
    assert browser.evaluate(f"{wide}.every(e => e.tabIndex === 0)")
    assert browser.evaluate(f"{wide}.every(e => e.clientWidth <= innerWidth)")


def test_a_slider_leads_through_the_layers_by_keyboard(browser: Chromium, page: Path) -> None:
    first, last = (layer.name for layer in LAYERS)
    browser.open(page, width=DESK)
    assert browser.evaluate(SHOWN) == [first]
    browser.evaluate("document.querySelector('.slider input').focus()")
    assert browser.evaluate("document.activeElement.labels[0].textContent").startswith("Layer")
    browser.press("ArrowRight")
    assert browser.evaluate(SHOWN) == [last]
    assert browser.evaluate("document.querySelector('.slider output').textContent") == f"{last} (2 of 2)"
    assert browser.evaluate("document.activeElement.getAttribute('aria-valuetext')") == last
    browser.press("Home")
    assert browser.evaluate(SHOWN) == [first]
    assert browser.complaints == []


def test_without_script_all_layers_show(browser: Chromium, page: Path) -> None:
    browser.open(page, width=DESK, script=False)
    assert browser.evaluate(SHOWN) == [layer.name for layer in LAYERS]
    assert browser.evaluate("document.querySelectorAll('input').length") == 0


def test_the_page_tells_what_it_shows_to_those_who_do_not_see_it(browser: Chromium, page: Path) -> None:
    browser.open(page, width=DESK)
    assert browser.evaluate("[...document.images].every(i => i.alt.length > 8)")
    assert browser.evaluate("new Set([...document.images].map(i => i.alt)).size === document.images.length")
    assert browser.evaluate("document.querySelectorAll('h1').length") == 1
    assert browser.evaluate("[...document.querySelectorAll('section')].every(s => s.querySelector('h2'))")
    assert browser.evaluate("[...document.querySelectorAll('th')].every(h => h.scope === 'col')")
    links = "[...document.querySelectorAll('nav a')]"
    assert browser.evaluate(f"{links}.length === document.querySelectorAll('section').length")
    assert browser.evaluate(f"{links}.every(a => document.querySelector(a.hash).innerText.startsWith(a.innerText))")
