"""The order of work inside an expert layer: (row, expert) assignments sorted by expert, and the way back to rows.

Everything here is a gather, forward and backward: no atomics, no host synchronisation, repeatable on every device.

Shape legend: M rows, A assignments of rows to experts, row-major; E experts, F any width.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class ExpertOrder(NamedTuple):
    """A assignments of M rows to E experts, sorted by expert; rows keep their order within an expert.

    Attributes:
        order_A: (A,) int64, row-major position of each sorted assignment.
        place_A: (A,) int64, its inverse: sorted place of each row-major assignment.
        row_A: (A,) int64, row of each sorted assignment.
        expert_A: (A,) int64, expert of each sorted assignment.
        bounds: (M + 1,) int64, where each row's run of row-major assignments begins and the last one ends.
        ends_E: (E,) int32, where each expert's run of sorted assignments ends.
    """

    order_A: Tensor
    place_A: Tensor
    row_A: Tensor
    expert_A: Tensor
    bounds: Tensor
    ends_E: Tensor


def expert_order(expert_A: Tensor, row_A: Tensor, rows: int, num_experts: int) -> ExpertOrder:
    """Sort row-major assignments by expert: no host synchronisation, repeatable on every device.

    Args:
        expert_A: (A,) int64 expert of each assignment.
        row_A: (A,) int64 its row, ascending.
        rows: M.
        num_experts: E.
    """
    device = expert_A.device
    sorted_A, order_A = expert_A.sort(stable=True)
    return ExpertOrder(
        order_A=order_A,
        place_A=inverse_of(order_A),
        row_A=row_A[order_A],
        expert_A=sorted_A,
        bounds=torch.searchsorted(row_A, torch.arange(rows + 1, device=device)),
        ends_E=torch.searchsorted(sorted_A, torch.arange(num_experts, device=device), right=True).int(),
    )


def sum_runs(rows_AF: Tensor, place_A: Tensor, bounds: Tensor) -> Tensor:
    """Return (M, F): y[m] = sum of rows[place[i]] for i in [bounds[m], bounds[m + 1]).

    A gather, not a scatter: no atomics, and bfloat16 is accumulated in float32.
    """
    return F.embedding_bag(place_A, rows_AF, bounds, mode="sum", include_last_offset=True)


def permute_rows(rows_AF: Tensor, order_A: Tensor, inverse_A: Tensor) -> Tensor:
    """Return rows[order], where `inverse` undoes `order`; the gradient is a gather too."""
    permuted: Tensor = _Permute.apply(rows_AF, order_A, inverse_A)  # type: ignore[no-untyped-call]
    return permuted


def inverse_of(order_A: Tensor) -> Tensor:
    """Return the permutation that undoes `order_A`."""
    return torch.empty_like(order_A).scatter_(0, order_A, torch.arange(len(order_A), device=order_A.device))


class _Permute(torch.autograd.Function):
    """rows[order]."""

    @staticmethod
    def forward(ctx: Any, rows_AF: Tensor, order_A: Tensor, inverse_A: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_A)
        return rows_AF.index_select(0, order_A)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_AF: Tensor) -> tuple[Tensor, None, None]:
        (inverse_A,) = ctx.saved_tensors
        return grad_AF.index_select(0, inverse_A), None, None
