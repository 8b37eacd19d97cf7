"""A small model with sharded experts, smooth in its parameters, so that any layout can be compared with plain torch."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from fairscale.nn.checkpoint import checkpoint_wrapper
from torch import Tensor, nn

from configs.schema import RunConfig
from model.dispatch import ExpertGroup

EXPERTS, WIDTH, INPUTS = 4, 6, 3


@dataclass(frozen=True)
class Extra:
    """Something beside the loss that DeepSpeed does not look into."""

    prediction: Tensor


class ToyExperts(nn.Module):
    """A mixture of all experts, each weighted by a softmax gate."""

    def __init__(self, group: ExpertGroup) -> None:
        super().__init__()
        self.group = group
        self.router = nn.Parameter(torch.randn(WIDTH, EXPERTS))
        whole = torch.randn(EXPERTS, WIDTH, WIDTH), torch.randn(EXPERTS, WIDTH)
        self.weight, self.bias = (nn.Parameter(tensor.chunk(group.size)[group.rank].clone()) for tensor in whole)
        self.weight.is_expert = self.bias.is_expert = True  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        gates = (x @ self.router).softmax(-1)
        tokens, gates = (_Gather.apply(tensor, self.group) for tensor in (x, gates))
        own = slice(self.group.rank * len(self.weight), (self.group.rank + 1) * len(self.weight))
        outputs = torch.einsum("nd,edf->enf", tokens, self.weight) + self.bias[:, None]
        mixed: Tensor = _ScatterSum.apply(torch.einsum("enf,ne->nf", outputs.tanh(), gates[:, own]), self.group)
        return x + mixed


class ToyModel(nn.Module):
    """Linear layers around the experts; returns (mean squared error, Extra)."""

    def __init__(self, group: ExpertGroup, *, recompute: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(INPUTS, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        experts = ToyExperts(group)
        self.experts = checkpoint_wrapper(experts) if recompute else experts
        self.last = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Extra]:
        hidden = self.norm(self.first(x.to(self.first.weight.dtype)))
        prediction = self.last(self.experts(hidden)).float()
        return (prediction - y).square().mean(), Extra(prediction)


def toy_batches(steps: int, samples: int) -> list[tuple[Tensor, Tensor]]:
    """Global batches, the same in every process."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(samples, INPUTS), (samples, 2)]
    return [tuple(torch.randn(shape, generator=generator) for shape in shapes) for _ in range(steps)]  # type: ignore[misc]


def toy_config(**parts: dict[str, Any]) -> RunConfig:
    """A configuration in which AdamW's epsilon keeps rounding of tiny gradients from becoming whole steps."""
    return RunConfig.model_validate({"optim": {"eps": 1e-3, "clip_norm": 0.0, **parts.pop("optim", {})}, **parts})


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ExpertGroup) -> Tensor:
        ctx.group = group
        return _gather(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _scatter_sum(gradient, ctx.group), None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ExpertGroup) -> Tensor:
        ctx.group = group
        return _scatter_sum(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _gather(gradient, ctx.group), None


def _gather(x: Tensor, group: ExpertGroup) -> Tensor:
    if group.size == 1:
        return x.clone()
    parts = [torch.empty_like(x) for _ in range(group.size)]
    dist.all_gather(parts, x.contiguous(), group=group.process_group)
    return torch.cat(parts)


def _scatter_sum(x: Tensor, group: ExpertGroup) -> Tensor:
    if group.size == 1:
        return x.clone()
    x = x.clone()
    dist.all_reduce(x, group=group.process_group)
    return x.chunk(group.size)[group.rank].clone()
