import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from configs.schema import OptimConfig
from trainer.optim import learning_rate, param_groups


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.patches = nn.Conv2d(3, 4, 2)
        self.norm = nn.LayerNorm(4)
        self.task = nn.Embedding(2, 4)
        self.task_embedding = nn.Parameter(torch.zeros(2, 4))
        self.position = nn.Parameter(torch.zeros(1, 9, 4))
        self.log_variance = nn.Parameter(torch.zeros(2))
        self.router = nn.Parameter(torch.zeros(2, 4, 8))
        self.frozen = nn.Linear(3, 4).requires_grad_(False)
        self.weight_in = nn.Parameter(torch.zeros(8, 4, 6))
        self.bias_in = nn.Parameter(torch.zeros(8, 6))
        self.gain = nn.Parameter(torch.zeros(8, 6))
        self.tied = self.linear
        for parameter in (self.weight_in, self.bias_in, self.gain):
            parameter.is_expert = True  # type: ignore[attr-defined]


def test_only_matrices_decay_and_experts_are_apart() -> None:
    module = Parts()
    names = {parameter: name for name, parameter in module.named_parameters()}
    groups = {
        (group["expert"], group["weight_decay"]): {names[parameter] for parameter in group["params"]}
        for group in param_groups(module, 0.1)
    }
    assert groups == {
        (False, 0.1): {"linear.weight", "patches.weight", "router"},
        (False, 0.0): {
            *("linear.bias", "patches.bias", "norm.weight", "norm.bias", "task.weight"),
            *("task_embedding", "position", "log_variance"),
        },
        (True, 0.1): {"weight_in"},
        (True, 0.0): {"bias_in", "gain"},
    }


def test_absent_kinds_make_no_group() -> None:
    assert len(param_groups(nn.Linear(2, 2, bias=False), 0.1)) == 1


@given(steps=st.integers(1, 300), warmup=st.integers(0, 300), low=st.floats(0, 1e-3))
def test_learning_rate_rises_to_the_peak_and_falls_to_the_minimum(steps: int, warmup: int, low: float) -> None:
    optim = OptimConfig(lr=1e-2, min_lr=low, warmup_steps=min(warmup, steps))
    rates = [learning_rate(step, optim, steps) for step in range(steps)]
    rising, falling = rates[: optim.warmup_steps], rates[optim.warmup_steps :]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert all(0 <= rate <= optim.lr * (1 + 1e-12) for rate in rates)
    if rising:
        assert rising[-1] == optim.lr
    if falling:
        assert falling[-1] == pytest.approx(low, abs=1e-15)


def test_learning_rate_half_way_down_the_cosine() -> None:
    optim = OptimConfig(lr=1.0, min_lr=0.2, warmup_steps=10)
    assert learning_rate(59, optim, 110) == pytest.approx(0.6)
    assert learning_rate(0, optim, 110) == pytest.approx(0.1)
    assert learning_rate(500, optim, 110) == pytest.approx(0.2)
