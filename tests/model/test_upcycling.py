"""Experts made from a dense layer: what they compute together is the dense layer's output."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.mod_squad import ModSquad
from model.upcycling import NOISE, upcycle_attention, upcycle_mlp
from model.vit import ExpertLayer
from tests.model.dense_vit import DEPTH, HEADS, PATCH, SIDE, WIDTH, attention, mlp, trained
from tests.model.models import TASKS, config

BLOCK = 1
ROWS = 2 * len(TASKS)
NARROW: dict[str, Any] = {"renormalize_gates": True, "head_width": 8}


def dense_block() -> tuple[nn.ModuleDict, dict[str, Tensor]]:
    """A block whose queries have no bias, as those of experts, and its weights by name."""
    block = trained().blocks[BLOCK]
    weights = {name: value.clone() for name, value in block.state_dict().items()}
    weights["attn.qkv.bias"][:WIDTH] = 0.0
    copy = nn.ModuleDict({"attn": nn.ModuleDict({"qkv": nn.Linear(WIDTH, 3 * WIDTH), "proj": nn.Linear(WIDTH, WIDTH)})})
    copy.load_state_dict({name: value for name, value in weights.items() if name.startswith("attn")})
    copy["mlp"], copy["norm"] = block["mlp"], block["norm1"]
    return copy.requires_grad_(False), weights


@torch.no_grad()
def upcycled(kind: str, experts: int, top_k: int, **changes: Any) -> tuple[ExpertLayer, Tensor, Tensor]:
    """Return an upcycled layer, its output for some tokens and all tasks, and the dense layer's."""
    dense, weights = dense_block()
    sizes = {"width": WIDTH, "depth": DEPTH, "heads": HEADS, "patch_size": PATCH, "placement": "every"}
    numbers = {f"{kind}_experts": experts, f"{kind}_top_k": top_k}
    model = ModSquad(config(**sizes, **numbers, **changes), TASKS, SIDE, seed=4)
    layer = getattr(model.blocks[BLOCK], kind)
    x = dense["norm"](torch.randn(ROWS, 40, WIDTH, generator=torch.Generator().manual_seed(3)))
    if kind == "mlp":
        upcycle_mlp(layer, dense["norm"], weights, seed=4)
        expected = mlp(dense["mlp"], x)
    else:
        upcycle_attention(layer, dense["norm"], weights, heads=HEADS, seed=4)
        expected = attention(dense["attn"], x)
    task = torch.arange(ROWS) % len(TASKS)
    y, *_ = layer(x, task, nn.functional.one_hot(task).T.float())
    return layer, y, expected


def error(y: Tensor, expected: Tensor) -> float:
    """Root mean square error over that of predicting the mean."""
    return float((y - expected).square().mean().sqrt() / expected.std())


@pytest.mark.parametrize(("experts", "top_k"), [(8, 4), (16, 2), (4, 4)])
def test_the_experts_of_a_token_are_the_whole_mlp(experts: int, top_k: int) -> None:
    _, y, expected = upcycled("mlp", experts, top_k, renormalize_gates=True)
    assert error(y, expected) < 3 * NOISE


@pytest.mark.parametrize(("experts", "top_k"), [(8, 4), (7, 2), (6, 4), (11, 4)])
@torch.no_grad()
def test_a_token_has_one_expert_for_each_slice(experts: int, top_k: int) -> None:
    layer, _, _ = upcycled("mlp", experts, top_k)
    slices = dense_block()[1]["mlp.fc1.weight"].view(top_k, -1, WIDTH).mT
    held = torch.cdist(layer.experts.get_parameter("w1").flatten(1), slices.flatten(1)).argmin(1)
    x = torch.randn(len(TASKS), 100, WIDTH, generator=torch.Generator().manual_seed(3))
    routing = layer.router(x, torch.arange(len(TASKS)))
    assert len(routing.experts_SK[:, 0].unique()) > 1
    complete = (held[routing.experts_SK].sort(1).values == torch.arange(top_k)).all(1)
    assert complete.float().mean() > 0.99  # where two groups are equal to rounding, a token may mix them


@pytest.mark.parametrize(("experts", "top_k"), [(8, 4), (6, 4), (16, 2), (4, 4)])
def test_raw_gates_are_made_up_for(experts: int, top_k: int) -> None:
    _, y, expected = upcycled("mlp", experts, top_k)
    assert float((y * expected).sum() / expected.square().sum()) == pytest.approx(1.0, abs=0.03)
    assert error(y, expected) < 0.3


# With as many dimensions as a token has, the shared keys and values lose nothing.
@pytest.mark.parametrize(("experts", "top_k"), [(8, 4), (16, 8), (5, 5)])
@pytest.mark.parametrize("head_width", [WIDTH, WIDTH + 4])
def test_the_experts_of_a_token_are_all_heads(experts: int, top_k: int, head_width: int) -> None:
    _, y, expected = upcycled("attention", experts, top_k, renormalize_gates=True, head_width=head_width)
    assert error(y, expected) < 5 * NOISE


def test_the_more_dimensions_the_nearer() -> None:
    errors = [
        error(*upcycled("attention", 8, 4, renormalize_gates=True, head_width=head_width)[1:])
        for head_width in (2, 4, 8, 16, WIDTH)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 1.0


def test_shared_keys_and_values_do_not_depend_on_the_basis_of_each_head(monkeypatch: pytest.MonkeyPatch) -> None:
    _, before, _ = upcycled("attention", 8, 4, **NARROW)
    dense, weights = dense_block()
    generator = torch.Generator().manual_seed(5)
    turns = torch.linalg.qr(torch.randn(HEADS, WIDTH // HEADS, WIDTH // HEADS, generator=generator)).Q
    qkv = weights["attn.qkv.weight"].view(3, HEADS, -1, WIDTH)
    weights["attn.qkv.weight"] = torch.einsum("hcb,nhbD->nhcD", turns, qkv).reshape(3 * WIDTH, WIDTH)
    bias = weights["attn.qkv.bias"].view(3, HEADS, -1)
    weights["attn.qkv.bias"] = torch.einsum("hcb,nhb->nhc", turns, bias).flatten()
    out = weights["attn.proj.weight"].view(WIDTH, HEADS, -1)
    weights["attn.proj.weight"] = torch.einsum("hcb,Dhb->Dhc", turns, out).reshape(WIDTH, WIDTH)
    monkeypatch.setattr("tests.model.test_upcycling.dense_block", lambda: (dense, weights))
    _, after, _ = upcycled("attention", 8, 4, **NARROW)
    assert error(after, before) < 0.01


def test_shared_keys_and_values_do_not_depend_on_the_scale_of_coordinates(monkeypatch: pytest.MonkeyPatch) -> None:
    _, before, expected = upcycled("attention", 8, 4, **NARROW)
    dense, weights = dense_block()
    scale = torch.rand(WIDTH, generator=torch.Generator().manual_seed(5)) * 4 + 0.2
    dense["norm"] = copy.deepcopy(dense["norm"])
    dense["norm"].weight *= scale
    dense["norm"].bias *= scale
    weights["attn.qkv.weight"] /= scale
    dense.load_state_dict(weights, strict=False)
    monkeypatch.setattr("tests.model.test_upcycling.dense_block", lambda: (dense, weights))
    _, after, same = upcycled("attention", 8, 4, **NARROW)
    torch.testing.assert_close(same, expected, rtol=1e-4, atol=1e-5)  # the source is the same function
    assert error(after, before) < 0.1


def test_ranks_agree_on_shared_keys_whatever_signs_their_eigenvectors_have(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _, _ = upcycled("attention", 8, 4, **NARROW)
    eigh = torch.linalg.eigh

    def elsewhere(matrix: Tensor) -> SimpleNamespace:
        vectors = eigh(matrix).eigenvectors
        vectors[:, ::3] *= -1
        return SimpleNamespace(eigenvectors=vectors)

    monkeypatch.setattr(torch.linalg, "eigh", elsewhere)
    other, _, _ = upcycled("attention", 8, 4, **NARROW)
    torch.testing.assert_close(other.state_dict(), layer.state_dict())


@pytest.mark.parametrize(("kind", "name"), [("mlp", "w1"), ("mlp", "w2"), ("attention", "wq"), ("attention", "wo")])
def test_noise_tells_experts_with_the_same_part_from_each_other(kind: str, name: str) -> None:
    layer, _, _ = upcycled(kind, 8, 4)
    first, second = layer.experts.get_parameter(name).detach()[[1, 5]]
    difference = float((first - second).square().mean().sqrt() / first.square().mean().sqrt())
    assert difference == pytest.approx(NOISE * 2**0.5, rel=0.2)


def test_every_expert_of_a_group_learns_a_router_of_its_own() -> None:
    layer, _, _ = upcycled("mlp", 8, 4)
    x = torch.randn(2, 10, WIDTH, generator=torch.Generator().manual_seed(6))
    task = torch.tensor([0, 1])
    layer(x, task, nn.functional.one_hot(task, len(TASKS)).T.float())[0].square().sum().backward()
    columns = layer.router.weight.grad[0].T
    assert len(columns.round(decimals=6).unique(dim=0)) == 8
