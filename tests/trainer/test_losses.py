"""Losses per pair: known values, masks, empty pairs, precision."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from configs.tasks import TASKS, TaskSpec
from data_pipeline.targets import Target
from trainer.losses import pair_losses

ALL_TASKS = tuple(TASKS.values())
SIDE = 6


def dense(values: Tensor, mask: Tensor | None = None) -> Target:
    shape = (len(values), 1, *values.shape[-2:])
    return Target(values, torch.ones(shape, dtype=torch.bool) if mask is None else mask)


def random_target(spec: TaskSpec, pairs: int, seed: int = 0) -> Target:
    generator = torch.Generator().manual_seed(seed)
    if not spec.dense:
        values = torch.rand(pairs, spec.channels, generator=generator).softmax(1)
        return Target(values, torch.ones(pairs, 1, dtype=torch.bool))
    mask = torch.rand(pairs, 1, SIDE, SIDE, generator=generator) < 0.7
    if spec.target == "class_ids":
        return Target(torch.randint(spec.channels, (pairs, SIDE, SIDE), generator=generator), mask)
    values = torch.randn(pairs, spec.channels, SIDE, SIDE, generator=generator)
    if spec.loss == "cosine":
        values = functional.normalize(values, dim=1)
    if spec.loss == "balanced_bce":
        values = (values > 0).float()
    return Target(values, mask)


def random_prediction(spec: TaskSpec, pairs: int) -> Tensor:
    shape = (pairs, spec.channels, SIDE, SIDE) if spec.dense else (pairs, spec.channels)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()


def test_l1_and_l2_are_means_over_valid_pixels_and_channels() -> None:
    mask = torch.tensor([[[[True, False], [True, True]]]])
    depth = pair_losses(
        TASKS["depth_euclidean"], torch.tensor([[[[1.0, 9.0], [2.0, 4.0]]]]), dense(torch.zeros(1, 1, 2, 2), mask)
    )
    assert depth.tolist() == pytest.approx([(1 + 2 + 4) / 3])
    error = torch.stack([torch.full((2, 2), 1.0), torch.full((2, 2), 3.0)]).unsqueeze(0)
    curvature = pair_losses(TASKS["principal_curvature"], error, dense(torch.zeros(1, 2, 2, 2), mask))
    assert curvature.tolist() == pytest.approx([(1 + 9) / 2])


def test_cosine_ignores_length_and_measures_direction() -> None:
    up = torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1)
    side = torch.tensor([5.0, 0.0, 0.0]).view(1, 3, 1, 1)
    losses = [pair_losses(TASKS["normal"], vector, dense(up)).item() for vector in (7 * up, side, -up)]
    assert losses == pytest.approx([0.0, 1.0, 2.0], abs=1e-6)


def test_cosine_of_a_zero_prediction_has_a_bounded_gradient() -> None:
    prediction = torch.zeros(1, 3, 1, 1, requires_grad=True)
    pair_losses(TASKS["normal"], prediction, dense(torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1))).sum().backward()
    assert prediction.grad is not None
    assert prediction.grad.isfinite().all()
    assert prediction.grad.abs().max() <= 1e3


def test_soft_cross_entropy_of_matching_distributions_is_the_entropy() -> None:
    spec = TASKS["class_scene"]
    probabilities = torch.zeros(1, spec.channels)
    probabilities[0, :4] = 0.25
    losses = pair_losses(
        spec, probabilities.clamp_min(1e-30).log(), Target(probabilities, torch.ones(1, 1, dtype=torch.bool))
    )
    assert losses.item() == pytest.approx(math.log(4), rel=1e-5)


def test_cross_entropy_leaves_masked_pixels_out() -> None:
    spec = TASKS["semseg"]
    logits = torch.zeros(1, spec.channels, 1, 2)
    logits[0, 3, 0, 0] = 100.0
    ids = torch.tensor([[[3, 0]]])
    assert pair_losses(spec, logits, dense(ids, torch.tensor([[[[True, False]]]]))).item() == pytest.approx(
        0.0, abs=1e-6
    )
    both = pair_losses(spec, logits, dense(ids)).item()
    assert both == pytest.approx(math.log(spec.channels) / 2, rel=1e-5)


def test_balanced_bce_gives_both_classes_the_same_total_weight() -> None:
    values = torch.zeros(1, 1, 4, 4)
    values[0, 0, 0, :2] = 1.0
    losses = pair_losses(TASKS["saliency"], torch.zeros(1, 1, 4, 4), dense(values))
    share = 2 / 16
    assert losses.item() == pytest.approx(2 * share * (1 - share) * math.log(2), rel=1e-5)
    logits = torch.zeros(1, 1, 4, 4, requires_grad=True)
    pair_losses(TASKS["saliency"], logits, dense(values)).sum().backward()
    assert logits.grad is not None
    assert logits.grad[values > 0].sum().item() == pytest.approx(-logits.grad[values == 0].sum().item(), rel=1e-5)


@pytest.mark.parametrize("spec", [spec for spec in ALL_TASKS if spec.dense], ids=lambda spec: spec.name)
def test_masked_pixels_change_nothing(spec: TaskSpec) -> None:
    target, prediction = random_target(spec, 3), random_prediction(spec, 3)
    expected = pair_losses(spec, prediction, target)
    outside = ~target.mask
    with torch.no_grad():
        disturbed = torch.where(outside, 50.0, prediction).requires_grad_()
    wrong = 1 if target.values.dim() == 3 else torch.nan
    values = torch.where(outside.squeeze(1) if target.values.dim() == 3 else outside, wrong, target.values)
    losses = pair_losses(spec, disturbed, Target(values, target.mask))
    torch.testing.assert_close(losses, expected)
    losses.sum().backward()
    assert disturbed.grad is not None
    assert disturbed.grad.isfinite().all()
    assert (disturbed.grad[outside.expand_as(disturbed)] == 0).all()


@pytest.mark.parametrize("spec", ALL_TASKS, ids=lambda spec: spec.name)
def test_a_pair_without_valid_pixels_and_no_pair_at_all_give_exact_zeros(spec: TaskSpec) -> None:
    target, prediction = random_target(spec, 2), random_prediction(spec, 2)
    losses = pair_losses(spec, prediction, Target(target.values, torch.zeros_like(target.mask)))
    losses.sum().backward()
    assert losses.tolist() == [0.0, 0.0]
    assert prediction.grad is not None
    assert (prediction.grad == 0).all()
    nothing = random_prediction(spec, 0)
    total = pair_losses(spec, nothing, random_target(spec, 0)).sum()
    total.backward()
    assert total.item() == 0.0
    assert nothing.grad is not None, "the graph reaches the head even without pairs"


@pytest.mark.parametrize("spec", ALL_TASKS, ids=lambda spec: spec.name)
def test_bf16_predictions_are_judged_in_fp32(spec: TaskSpec) -> None:
    target, prediction = random_target(spec, 2), random_prediction(spec, 2).detach().bfloat16()
    losses = pair_losses(spec, prediction, target)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, pair_losses(spec, prediction.float(), target), rtol=0, atol=0)


@given(st.sampled_from(ALL_TASKS), st.integers(1, 4), st.integers(0, 2**20))
def test_every_pair_is_judged_alone(spec: TaskSpec, pairs: int, seed: int) -> None:
    target, prediction = random_target(spec, pairs, seed), random_prediction(spec, pairs)
    together = pair_losses(spec, prediction, target)
    alone = [
        pair_losses(spec, prediction[i : i + 1], Target(target.values[i : i + 1], target.mask[i : i + 1]))
        for i in range(pairs)
    ]
    torch.testing.assert_close(together, torch.cat(alone))
    assert (together >= 0).all()
