import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model import expert_runs
from model.attention import DenseAttention, ExpertAttention, reference_expert_attention
from model.dispatch import ExpertGroup
from model.router import Routing
from tests.model.routings import random_routing, relative_error


def attention_layer(num_experts: int, top_k: int, head_width: int = 6) -> ExpertAttention:
    layer = ExpertAttention(
        width=8, head_width=head_width, num_experts=num_experts, top_k=top_k, group=ExpertGroup(), seed=3
    )
    with torch.no_grad():  # wide enough that the softmax is not nearly uniform
        layer.kv.weight.mul_(20)
        layer.kv.bias.normal_(generator=torch.Generator().manual_seed(0))
    return layer


def parameters(layer: ExpertAttention) -> list[Tensor]:
    return [layer.wq, layer.wo, layer.kv.weight, layer.kv.bias]


def assert_matches_reference(
    rows: int, tokens: int, num_experts: int, top_k: int, dtype: torch.dtype, tolerance: float
) -> None:
    layer = attention_layer(num_experts, top_k).to(dtype)
    x = torch.randn(rows, tokens, 8, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    routing, again = (random_routing(rows * tokens, num_experts, top_k) for _ in range(2))
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, *parameters(layer))]

    ours = layer(x, routing)
    right = reference_expert_attention(exact[0], again, *exact[1:])
    assert ours.dtype == dtype
    assert ours.shape == x.shape
    assert relative_error(ours, right) <= tolerance

    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    gradients = torch.autograd.grad(ours, [x, routing.logits_SE, *parameters(layer)], upstream.to(dtype))
    exact_gradients = torch.autograd.grad(right, [exact[0], again.logits_SE, *exact[1:]], upstream.double())
    for mine, true in zip(gradients, exact_gradients, strict=True):
        assert relative_error(mine, true) <= tolerance


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 3), st.integers(1, 7), st.integers(1, 6), st.data())
def test_matches_the_definition(rows: int, tokens: int, num_experts: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, num_experts))
    assert_matches_reference(rows, tokens, num_experts, top_k, torch.float32, 1e-5)


def test_bfloat16_is_close() -> None:
    assert_matches_reference(4, 20, 5, 2, torch.bfloat16, 0.02)


def test_gradients_are_exact_with_an_idle_expert() -> None:
    layer = attention_layer(4, 2).double()
    routing = random_routing(6, 4, 2, idle=1)
    gates = routing.gates_SK.detach().double().requires_grad_()
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, gates: Tensor, *_: Tensor) -> Tensor:
        out = layer(x, Routing(routing.probs_SE, gates, routing.experts_SK, routing.logits_SE))
        assert isinstance(out, Tensor)
        return out

    assert torch.autograd.gradcheck(run, (x, gates, *parameters(layer)))


def test_matches_the_loop_through_the_grouped_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = attention_layer(5, 2, head_width=8)
    x = torch.randn(2, 6, 8, requires_grad=True)
    results = []
    for _ in range(2):
        y = layer(x, random_routing(12, 5, 2, idle=3))
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *parameters(layer)])])
        monkeypatch.setattr(expert_runs, "_has_kernel", lambda *_: True)
        monkeypatch.setattr(torch, "mm", None)  # the loop is not to be used
    for by_loop, by_kernel in zip(*results, strict=True):
        assert relative_error(by_kernel, by_loop) <= 1e-5


def test_no_rows_give_zero_gradients_not_none() -> None:
    layer = attention_layer(5, 2)
    layer(torch.randn(0, 4, 8), random_routing(0, 5, 2)).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_rows_do_not_see_each_other() -> None:
    layer = attention_layer(4, 2)
    x = torch.randn(2, 3, 8)
    routing = random_routing(6, 4, 2)
    changed = torch.stack([x[0], torch.randn(3, 8)])
    torch.testing.assert_close(layer(x, routing)[0], layer(changed, routing)[0])


@pytest.mark.parametrize("size", [2, 3])
def test_initial_experts_do_not_depend_on_the_group(size: int) -> None:
    def build(group: ExpertGroup) -> ExpertAttention:
        return ExpertAttention(width=8, head_width=4, num_experts=6, top_k=2, group=group, seed=5)

    whole, shards = build(ExpertGroup()), [build(ExpertGroup(size=size, rank=rank)) for rank in range(size)]
    for name in ("wq", "wo"):
        assert torch.equal(torch.cat([shard.get_parameter(name) for shard in shards]), whole.get_parameter(name))
    assert all(torch.equal(shard.kv.weight, whole.kv.weight) for shard in shards)
    assert [name for name, p in whole.named_parameters() if getattr(p, "is_expert", False)] == ["wq", "wo"]


def test_dense_attention_is_multi_head_attention() -> None:
    ours = DenseAttention(width=8, heads=2, head_width=4).double()
    theirs = torch.nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv.weight)
        theirs.in_proj_bias.copy_(ours.qkv.bias.normal_())
        theirs.out_proj.load_state_dict(ours.out.state_dict())
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x, x, x, need_weights=False)[0])
    assert DenseAttention(width=8, heads=3, head_width=5)(torch.randn(0, 4, 8)).shape == (0, 4, 8)
