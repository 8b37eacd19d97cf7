"""Experts behind task routers: a layer as a model holds it.

Shape legend: P rows (image, task pairs), N tokens of a row, S = P * N tokens, D width.
"""

import torch
from torch import Tensor, nn

from configs.schema import ModelConfig
from model.router import Routing, TaskRouter

TASKS = 13


class Routed(nn.Module):
    """Task routers and the experts that they choose among.

    Args:
        router: chooses.
        experts: called with tokens and their `Routing`; the tokens are (P, N, D), or (S, D) where `flat`.
        flat: see `experts`.
    """

    def __init__(self, router: TaskRouter, experts: nn.Module, *, flat: bool) -> None:
        super().__init__()
        self.router, self.experts, self._flat = router, experts, flat

    def forward(self, x_PND: Tensor) -> Tensor:
        """Return (P, N, D)."""
        return self.run_experts(x_PND, self.route(x_PND))

    def route(self, x_PND: Tensor) -> Routing:
        """Return the choices; the tasks share the rows evenly."""
        rows = len(x_PND)
        routing: Routing = self.router(x_PND, torch.arange(rows, device=x_PND.device) * TASKS // rows)
        return routing

    def run_experts(self, x_PND: Tensor, routing: Routing) -> Tensor:
        """Return (P, N, D) for choices made before."""
        y: Tensor = self.experts(x_PND.flatten(0, 1) if self._flat else x_PND, routing)
        return y.view_as(x_PND)


def mlp_router(config: ModelConfig, num_experts: int | None = None, *, seed: int = 0) -> TaskRouter:
    """Return the routers of an expert MLP layer; `num_experts`: E, where it is not the model's."""
    num_experts = num_experts or config.mlp_experts
    return _router(config, num_experts, config.mlp_top_k, seed)


def attention_router(config: ModelConfig, *, seed: int = 0) -> TaskRouter:
    """Return the routers of an expert attention layer."""
    return _router(config, config.attention_experts, config.attention_top_k, seed)


def _router(config: ModelConfig, num_experts: int, top_k: int, seed: int) -> TaskRouter:
    return TaskRouter(width=config.width, num_experts=num_experts, num_tasks=TASKS, top_k=top_k, seed=seed)
