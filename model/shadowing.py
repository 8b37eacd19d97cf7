"""The weights of shadowed experts, from their owners to all ranks of the expert group, and their gradients back.

One exchange forward, one backward, of all parameters of an expert together. See `model.expert_layout`.

Shape legend: L experts owned by this rank, s of them lent, V shadowed experts of all R ranks; F numbers of an expert.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.dispatch import ExpertGroup, Splits, all_to_all
from model.expert_layout import ExpertLayout


def present_weights(weights: Sequence[Tensor], layout: ExpertLayout, group: ExpertGroup) -> Sequence[Tensor]:
    """Return the stacked weights of the experts that this rank computes with. A collective call, if any is shadowed.

    Args:
        weights: each (L, ...), stacked over the experts that this rank owns.
        layout: of the layer.
        group: the ranks of the layout.

    Returns:
        each (L + V, ...), in the order of `layout`; `weights` itself where no expert is shadowed.
    """
    if not layout.shadowed:
        return weights
    found: tuple[Tensor, ...] = _Shadow.apply(layout, group, *weights)  # type: ignore[no-untyped-call]
    return found


def shadow_bytes(layout: ExpertLayout, expert_numbers: int, item_bytes: int) -> int:
    """Return the bytes that one rank sends: its lent weights to all others, the gradients of the others' to them.

    Args:
        layout: of the layer.
        expert_numbers: parameters of one expert.
        item_bytes: bytes of a number.
    """
    if not layout.shadowed:
        return 0
    lent = layout.lent[layout.rank]
    return (lent * (layout.ranks - 1) + layout.shadowed - lent) * expert_numbers * item_bytes


class _Shadow(torch.autograd.Function):
    """Own weights, then those that all ranks lend. The slot of a lent expert among the own ones sees no token."""

    @staticmethod
    def forward(ctx: Any, layout: ExpertLayout, group: ExpertGroup, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.layout, ctx.group = layout, group
        lent_sF = _joined([_rows(weight, layout.lent_numbers) for weight in weights])
        ctx.splits = Splits([len(lent_sF)] * layout.ranks, list(layout.lent), group)
        shadowed_VF = all_to_all(lent_sF.repeat(layout.ranks, 1), ctx.splits)
        parts = _parted(shadowed_VF, weights)
        return tuple(torch.cat(pair) for pair in zip(weights, parts, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layout: ExpertLayout = ctx.layout
        local = len(layout.owned)
        own = [grad[:local].clone() for grad in grads]
        from_ranks = all_to_all(_joined([grad[local:] for grad in grads]), ctx.splits.reversed())
        # Summed in float32, whatever the precision, and always in the order of the ranks.
        lent_sF = from_ranks.view(layout.ranks, -1, from_ranks.shape[1]).sum(
            0, dtype=torch.promote_types(from_ranks.dtype, torch.float32)
        )
        for grad, part in zip(own, _parted(lent_sF.to(from_ranks.dtype), own), strict=True):
            for number, row in zip(layout.lent_numbers, part, strict=True):
                grad[number] = row
        return None, None, *own


def _rows(weight: Tensor, numbers: Sequence[int]) -> Tensor:
    """Return weight[numbers]; slices, as an index would have to be copied to the device."""
    return torch.cat([weight[:0], *(weight[number : number + 1] for number in numbers)])


def _joined(stacked: Sequence[Tensor]) -> Tensor:
    return torch.cat([weight.flatten(1) for weight in stacked], dim=1)


def _parted(joined_VF: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Undo `_joined`, for tensors whose shapes but the first dimension are those of `like`."""
    parts = torch.split(joined_VF, [weight[0].numel() for weight in like], dim=1)
    return [part.reshape(len(joined_VF), *weight.shape[1:]) for part, weight in zip(parts, like, strict=True)]
