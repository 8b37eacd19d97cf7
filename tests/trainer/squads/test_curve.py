"""The curve: where its thresholds lie, what it measures, how it is drawn and read back."""

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from configs.errors import UserError
from model.extract import select_experts
from model.layer_routing import ExpertLayerInfo
from model.mod_squad import ModelOutput, ModSquad
from model.routing_stats import RoutingLedger
from tests.trainer.run_folder import squad_summary
from tests.trainer.tiny_run import TASKS
from trainer.report.tables import curve_table
from trainer.squads.charts import curve_chart
from trainer.squads.curve import MAX_POINTS, SquadCurve, curve_thresholds, read_curve, write_curve
from trainer.squads.export import CURVE_FILE, CURVE_PICTURE, load_squad
from trainer.squads.extraction import extract_tasks
from trainer.squads.summary import SquadSummary


def usage(tokens: int, experts: int, layers: int, seed: int) -> RoutingLedger:
    """A ledger of two tasks whose tokens choose two experts each, some experts much more often than others."""
    random = np.random.default_rng(seed)
    infos = [
        ExpertLayerInfo(name=f"blocks.{i}.mlp", kind="mlp", block=i, num_experts=experts, top_k=2, sees_task=True)
        for i in range(layers)
    ]
    ledger = RoutingLedger(infos, ["a", "b"])
    for info in infos:
        for task in range(2):
            liking = random.dirichlet(np.full(experts, 0.5)) + 1e-9
            chosen = [random.choice(experts, size=2, replace=False, p=liking / liking.sum()) for _ in range(tokens)]
            ledger.counts[info.name][task] = torch.from_numpy(np.bincount(np.concatenate(chosen), minlength=experts))
            ledger.tokens[info.name][task] = tokens
    return ledger


def kept_at(ledger: RoutingLedger, tasks: list[str], threshold: float) -> dict[str, list[int]]:
    return select_experts(ledger, tasks, ledger.layers, threshold)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 50),
    experts=st.integers(2, 8),
    layers=st.integers(1, 4),
    seed=st.integers(0, 2**16),
    tasks=st.sampled_from([["a"], ["a", "b"]]),
)
def test_thresholds_are_where_the_squad_changes(
    tokens: int, experts: int, layers: int, seed: int, tasks: list[str]
) -> None:
    ledger = usage(tokens, experts, layers, seed)
    thresholds = curve_thresholds(ledger, tasks, ledger.layers)
    assert thresholds == sorted(thresholds)
    assert len(thresholds) <= MAX_POINTS
    squads = [kept_at(ledger, tasks, threshold) for threshold in thresholds]
    # The ends: every expert, and the K most used of each task.
    assert all(len(squads[0][layer.name]) == experts for layer in ledger.layers)
    assert squads[-1] == kept_at(ledger, tasks, 1.0)
    # Each is a part of the one before, and another one.
    for more, fewer in pairwise(squads):
        assert all(set(fewer[name]) <= set(more[name]) for name in more)
        assert more != fewer
    # None is left out unless there are too many.
    everywhere = [kept_at(ledger, tasks, number / tokens) for number in range(tokens + 1)]
    if len({json.dumps(squad) for squad in everywhere}) <= MAX_POINTS:
        assert all(squad in squads for squad in everywhere)


def test_of_many_squads_those_stay_that_spread_over_the_number_of_experts() -> None:
    ledger = usage(5000, 16, 6, seed=1)
    thresholds = curve_thresholds(ledger, ["a"], ledger.layers)
    kept = [sum(map(len, kept_at(ledger, ["a"], threshold).values())) for threshold in thresholds]
    assert len(thresholds) == MAX_POINTS
    assert (kept[0], kept[-1]) == (96, 12)
    assert max(more - fewer for more, fewer in pairwise(kept)) <= 12  # 84 / 11 and a little


def test_thresholds_are_short_to_type() -> None:
    ledger = usage(5000, 16, 6, seed=1)
    assert all(len(f"{threshold:g}") <= 6 for threshold in curve_thresholds(ledger, ["a"], ledger.layers))


def test_a_model_without_experts_has_one_squad() -> None:
    assert curve_thresholds(RoutingLedger([], ["a"]), ["a"], []) == [0.0]


@pytest.fixture(scope="module")
def curve_run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run with the curve of a squad of two tasks in the folder `squad`."""
    folder = tmp_path_factory.mktemp("curve") / "run"
    shutil.copytree(tiny_run, folder)
    extract_tasks(folder, TASKS[1:], folder / "squad", threshold=0.3, routing="validation", curve=True)
    return folder


def test_a_curve_falls_from_the_whole_model_to_the_most_used_experts(curve_run: Path) -> None:
    curve = read_curve(curve_run / "squad")
    assert curve is not None
    first, last = curve.points[0], curve.points[-1]
    assert first.experts == (8, 8)
    for score in first.scores:
        assert score.after == pytest.approx(score.before, rel=1e-6)
        assert score.unaffected_tokens == score.unaffected_images == 1.0
    assert last.threshold == 1.0
    assert len(curve.points) > 2
    for larger, smaller in pairwise(curve.points):
        assert larger.threshold < smaller.threshold
        assert larger.experts[0] > smaller.experts[0]
        assert larger.parameters_after > smaller.parameters_after
        assert larger.macs_after == smaller.macs_after
        for more, less in zip(larger.scores, smaller.scores, strict=True):
            assert more.before == less.before
            assert more.unaffected_tokens >= less.unaffected_tokens
            assert more.unaffected_images >= less.unaffected_images
    assert last.scores[0].unaffected_tokens < 1.0


def test_every_point_is_what_an_extraction_at_its_threshold_gives(curve_run: Path, tmp_path: Path) -> None:
    curve = read_curve(curve_run / "squad")
    assert curve is not None
    for point in (curve.points[1], curve.points[-1]):
        alone = extract_tasks(curve_run, point.tasks, tmp_path, threshold=point.threshold, routing="validation")
        assert alone == point
        assert sum(x.numel() for x in load_squad(tmp_path).parameters()) == point.parameters_after
    assert read_curve(tmp_path) is None


def test_the_squad_of_the_asked_threshold_is_on_the_curve(curve_run: Path) -> None:
    curve = read_curve(curve_run / "squad")
    assert curve is not None
    assert curve.threshold == 0.3
    (chosen,) = [point for point in curve.points if point.threshold == 0.3]
    squad = load_squad(curve_run / "squad")
    assert squad.kept == {layer.name: list(layer.kept) for layer in chosen.layers}
    Image.open(curve_run / "squad" / CURVE_PICTURE).verify()


def test_the_large_model_runs_once_for_all_points(
    curve_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images: list[int] = []
    forward = ModSquad.forward

    def counting(model: ModSquad, batch: Tensor, *pairs: Tensor) -> ModelOutput:
        images.append(len(batch))
        return forward(model, batch, *pairs)

    monkeypatch.setattr(ModSquad, "forward", counting)
    extract_tasks(curve_run, ["normal"], tmp_path, routing="validation", curve=True)
    assert sum(images) == 5


def falling(points: int) -> SquadCurve:
    """A curve made up of squads that keep fewer and fewer experts."""
    whole = squad_summary()
    layer = whole.layers[0]
    squads: list[SquadSummary] = []
    for number in range(points):
        kept = layer.model_copy(update={"num_experts": points + 1, "kept": tuple(range(points + 1 - number))})
        score = whole.scores[0].model_copy(update={"after": 30 + number, "unaffected_tokens": 1 - number / points})
        other = score.model_copy(update={"task": "depth_zbuffer", "before": float("nan")})
        changes = {"threshold": number / points, "layers": (kept,), "scores": (score, other)}
        squads.append(whole.model_copy(update={**changes, "parameters_after": 900_000 - 1000 * number}))
    return SquadCurve(threshold=0.0, points=tuple(squads))


@pytest.mark.parametrize("points", [1, 7])
def test_curves_of_any_length_are_drawn_and_tabulated(points: int, tmp_path: Path) -> None:
    curve = falling(points)
    curve_chart(tmp_path / "curve.png", curve)
    with Image.open(tmp_path / "curve.png") as image:
        assert image.mode == "RGBA"
        assert (np.asarray(image)[..., 3] > 0).sum() > 8000
    table = curve_table(curve)
    assert table.row_count == points
    assert "normal\ndepth_zbuffer" in next(column for column in table.columns if column.header == "task").cells


def test_a_curve_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    curve = falling(3)
    write_curve(tmp_path, curve)
    read = read_curve(tmp_path)
    assert read is not None
    # NaN is null on disk, and equals nothing, itself included.
    assert read.model_dump_json() == curve.model_dump_json()
    assert read.points[1].scores[0] == curve.points[1].scores[0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:100], "not valid JSON"),
        (lambda _: "[]", "holds no curve that this program reads"),
        (lambda text: text.replace("curve.1", "curve.9"), "holds no curve that this program reads"),
        (lambda text: text.replace('"threshold"', '"treshold"'), r"threshold: Field required"),
        (lambda text: json.dumps({**json.loads(text), "points": []}), "points: "),
    ],
)
def test_damaged_curves_are_named_in_one_line(damage: Callable[[str], str], message: str, tmp_path: Path) -> None:
    write_curve(tmp_path, falling(2))
    path = tmp_path / CURVE_FILE
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match=rf"curve\.json.*{message}") as error:
        read_curve(tmp_path)
    assert "\n" not in str(error.value)
