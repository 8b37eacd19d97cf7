"""Runs side by side: what is best, what has changed, what differs, and what is missing."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import yaml
from PIL import Image

from configs.errors import UserError
from tests.services.chromium import running_chromium
from tests.trainer.run_folder import (
    LAYERS,
    STEPS,
    score,
    step_line,
    write_lines_of_grown_batch,
    write_run_folder,
)
from trainer.charts.figure import CATEGORIES
from trainer.charts.training import LossCurve, loss_comparison_chart
from trainer.report.compare import ComparedRun, ComparedValue, compare_runs, read_runs, remarks
from trainer.report.compare_page import write_comparison
from trainer.report.page import UNKNOWN

EVALUATION = f"evaluation/step_{STEPS:08d}_val.json"


def write_run(folder: Path, *, settings: dict[str, Any] | None = None, scores: dict[str, Any] | None = None) -> Path:
    """Write a run with other settings (section -> key -> value) and scores than `run_folder`'s."""
    run = write_run_folder(folder)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["val"] = "rooms/val"
    for section, values in (settings or {}).items():
        config[section] = {**config[section], **values} if isinstance(values, dict) else values
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    evaluation = json.loads((run / EVALUATION).read_text())
    evaluation["tasks"] |= scores or {}
    (run / EVALUATION).write_text(json.dumps(evaluation))
    return run


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """Depth 0.2, normals 33; lower is better in both."""
    return write_run(tmp_path / "first")


@pytest.fixture
def second(tmp_path: Path) -> Path:
    """Depth twice as good, normals a tenth worse, another learning rate and one more weight."""
    return write_run(
        tmp_path / "second",
        settings={"optim": {"lr": 0.002}, "train": {"task_weights": {"normal": 2.0}}},
        scores={
            "depth_zbuffer": score("abs_rel", 0.1, 0.5, True),
            "normal": score("mean_angle_deg", 36.3, 30.0, False),
        },
    )


def rows(runs: list[ComparedRun], title: str) -> dict[str, tuple[ComparedValue, ...]]:
    return dict(next(table.rows for table in compare_runs(runs) if table.title == title))


def test_the_best_is_marked_and_changes_are_to_the_first(first: Path, second: Path) -> None:
    found = rows(read_runs([first, second]), "Metrics")
    assert found["depth_zbuffer, abs_rel ↓"] == (
        ComparedValue(text="0.2"),
        ComparedValue(text="0.1", is_best=True, change="-50.00 %", verdict="better"),
    )
    assert found["normal, mean_angle_deg ↓"] == (
        ComparedValue(text="33", is_best=True),
        ComparedValue(text="36.3", change="+10.00 %", verdict="worse"),
    )
    assert found["mean gain over the first"][1] == ComparedValue(text="2 tasks", change="+20.00 %", verdict="better")


def test_tasks_that_mean_something_else_are_named(tmp_path: Path) -> None:
    runs = []
    for number, (classes, loss) in enumerate(((("a", "b"), "l1"), (("a", "b"), "l2"), (("b", "a"), "l1"))):
        definitions = {
            "lanes": {"like": "semseg", "class_names": classes},
            "far": {"like": "depth_zbuffer", "codes_per_metre": 64, "loss": loss},
        }
        settings = {"define_tasks": definitions, "tasks": ["lanes", "far"]}
        runs.append(write_run(tmp_path / str(number), settings=settings))
    assert not any("do not compare" in remark for remark in remarks(read_runs(runs[:2])))
    assert any(remark.endswith("so their figures do not compare: lanes") for remark in remarks(read_runs(runs)))


def test_more_is_better_where_the_metric_says_so(tmp_path: Path) -> None:
    accuracies = {
        name: {**score("accuracy", value, 0.1, True), "higher_is_better": True}
        for name, value in (("low", 0.4), ("high", 0.5), ("same", 0.5))
    }
    runs = [write_run(tmp_path / name, scores={"normal": of_run}) for name, of_run in accuracies.items()]
    low, high, same = rows(read_runs(runs), "Metrics")["normal, accuracy ↑"]
    assert (low.is_best, high.is_best, same.is_best) == (False, True, True)
    assert (high.change, high.verdict) == ("+25.00 %", "better")
    assert rows(read_runs(runs), "Metrics")["mean gain over the first"][1].change == "+12.50 %"  # depth is the same


def test_where_all_are_alike_none_is_the_best(first: Path, tmp_path: Path) -> None:
    values = rows(read_runs([first, write_run(tmp_path / "twin")]), "Metrics")["depth_zbuffer, abs_rel ↓"]
    assert values == (ComparedValue(text="0.2"), ComparedValue(text="0.2", change="+0.00 %"))


def test_only_settings_that_differ_are_listed(first: Path, second: Path) -> None:
    found = rows(read_runs([first, second]), "Configuration")
    assert {key: tuple(value.text for value in values) for key, values in found.items()} == {
        "optim.lr": ("0.001", "0.002"),
        "train.task_weights.normal": (UNKNOWN, "2.0"),
    }


def test_information_sizes_and_speed_stand_side_by_side(first: Path, tmp_path: Path) -> None:
    wide = write_run(tmp_path / "wide", settings={"model": {"mlp_experts": 16}, "train": {"images_per_step": 16}})
    lines = [{**step_line(step), "images": 16 * step} for step in range(1, STEPS + 1)]
    (wide / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (wide / f"routing/step_{STEPS:08d}.json").unlink()
    runs = read_runs([first, wide])
    information = rows(runs, "Mutual information")
    assert [value.text for value in information[LAYERS[0].name]] == ["0.6931", UNKNOWN]  # log 2: experts of their own
    costs = rows(runs, "Size and speed")
    assert [value.text for value in costs["images per second"]] == ["32", "64"]
    assert costs["images per second"][1].change == "+100.00 %"
    assert costs["images seen"][1] == ComparedValue(text="640")
    assert costs["parameters"][1].change.startswith("+")
    assert costs["parameters per token, mean over tasks"][1].change.startswith("+")  # its routers are wider


def test_images_are_counted_as_logged_where_the_batch_has_changed(first: Path, tmp_path: Path) -> None:
    grown = write_run(tmp_path / "grown")
    write_lines_of_grown_batch(grown)
    runs = read_runs([first, grown])
    costs = rows(runs, "Size and speed")
    assert [value.text for value in costs["images seen"]] == ["320", "800"]
    assert [value.text for value in costs["images per second"]] == ["32", "80"]
    with mock.patch("trainer.report.compare_page.loss_comparison_chart", wraps=loss_comparison_chart) as drawn:
        write_comparison(runs, tmp_path / "page.html")
    _, panels, place = drawn.call_args.args
    assert place == "images seen"
    assert [curve.place[-1] for curve in panels["normal"]] == [320, 800]


def test_what_is_missing_or_unfinished_is_named(first: Path, tmp_path: Path) -> None:
    young = write_run(tmp_path / "young", settings={"tasks": ["normal", "reshading"], "train": {"steps": 90}})
    (young / EVALUATION).unlink()
    newborn = write_run(tmp_path / "newborn", settings={"data": {"val": "other/val"}})
    (newborn / "metrics.jsonl").unlink()
    grown = write_run(tmp_path / "grown")
    (grown / "metrics.jsonl").write_text(json.dumps(step_line(STEPS + 5)) + "\n")
    runs = read_runs([first, young, newborn, grown])
    told = "\n".join(remarks(runs))
    for part in (
        "young is not finished: 40 of 90 steps",
        f"young has no evaluation: `modsquad evaluate {young}`",
        "newborn is not finished: 0 of 40 steps",
        "not all runs have these tasks of first: depth_zbuffer",
        "not all runs have these tasks of young: reshading",
        "evaluated on different images",
        "grown was evaluated at step 40, before its latest, 45",
    ):
        assert part in told
    assert "first is not finished" not in told
    assert rows(runs, "Metrics")["normal, mean_angle_deg ↓"][1] == ComparedValue(text=UNKNOWN)
    assert rows(runs, "Size and speed")["median step (s)"][2].text == UNKNOWN
    assert write_comparison(runs, tmp_path / "page.html").is_file()


def test_runs_of_the_same_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / place / "run") for place in ("a", "b")]
    assert [run.name for run in read_runs(runs)] == [str(run) for run in runs]
    assert [run.name for run in read_runs([runs[0], write_run(tmp_path / "c")])] == ["run", "c"]


def test_folders_that_cannot_be_compared_are_refused(first: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least two run folders"):
        read_runs([first])
    with pytest.raises(UserError, match="given 2 times"):
        read_runs([first, first / ".." / "first"])
    with pytest.raises(UserError, match="not a run folder"):
        read_runs([first, tmp_path])


def test_every_run_has_a_line_of_its_own_in_every_panel(tmp_path: Path) -> None:
    curves = [
        LossCurve(name=f"run {number}", place=np.arange(200.0), loss=np.full(200, float(number)))
        for number in range(len(CATEGORIES) + 1)  # one more than there are colours
    ]
    loss_comparison_chart(tmp_path / "losses.png", {"total loss": curves, "normal": curves}, "step")
    pixels = np.asarray(Image.open(tmp_path / "losses.png"))
    left, right = np.array_split(pixels, 2, axis=1)
    for colour in CATEGORIES:
        rgb = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
        for half in (left, right):
            assert ((half[..., :3] == rgb).all(-1) & (half[..., 3] == 255)).sum() > 100


def test_the_command_prints_the_tables_and_writes_the_page(first: Path, second: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trainer.cli", "compare", str(first), str(second), "--out", "side/by/side.html"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for part in ("★ 0.1 -50.00 %", "mean gain over the first", LAYERS[0].name, "optim.lr", "wrote side/by/side.html"):
        assert part in done.stdout
    page = tmp_path / "side" / "by" / "side.html"
    with running_chromium() as browser:
        for width in (375, 1280):
            browser.open(page, width=width, scheme="dark")
            assert browser.evaluate("document.images[0].decode().then(() => document.images[0].naturalWidth)") > 0
            assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
            assert browser.evaluate("document.querySelector('.good').textContent") == "-50.00 %"
            assert browser.complaints == []
            assert [url for url in browser.requests if not url.startswith("data:")] == [page.as_uri()]
