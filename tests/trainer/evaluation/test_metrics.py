"""Metrics: known answers, masks, summable state."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import label as components
from torch import Tensor

from configs.tasks import TASKS, MetricKind, TaskSpec
from data_pipeline.targets import DEPTH_CODES, Target
from tests.trainer.test_losses import ALL_TASKS, dense, random_prediction, random_target
from trainer.evaluation.edge_metric import count_matches, ridges, thin
from trainer.evaluation.metrics import make_metric

EVERY_METRIC = [(spec, kind) for spec in ALL_TASKS for kind in spec.metrics]


def measure(task: str, kind: MetricKind, prediction: Tensor, target: Target) -> float | None:
    metric = make_metric(kind, TASKS[task])
    metric.update(prediction, target)
    return metric.compute()


def log_depth(metres: list[float]) -> Tensor:
    return (torch.log1p(torch.tensor(metres) * 512) / math.log(DEPTH_CODES)).view(1, 1, 1, -1)


def test_l1_and_mse_pool_valid_pixels() -> None:
    mask = torch.tensor([[[[True, True, False]]]])
    prediction, zeros = torch.tensor([[[[1.0, 3.0, 90.0]]]]), torch.zeros(1, 1, 1, 3)
    assert measure("keypoints3d", "l1", prediction, dense(zeros, mask)) == pytest.approx(2.0)
    assert measure("keypoints3d", "mse", prediction, dense(zeros, mask)) == pytest.approx(5.0)


def test_depth_metrics_are_in_metres() -> None:
    prediction, target = log_depth([2.0, 3.0]), dense(log_depth([1.0, 4.0]))
    assert measure("depth_euclidean", "abs_rel", prediction, target) == pytest.approx((1.0 + 0.25) / 2, rel=1e-4)
    assert measure("depth_euclidean", "rmse_m", prediction, target) == pytest.approx(1.0, rel=1e-4)


def test_depth_of_another_range_is_in_metres_too() -> None:
    spec = replace(TASKS["depth_euclidean"], codes_per_metre=64.0)
    codes = [torch.tensor([[[[64.0 * near, 64.0 * 900]]]]) for near in (2, 1)]
    prediction, values = (torch.log1p(code) / math.log(DEPTH_CODES) for code in codes)
    for kind, expected in (("abs_rel", 0.5), ("rmse_m", math.sqrt(0.5))):
        metric = make_metric(kind, spec)
        metric.update(prediction, dense(values))
        assert metric.compute() == pytest.approx(expected, rel=1e-3)


def test_depth_metrics_stay_finite_at_zero_depth_and_wild_predictions() -> None:
    prediction, target = torch.tensor([[[[-30.0, 30.0]]]]), dense(torch.zeros(1, 1, 1, 2))
    for kind in ("abs_rel", "rmse_m"):
        value = measure("depth_euclidean", kind, prediction, target)
        assert value is not None
        assert math.isfinite(value)


@pytest.mark.parametrize("degrees", [0.0, 0.01, 30.0, 90.0, 179.0])
def test_mean_angle_ignores_the_length_of_predictions(degrees: float) -> None:
    angle = math.radians(degrees)
    prediction = 5 * torch.tensor([math.sin(angle), 0.0, math.cos(angle)]).view(1, 3, 1, 1)
    target = dense(torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1))
    assert measure("normal", "mean_angle_deg", prediction, target) == pytest.approx(degrees, abs=1e-3)


def test_a_prediction_without_direction_is_not_right() -> None:
    target = dense(torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1))
    assert measure("normal", "mean_angle_deg", torch.zeros(1, 3, 1, 1), target) == pytest.approx(90.0)


def test_classification_metrics() -> None:
    values = torch.zeros(2, 365)
    values[0, 5], values[1, 7] = 1.0, 1.0
    target = Target(values, torch.ones(2, 1, dtype=torch.bool))
    logits = torch.zeros(2, 365)
    logits[0, 5], logits[1, 9] = 1e4, 1.0
    assert measure("class_scene", "accuracy", logits, target) == 0.5
    expected = (0.0 + math.log(364 + math.e)) / 2
    assert measure("class_scene", "cross_entropy", logits, target) == pytest.approx(expected, rel=1e-5)


def test_miou_pools_the_dataset_and_leaves_absent_classes_out() -> None:
    metric = make_metric("miou", TASKS["semseg"])
    for labels, guesses in (([0, 0, 1, 1], [0, 1, 1, 1]), ([1, 0, 0, 0], [0, 0, 0, 0])):
        logits = torch.nn.functional.one_hot(torch.tensor(guesses), 21).float().T.reshape(1, 21, 2, 2)
        metric.update(logits, dense(torch.tensor(labels).view(1, 2, 2)))
    class0, class1 = 4 / 6, 2 / 4
    assert metric.compute() == pytest.approx((class0 + class1) / 2)


def test_max_f_finds_the_best_threshold() -> None:
    probability = torch.tensor([0.9, 0.62, 0.42, 0.2]).view(1, 1, 2, 2)
    target = dense(torch.tensor([1.0, 1.0, 0.0, 1.0]).view(1, 1, 2, 2))
    # Best between 0.45 and 0.60: 2 of 3 found, none wrong.
    expected = 1.3 * 1.0 * (2 / 3) / (0.3 * 1.0 + 2 / 3)
    assert measure("saliency", "max_f", probability.logit(), target) == pytest.approx(expected, rel=1e-5)


@given(st.integers(0, 2**20))
def test_max_f_equals_a_plain_search(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 1, 5, 5, generator=generator)
    values = (torch.rand(2, 1, 5, 5, generator=generator) < 0.4).float()
    target = dense(values, torch.rand(2, 1, 5, 5, generator=generator) < 0.8)
    score, positive = logits.sigmoid()[target.mask], values[target.mask] > 0.5
    best = 0.0
    for threshold in (torch.arange(1, 20) / 20).tolist():
        hits = (positive & (score >= threshold)).sum().item()
        if hits:
            precision, recall = hits / (score >= threshold).sum().item(), hits / positive.sum().item()
            best = max(best, 1.3 * precision * recall / (0.3 * precision + recall))
    expected = None if not positive.any() else pytest.approx(best, rel=1e-5)
    assert measure("saliency", "max_f", logits, target) == expected


@pytest.mark.parametrize(("spec", "kind"), EVERY_METRIC, ids=lambda value: getattr(value, "name", value))
def test_states_add_up_and_masks_are_honoured(spec: TaskSpec, kind: MetricKind) -> None:
    whole, first, second = (make_metric(kind, spec) for _ in range(3))
    assert whole.compute() is None, "nothing seen yet"
    target, prediction = random_target(spec, 5), random_prediction(spec, 5).detach()
    whole.update(prediction, target)
    if spec.dense:
        prediction = torch.where(target.mask, prediction, -prediction) if kind != "ods_f" else prediction
    first.update(prediction[:2], Target(target.values[:2], target.mask[:2]))
    second.update(prediction[2:], Target(target.values[2:], target.mask[2:]))
    second.update(prediction[:0], Target(target.values[:0], target.mask[:0]))
    first.state = first.state + second.state
    assert first.compute() == pytest.approx(whole.compute(), rel=1e-9)
    blank = make_metric(kind, spec)
    blank.update(prediction, Target(target.values, torch.zeros_like(target.mask)))
    assert blank.compute() is None


def drawing(side: int = 64) -> Tensor:
    """A circle and a diagonal, one pixel wide: (1, 1, side, side)."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    circle = ((y - side / 2) ** 2 + (x - side / 2) ** 2).sqrt()
    return thin(((circle - side / 3).abs() < 1).unsqueeze(0) | (y == x - side / 2).unsqueeze(0)).float().unsqueeze(0)


def test_edges_predicted_where_they_are_score_near_one() -> None:
    edges = drawing()
    blurred = edges
    for _ in range(2):
        blurred = torch.nn.functional.avg_pool2d(blurred, 3, stride=1, padding=1)
    value = measure("edges", "ods_f", 16 * blurred - 2, dense(edges))
    assert value is not None
    assert value > 0.95


def test_edges_beyond_the_allowed_distance_score_zero() -> None:
    edges = torch.zeros(1, 1, 64, 64)
    edges[..., 20] = 1
    moved = torch.roll(edges, 4, dims=-1)
    assert measure("edges", "ods_f", 10 * moved - 5, dense(edges)) == 0.0
    assert measure("edges", "ods_f", 10 * torch.roll(edges, 1, dims=-1) - 5, dense(edges)) == 1.0
    left_out = torch.ones(1, 1, 64, 64, dtype=torch.bool)
    left_out[..., 20:30] = False
    assert measure("edges", "ods_f", 10 * moved - 5, dense(edges, left_out)) is None


def test_half_of_the_edges_found_is_two_thirds() -> None:
    edges = torch.zeros(1, 1, 64, 64)
    edges[..., 20] = 1
    half = edges.clone()
    half[..., 32:, :] = 0
    value = measure("edges", "ods_f", 10 * half - 5, dense(edges))
    assert value == pytest.approx(2 / 3, abs=0.02)


def test_matching_is_one_to_one() -> None:
    predicted, labelled = np.zeros((300, 300), dtype=bool), np.zeros((300, 300), dtype=bool)
    labelled[10, 10] = True
    predicted[10, 9:12] = True
    assert count_matches(predicted, labelled) == 1
    labelled[10, 12] = True
    assert count_matches(predicted, labelled) == 2


@settings(max_examples=40)
@given(st.integers(0, 2**20), st.floats(0.2, 0.7))
def test_thinning_keeps_every_component_and_stays_inside(seed: int, density: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 1, 8, 8, generator=generator) < density
    edges = torch.nn.functional.interpolate(coarse.float(), scale_factor=3).bool().squeeze(1)
    thinned = thin(edges)
    assert not (thinned & ~edges).any()
    assert torch.equal(thin(thinned), thinned)
    eight = np.ones((3, 3))
    labels, count = components(edges[0].numpy(), structure=eight)
    assert components(thinned[0].numpy(), structure=eight)[1] == count
    assert {int(i) for i in np.unique(labels[thinned[0].numpy()])} == set(range(1, count + 1))


def test_flat_scores_have_no_ridge_and_a_line_has_one() -> None:
    assert not ridges(torch.full((2, 1, 9, 9), 0.3)).any()
    line = torch.zeros(1, 1, 9, 9)
    line[..., 3:5] = 1.0
    assert (ridges(line) & (line > 0)).sum(dim=3).flatten().tolist() == [1] * 9
