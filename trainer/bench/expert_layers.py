"""Expert layers, with their routers, beside dense layers of equal active FLOPs and the layers of others.

Shape legend: P rows (image, task pairs), N tokens of a row, D width, d head width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import ExpertAttention
from model.dispatch import ExpertGroup
from model.experts import ExpertMLP
from model.router import Routing
from model.vit import DenseMLP
from trainer.bench.comparison import DTYPES, Batch, Case, Comparison, Settings, compare, layer_case, token_batches
from trainer.bench.peers import attention_peers, mlp_peers
from trainer.bench.routed import Routed, attention_router, mlp_router

ROUNDS = 9


class MultiQueryAttention(nn.Module):
    """K dense heads that share keys and values: the active FLOPs of an expert attention layer, less its router."""

    def __init__(self, *, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, heads * head_width, bias=False)
        self.kv = nn.Linear(width, 2 * head_width)
        self.out = nn.Linear(heads * head_width, width, bias=False)

    def forward(self, x_PND: Tensor) -> Tensor:
        """Return (P, N, D)."""
        rows, tokens, _ = x_PND.shape
        key_PNd, value_PNd = self.kv(x_PND).chunk(2, dim=-1)
        # Heads fold into the query length, as in the expert layer: the fastest way that torch has.
        q = self.query(x_PND).view(rows, 1, -1, key_PNd.shape[-1])
        y = F.scaled_dot_product_attention(q, key_PNd.unsqueeze(1), value_PNd.unsqueeze(1))
        out_PND: Tensor = self.out(y.reshape(rows, tokens, -1))
        return out_PND


def compare_mlp(settings: Settings, dtype: str) -> list[Comparison]:
    """Measure the expert MLP layer and its peers against the dense MLP."""
    config = settings.model
    layer, alone = (expert_mlp(settings, dtype, seed=seed) for seed in range(2))
    return [
        compare(
            "mlp",
            f"MLP layer: {settings.layer_rows * settings.tokens} tokens, D {config.width}, "
            f"E {config.mlp_experts}, K {config.mlp_top_k}",
            dtype,
            settings,
            layer_case("dense MLP", dense_mlp(settings, dtype)),
            [*_cases("expert MLP", layer, alone), *mlp_peers(config, DTYPES[dtype])],
            _with_routing(token_batches(settings, dtype), alone),
            rounds=ROUNDS,
        )
    ]


def compare_attention(settings: Settings, dtype: str) -> list[Comparison]:
    """Measure the expert attention layer against dense attention with as many heads as a token chooses."""
    config = settings.model
    layer, alone = (expert_attention(settings, dtype, seed=seed) for seed in range(2))
    dense = MultiQueryAttention(
        width=config.width, heads=config.attention_top_k, head_width=config.attention_head_width
    )
    return [
        compare(
            "attention",
            f"attention layer: {settings.layer_rows} images of {settings.tokens} tokens, D {config.width}, "
            f"E {config.attention_experts}, K {config.attention_top_k}, d_h {config.attention_head_width}",
            dtype,
            settings,
            layer_case("dense attention", dense.to(DTYPES[dtype])),
            [*_cases("expert attention", layer, alone), *attention_peers(config, DTYPES[dtype])],
            _with_routing(token_batches(settings, dtype), alone),
            rounds=ROUNDS,
        )
    ]


def dense_mlp(settings: Settings, dtype: str) -> DenseMLP:
    """Return the dense MLP with the active FLOPs of the expert layer."""
    return DenseMLP(width=settings.model.width, hidden=settings.model.dense_hidden).to(DTYPES[dtype])


def expert_mlp(settings: Settings, dtype: str, *, num_experts: int | None = None, seed: int = 0) -> Routed:
    """Return the expert MLP layer with its routers, which `seed` decides; `num_experts`: E, where not the model's."""
    config = settings.model
    experts = ExpertMLP(
        width=config.width,
        hidden=config.expert_hidden,
        num_experts=num_experts or config.mlp_experts,
        top_k=config.mlp_top_k,
        group=ExpertGroup(),
    )
    return Routed(mlp_router(config, num_experts, seed=seed), experts, flat=True).to(DTYPES[dtype])


def expert_attention(settings: Settings, dtype: str, *, seed: int = 0) -> Routed:
    """Return the expert attention layer with its routers, which `seed` decides."""
    config = settings.model
    experts = ExpertAttention(
        width=config.width,
        head_width=config.attention_head_width,
        num_experts=config.attention_experts,
        top_k=config.attention_top_k,
        group=ExpertGroup(),
    )
    return Routed(attention_router(config, seed=seed), experts, flat=False).to(DTYPES[dtype])


@dataclass(frozen=True, kw_only=True)
class _RoutedBatch(Batch):
    """A batch whose routing is known before the clock starts."""

    routing: Routing


def _with_routing(draw: Callable[[int], Batch], layer: Routed) -> Callable[[int], _RoutedBatch]:
    def routed(number: int) -> _RoutedBatch:
        batch = draw(number)
        with torch.no_grad():
            routing = layer.route(batch.x)
        routing.gates_SK.requires_grad_()
        return _RoutedBatch(x=batch.x, grad=batch.grad, routing=routing)

    return routed


def _cases(name: str, layer: Routed, alone: Routed) -> list[Case]:
    """Return the cases of our layer.

    In bf16, oneDNN compiles a kernel for every number of rows that it has not seen. `alone` has routers of its own, so
    that this costs it as much as `layer`; only the second row runs on loads seen before.
    """

    def forward(batch: Batch) -> tuple[Tensor, Tensor | None]:
        assert isinstance(batch, _RoutedBatch)
        return alone.run_experts(batch.x, batch.routing), batch.grad

    return [
        layer_case(name, layer),
        layer_case("the same once more", layer, note="every expert's load has occurred before"),
        Case(name="experts alone", module=alone, passes=[forward], note="without router"),
    ]
