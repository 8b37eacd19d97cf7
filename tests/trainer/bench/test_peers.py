"""The layers of others compute what ours do, so that their times compare; those that are absent say so."""

import sys

import pytest
import torch
from torch import Tensor

from configs.schema import ModelConfig
from model.attention import reference_expert_attention
from model.experts import reference_expert_mlp
from model.router import Routing
from trainer.bench.peers import DeepSpeedMLP, HuggingFaceExperts, LoopAttention, LoopMLP, mlp_peers
from trainer.bench.routed import attention_router, mlp_router

CONFIG = ModelConfig.model_validate(
    {
        "width": 16,
        "heads": 4,
        "attention_experts": 5,
        "attention_top_k": 3,
        "mlp_experts": 6,
        "mlp_top_k": 4,
    }
)
x_PND = torch.randn(13, 7, 16, generator=torch.Generator().manual_seed(0))
x_SD = x_PND.flatten(0, 1)


def mlp_routing(*, renormalize: bool = False) -> Routing:
    router = mlp_router(CONFIG)
    router.renormalize_gates = renormalize
    return router(x_PND, torch.arange(13))


def reference_of(layers: list[torch.nn.Sequential], routing: Routing) -> Tensor:
    up, down = [layer[0] for layer in layers], [layer[2] for layer in layers]
    stacked = [
        torch.stack([linear.weight.T for linear in up]),
        torch.stack([linear.bias for linear in up]),
        torch.stack([linear.weight.T for linear in down]),
        torch.stack([linear.bias for linear in down]),
    ]
    return reference_expert_mlp(x_SD, routing, *stacked)


def test_plain_loop_of_mlps() -> None:
    loop = LoopMLP(CONFIG)
    routing = mlp_routing()
    torch.testing.assert_close(loop(x_SD, routing), reference_of(list(loop.experts), routing))


def test_plain_loops_of_attention_heads() -> None:
    loop = LoopAttention(CONFIG)
    routing = attention_router(CONFIG)(x_PND, torch.arange(13))
    wq, wo = (torch.stack([linear.weight.T for linear in linears]) for linears in (loop.queries, loop.outputs))
    expected = reference_expert_attention(x_PND, routing, wq, wo, loop.kv.weight, loop.kv.bias)
    torch.testing.assert_close(loop(x_PND, routing), expected)


@pytest.mark.parametrize("capacity", [None, 6.0], ids=["no drops", "capacity for all"])
def test_deepspeed_without_drops_is_our_layer_with_gates_that_sum_to_one(capacity: float | None) -> None:
    layer = DeepSpeedMLP(CONFIG, capacity=capacity)
    gate, experts = layer.moe.deepspeed_moe.gate, layer.moe.deepspeed_moe.experts.deepspeed_experts
    for number, expert in enumerate(experts):  # it copies one expert; equal ones would hide where tokens went
        for parameter in expert.parameters():
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
    router = mlp_router(CONFIG)
    router.renormalize_gates = True
    with torch.no_grad():
        router.weight.copy_(gate.wg.weight.T.expand_as(router.weight))
    routing = router(x_PND, torch.arange(13))
    expected = reference_of(list(experts), routing).view_as(x_PND)
    torch.testing.assert_close(layer(x_PND), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_hugging_face_experts(implementation: str) -> None:
    pytest.importorskip("transformers")
    layer = HuggingFaceExperts(CONFIG, implementation)
    routing = mlp_routing()
    up, down = layer.experts.up_proj.transpose(1, 2), layer.experts.down_proj.transpose(1, 2)
    expected = reference_expert_mlp(x_SD, routing, up, torch.zeros(6, 16), down, torch.zeros(6, 16))
    torch.testing.assert_close(layer(x_SD, routing), expected, rtol=1e-4, atol=1e-4)


def test_a_library_that_is_not_installed_is_listed_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    notes = {peer.name: peer.note for peer in mlp_peers(CONFIG, torch.float32)}
    assert notes["Hugging Face, grouped"] == notes["Hugging Face, loop"] == "not installed"
    assert "DeepSpeed, no drops" in notes
