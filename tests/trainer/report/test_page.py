import base64
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.report.page import (
    Markup,
    Section,
    bars,
    details,
    folded,
    missing,
    note,
    number,
    page,
    percent,
    picture,
    quantity,
    shares,
    slides,
    table,
    verdict,
)

VOID = {"meta", "img", "link"}


class Balance(HTMLParser):
    """Fails on elements that do not nest; keeps the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(markup: str) -> str:
    parser = Balance()
    parser.feed(markup)
    parser.close()
    assert parser.open == []
    return parser.text


def test_the_page_is_well_formed_and_needs_nothing_from_elsewhere() -> None:
    body = missing("no thing", "make one") + table(["a", "b"], [["x", 1.0], ["y", 2.0]], right=["b"])
    text = page("run", "a subtitle", [("steps", "3")], [Section(title="Part", caption="what", body=body)])
    words = read(text)
    for expected in ("run", "a subtitle", "steps", "Part", "Missing: no thing. make one"):
        assert expected in words
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"https?://|@import|url\(|<script src", text)
    assert "default-src 'none'" in text  # so that the browser refuses whatever the tests do not know of


@given(name=st.text(max_size=30))
def test_foreign_text_cannot_become_markup(name: str) -> None:
    hostile = f"<script>{name}</script>"
    markup = (
        table([hostile], [[hostile]])
        + missing(hostile, hostile)
        + note(hostile)
        + details(hostile, hostile)
        + folded(hostile, "")
        + shares([(hostile, 0.5)]).html
        + slides(hostile, [(hostile, "")])
        + bars([(hostile, 1, 2)]).html
        + verdict(True, hostile, "").html
    )
    assert "<script" not in markup
    whole = page(hostile, hostile, [(hostile, hostile)], [Section(title=hostile, body="")])
    assert whole.count("<script") == 1  # the page's own


def test_a_picture_travels_inside_the_page(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"PNG bytes")
    markup = picture(tmp_path / "a.png", 'a "chart"')
    found = re.search(r'base64,([^"]*)"', markup)
    assert found is not None
    assert base64.b64decode(found[1]) == b"PNG bytes"
    assert 'alt="a &quot;chart&quot;"' in markup


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.123456, "0.1235"), (3.0, "3"), (12345.6, "12,346"), (1234567, "1,234,567"), (0, "0"), (1e-7, "1e-07")],
)
def test_numbers_have_four_digits(value: float, shown: str) -> None:
    assert number(value) == shown


@pytest.mark.parametrize("unknown", [math.nan, math.inf])
def test_unknown_numbers_are_dashes(unknown: float) -> None:
    assert number(unknown) == percent(unknown) == "\N{EN DASH}"


@pytest.mark.parametrize(
    ("value", "shown"), [(206_960_000, "207 M"), (21.28e9, "21.3 G"), (999_900, "1 M"), (950, "950"), (1500, "1.5 k")]
)
def test_quantities_have_prefixes(value: float, shown: str) -> None:
    assert quantity(value) == shown


def test_percents() -> None:
    assert percent(0.5) == "50.00 %"
    assert percent(0.0012, signed=True) == "+0.12 %"
    assert percent(-0.5, signed=True) == "-50.00 %"


def test_verdicts() -> None:
    assert "good" in verdict(True, "better", "worse").html
    assert "worse" in verdict(False, "better", "worse").html
    assert verdict(None, "better", "worse") == Markup("\N{EN DASH}")


def test_bars_show_the_kept_share_of_each_layer() -> None:
    markup = bars([("blocks.0.attention", 2, 8), ("blocks.1.mlp", 4, 8)]).html
    assert read(markup).strip() == "6 of 16"
    assert "height:25%" in markup
    assert 'title="blocks.1.mlp: 4 of 8"' in markup


def test_shares_are_strips_with_their_numbers() -> None:
    markup = shares([("6", 0.931), ("1", 0.5)]).html
    assert read(markup) == "6 93 %1 50 %"
    assert "--share:93%" in markup
    assert "--share:50%" in markup
