"""Expert layers, with their routers, beside dense layers of equal active FLOPs.

Shape legend: P rows (image, task pairs), N tokens of a row, S = P * N tokens, D width, K chosen experts, d head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import ExpertAttention
from model.dispatch import ExpertGroup
from model.experts import ExpertMLP
from model.router import TaskRouter
from model.vit import DenseMLP
from trainer.bench.comparison import DTYPES, Comparison, Settings, compare, layer_case, token_batches

TASKS = 13
ROUNDS = 15


class RoutedExperts(nn.Module):
    """Task routers and the experts that they choose: the layer as a model holds it."""

    def __init__(self, router: TaskRouter, experts: ExpertMLP | ExpertAttention) -> None:
        super().__init__()
        self.router, self.experts = router, experts

    def forward(self, x_PND: Tensor) -> Tensor:
        """Return (P, N, D); the tasks share the rows evenly."""
        rows = len(x_PND)
        task_P = torch.arange(rows, device=x_PND.device) * TASKS // rows
        routing = self.router(x_PND, task_P)
        y: Tensor
        if isinstance(self.experts, ExpertAttention):
            y = self.experts(x_PND, routing)
        else:
            y = self.experts(x_PND.flatten(0, 1), routing)
        return y.view_as(x_PND)


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
    """Measure the expert MLP layer against the dense MLP."""
    config = settings.model
    tokens = settings.layer_rows * settings.tokens
    return [
        compare(
            "mlp",
            f"MLP layer: {tokens} tokens, D {config.width}, E {config.mlp_experts}, K {config.mlp_top_k}",
            dtype,
            settings,
            layer_case("dense MLP", dense_mlp(settings, dtype)),
            [layer_case("expert MLP", expert_mlp(settings, dtype))],
            token_batches(settings, dtype),
            rounds=ROUNDS,
        )
    ]


def compare_attention(settings: Settings, dtype: str) -> list[Comparison]:
    """Measure the expert attention layer against dense attention with as many heads as a token chooses."""
    config = settings.model
    width, head_width, top_k = config.width, config.attention_head_width, config.attention_top_k
    dense = MultiQueryAttention(width=width, heads=top_k, head_width=head_width)
    router = TaskRouter(width=width, num_experts=config.attention_experts, num_tasks=TASKS, top_k=top_k)
    experts = ExpertAttention(
        width=width, head_width=head_width, num_experts=config.attention_experts, top_k=top_k, group=ExpertGroup()
    )
    return [
        compare(
            "attention",
            f"attention layer: {settings.layer_rows} images of {settings.tokens} tokens, D {width}, "
            f"E {config.attention_experts}, K {top_k}, d_h {head_width}",
            dtype,
            settings,
            layer_case("dense attention", dense.to(DTYPES[dtype])),
            [layer_case("expert attention", RoutedExperts(router, experts).to(DTYPES[dtype]))],
            token_batches(settings, dtype),
            rounds=ROUNDS,
        )
    ]


def dense_mlp(settings: Settings, dtype: str) -> DenseMLP:
    """Return the dense MLP with the active FLOPs of the expert layer."""
    return DenseMLP(width=settings.model.width, hidden=settings.model.dense_hidden).to(DTYPES[dtype])


def expert_mlp(settings: Settings, dtype: str, *, num_experts: int | None = None) -> RoutedExperts:
    """Return the expert MLP layer with its routers; `num_experts`: E, where it is not the model's."""
    config = settings.model
    num_experts = num_experts or config.mlp_experts
    return RoutedExperts(
        TaskRouter(width=config.width, num_experts=num_experts, num_tasks=TASKS, top_k=config.mlp_top_k),
        ExpertMLP(
            width=config.width,
            hidden=config.expert_hidden,
            num_experts=num_experts,
            top_k=config.mlp_top_k,
            group=ExpertGroup(),
        ),
    ).to(DTYPES[dtype])
