from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from configs.errors import UserError
from model import expert_runs
from model.dispatch import ExpertGroup
from model.experts import ExpertMLP, reference_expert_mlp
from model.router import Routing
from tests.model.routings import random_routing, relative_error

Layer = Callable[[Tensor, Routing], Tensor]


def expert_layer(num_experts: int, top_k: int, group: ExpertGroup | None = None) -> ExpertMLP:
    layer = ExpertMLP(width=8, hidden=12, num_experts=num_experts, top_k=top_k, group=group or ExpertGroup(), seed=3)
    for bias in (layer.b1, layer.b2):  # they start at zero, which would hide mistakes
        torch.nn.init.normal_(bias, generator=torch.Generator().manual_seed(len(bias)))
    return layer


def output_and_gradients(layer: Layer, x: Tensor, routing: Routing, weights: Sequence[Tensor]) -> list[Tensor]:
    y = layer(x, routing)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).bfloat16().to(y.dtype)
    return [y, *torch.autograd.grad(y, [x, routing.logits_SE, *weights], upstream)]


def assert_matches_reference(tokens: int, num_experts: int, top_k: int, dtype: torch.dtype, tolerance: float) -> None:
    layer = expert_layer(num_experts, top_k).to(dtype)
    x = torch.randn(tokens, 8, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    weights = [layer.w1, layer.b1, layer.w2, layer.b2]
    ours = output_and_gradients(layer, x, random_routing(tokens, num_experts, top_k), weights)

    exact = [tensor.detach().double().requires_grad_() for tensor in (x, *weights)]
    right = output_and_gradients(
        lambda x, routing: reference_expert_mlp(x, routing, *exact[1:]),
        exact[0],
        random_routing(tokens, num_experts, top_k),
        exact[1:],
    )
    assert ours[0].dtype == dtype
    for mine, true in zip(ours, right, strict=True):
        assert relative_error(mine, true) <= tolerance


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 30), st.integers(1, 9), st.data())
def test_matches_the_plain_loop(tokens: int, num_experts: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, num_experts))
    assert_matches_reference(tokens, num_experts, top_k, torch.float32, 1e-5)


def test_bfloat16_is_close() -> None:
    assert_matches_reference(200, 6, 3, torch.bfloat16, 0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_the_plain_loop_through_the_grouped_kernel(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # Widths in multiples of 16 bytes; grouped_mm runs on the CPU too, so its layouts and contiguity are checked here.
    layer = ExpertMLP(width=8, hidden=16, num_experts=5, top_k=2, group=ExpertGroup(), seed=1).to(dtype)
    x = torch.randn(40, 8).to(dtype).requires_grad_()
    weights = [layer.w1, layer.b1, layer.w2, layer.b2]
    by_loop = output_and_gradients(layer, x, random_routing(40, 5, 2, idle=3), weights)
    monkeypatch.setattr(expert_runs, "_has_kernel", lambda *_: True)
    monkeypatch.setattr(torch, "mm", None)  # neither of the plain products is to be used
    monkeypatch.setattr(torch, "addmm", None)
    by_kernel = output_and_gradients(layer, x, random_routing(40, 5, 2, idle=3), weights)
    for mine, true in zip(by_kernel, by_loop, strict=True):
        assert relative_error(mine, true) <= (1e-5 if dtype == torch.float32 else 0.01)


def test_gradients_are_exact_with_an_idle_expert() -> None:
    layer = expert_layer(4, 2).double()
    routing = random_routing(6, 4, 2, idle=2)
    gates = routing.gates_SK.detach().double().requires_grad_()
    x = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, gates: Tensor, *_: Tensor) -> Tensor:
        out = layer(x, Routing(routing.probs_SE, gates, routing.experts_SK, routing.logits_SE))
        assert isinstance(out, Tensor)
        return out

    assert torch.autograd.gradcheck(run, (x, gates, layer.w1, layer.b1, layer.w2, layer.b2))


def test_idle_experts_get_zero_gradients_not_none() -> None:
    layer = expert_layer(5, 2)
    layer(torch.randn(0, 8), random_routing(0, 5, 2)).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_an_expanded_gradient_is_accepted() -> None:
    layer = expert_layer(4, 2)
    layer(torch.randn(10, 8), random_routing(10, 4, 2)).sum().backward()
    assert layer.b2.grad is not None
    assert layer.b2.grad.isfinite().all()


@pytest.mark.parametrize("size", [2, 3, 6])
def test_initial_experts_do_not_depend_on_the_group(size: int) -> None:
    whole = ExpertMLP(width=8, hidden=12, num_experts=6, top_k=2, group=ExpertGroup(), seed=5)
    shards = [
        ExpertMLP(width=8, hidden=12, num_experts=6, top_k=2, group=ExpertGroup(size=size, rank=rank), seed=5)
        for rank in range(size)
    ]
    for name, parameter in whole.named_parameters():
        assert torch.equal(torch.cat([shard.get_parameter(name) for shard in shards]), parameter), name
        assert all(getattr(shard.get_parameter(name), "is_expert", False) for shard in shards)


def test_experts_start_different_and_keep_the_variance() -> None:
    layer = ExpertMLP(width=64, hidden=96, num_experts=4, top_k=2, group=ExpertGroup(), seed=0)
    assert not torch.equal(layer.w1[0], layer.w1[1])
    assert (torch.randn(500, 64) @ layer.w1[0]).std().item() == pytest.approx(1, rel=0.05)
    assert F.mse_loss(torch.randn(500, 96) @ layer.w2[3], torch.zeros(500, 64)).item() == pytest.approx(1, rel=0.1)


def test_a_group_that_does_not_divide_the_experts_is_refused() -> None:
    with pytest.raises(UserError, match="6 experts cannot be sharded over 4 ranks"):
        ExpertMLP(width=8, hidden=12, num_experts=6, top_k=2, group=ExpertGroup(size=4), seed=5)
