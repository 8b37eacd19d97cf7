"""Task weighting: values, learned optimum, absent tasks."""

import math

import pytest
import torch

from configs.schema import TrainConfig
from configs.tasks import resolve_tasks
from trainer.weighting import UncertaintyWeighting, task_weighting

TASKS = resolve_tasks(["depth_euclidean", "normal", "class_scene"])
ALL = torch.ones(3, dtype=torch.bool)


def test_fixed_is_the_weighted_sum() -> None:
    weighting = task_weighting(TrainConfig(task_weights={"normal": 3.0}), TASKS)
    assert not list(weighting.parameters())
    assert weighting(torch.tensor([1.0, 2.0, 4.0]), ALL).item() == 1 + 3 * 2 + 4


def test_uncertainty_starts_at_unit_variance() -> None:
    weighting = task_weighting(TrainConfig(task_weighting="uncertainty"), TASKS)
    loss = weighting(torch.tensor([1.0, 2.0, 4.0]), ALL)
    assert loss.item() == pytest.approx(0.5 * 1 + 0.5 * 2 + 4)  # regressions by half, classification in full


def test_uncertainty_learns_the_variance_that_minimises_its_loss() -> None:
    weighting = task_weighting(TrainConfig(task_weighting="uncertainty"), TASKS)
    assert isinstance(weighting, UncertaintyWeighting)
    losses = torch.tensor([0.1, 2.0, 4.0])
    optimizer = torch.optim.Adam(weighting.parameters(), lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        weighting(losses, ALL).backward()
        optimizer.step()
    # d/ds (f exp(-s) L + s/2) = 0 at s = log(2 f L), with f = 1/2 or 1.
    expected = [math.log(0.1), math.log(2.0), math.log(2 * 4.0)]
    assert weighting.log_variance.tolist() == pytest.approx(expected, abs=1e-2)


@pytest.mark.parametrize("kind", ["fixed", "uncertainty"])
def test_absent_tasks_add_nothing_and_learn_nothing(kind: str) -> None:
    weighting = task_weighting(TrainConfig.model_validate({"task_weighting": kind}), TASKS)
    losses = torch.tensor([1.0, 0.0, 2.0], requires_grad=True)
    present = torch.tensor([True, False, True])
    total = weighting(losses, present)
    total.backward()
    assert losses.grad is not None
    assert losses.grad[1] == 0
    if isinstance(weighting, UncertaintyWeighting):
        assert weighting.log_variance.grad is not None
        assert weighting.log_variance.grad[1] == 0


def test_uncertainty_is_computed_in_fp32_under_bf16() -> None:
    weighting = task_weighting(TrainConfig(task_weighting="uncertainty"), TASKS).to(torch.bfloat16)
    assert weighting(torch.tensor([0.123456, 2.0, 4.0]), ALL).dtype == torch.float32
