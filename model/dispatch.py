"""Brings tokens to their experts and back: within one process, or over the ranks that share an expert layer.

Dropless. Over ranks, a token travels once to each rank that holds some of its experts, with the list of them and their
gates, and comes back from there as one combined row. Every rank takes part in the same collectives in the same order,
however few tokens or experts it has; all gradients are exact.

Shape legend: S tokens of this rank, K experts chosen per token, C = S * K choices, token-major; M rows present at this
rank's experts, A (row, expert) assignments among them, row-major; D width, E experts, F any width.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.exchange_plan import plan_exchange
from model.expert_layout import ExpertLayout
from model.expert_order import ExpertOrder, expert_order, permute_rows, sum_runs

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of a number -> the integer of that size


@dataclass
class TrafficMeter:
    """What token exchange has moved between this rank and the others, forward and backward, since the start.

    Attributes:
        sent_bytes, received_bytes: without what stayed on this rank.
        exchanges: all-to-all collectives.
    """

    sent_bytes: int = 0
    received_bytes: int = 0
    exchanges: int = 0


@dataclass(frozen=True)
class ExpertGroup:
    """The ranks over which every expert layer is sharded.

    Attributes:
        size: number of ranks; 1: nothing is ever sent.
        rank: this process' rank within the group.
        process_group: the group; None: the default group, where `size` > 1.
        meter: counts the bytes of all layers built with this group.
    """

    size: int = 1
    rank: int = 0
    process_group: dist.ProcessGroup | None = None
    meter: TrafficMeter = field(default_factory=TrafficMeter, compare=False)

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.size

    def layout(self, num_experts: int) -> ExpertLayout:
        """Return this rank's view of a layer in order; raises UserError where `size` does not divide the experts."""
        return ExpertLayout(num_experts, self.size, self.rank)


class Exchange(ABC):
    """One layer call's way between tokens at home and the experts' rows.

    Attributes:
        order: the assignments that this rank's experts serve; after `dispatch`.
    """

    order: ExpertOrder

    @abstractmethod
    def dispatch(self, x_SD: Tensor, gates_SK: Tensor) -> tuple[Tensor, Tensor]:
        """Return (M, D) rows of the tokens that chose this rank's experts, and (A,) their gates, in x's dtype."""

    @abstractmethod
    def combine(self, y_MD: Tensor) -> Tensor:
        """Return (S, D): the sum, per token at home, of its rows from all ranks."""

    @abstractmethod
    def choices_home(self, q_AF: Tensor) -> Tensor:
        """Bring one row per assignment home: (C, F)."""

    @abstractmethod
    def choices_out(self, a_CF: Tensor) -> Tensor:
        """Send one row per choice to its expert: (A, F)."""


def make_exchange(experts_SK: Tensor, layout: ExpertLayout, group: ExpertGroup) -> Exchange:
    """Return the exchange for one layer call.

    Args:
        experts_SK: (S, K) int64, distinct experts per token.
        layout: where this rank finds them.
        group: the ranks of the layout; all of them must call this, in the same order.
    """
    if group.size == 1:
        return LocalExchange(experts_SK, layout.num_experts)
    return RankExchange(experts_SK, layout, group)


class LocalExchange(Exchange):
    """All experts are here: rows are the tokens, assignments are the choices."""

    def __init__(self, experts_SK: Tensor, num_experts: int) -> None:
        tokens, top_k = experts_SK.shape
        token_C = torch.arange(tokens, device=experts_SK.device).repeat_interleave(top_k)
        self.order = expert_order(experts_SK.flatten(), token_C, tokens, num_experts)

    def dispatch(self, x_SD: Tensor, gates_SK: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens and gates as they are."""
        return x_SD, gates_SK.flatten().to(x_SD.dtype)

    def combine(self, y_MD: Tensor) -> Tensor:
        """Return the rows as they are."""
        return y_MD

    def choices_home(self, q_AF: Tensor) -> Tensor:
        """Return the rows as they are."""
        return q_AF

    def choices_out(self, a_CF: Tensor) -> Tensor:
        """Return the rows as they are."""
        return a_CF


class RankExchange(Exchange):
    """Experts are sharded over a group of ranks.

    Three collectives forward and two backward: how many rows and choices go where; the rows, with the gates and codes
    of their experts in their last columns; the rows home; and the gradients of both the other way. Attention adds one
    in each direction for queries and for head outputs. The host waits for the device once, to learn the counts.
    """

    def __init__(self, experts_SK: Tensor, layout: ExpertLayout, group: ExpertGroup) -> None:
        tokens, top_k = experts_SK.shape
        self._present = layout.present
        self._plan = plan = plan_exchange(experts_SK, layout)
        ones = [1] * group.size
        received = all_to_all(plan.counts_R2, Splits(ones, ones, group))
        rows_sent, choices_sent, rows_received, choices_received = torch.cat([plan.counts_R2, received], 1).T.tolist()
        self._rows = Splits(rows_sent, rows_received, group)
        self._choices = Splits(choices_sent, choices_received, group)

        token_C = plan.leave_C // top_k
        # Token of each row that leaves; a row's choices all write the same.
        self._token_M = token_C.new_empty(sum(rows_sent)).scatter_(0, plan.row_C, token_C)
        home_M, self._place_M = self._token_M.sort(stable=True)
        self._bounds = torch.searchsorted(home_M, torch.arange(tokens + 1, device=home_M.device))

    def dispatch(self, x_SD: Tensor, gates_SK: Tensor) -> tuple[Tensor, Tensor]:
        """Send each token once to each rank that holds some of its experts; sets `order`."""
        plan, shape = self._plan, (len(self._token_M), self._plan.slots)
        x_MD: Tensor = _Spread.apply(x_SD, self._token_M, self._place_M, self._bounds)  # type: ignore[no-untyped-call]
        leaving_C = permute_rows(gates_SK.flatten().to(x_SD.dtype), plan.leave_C, plan.arrive_C)
        gates = x_SD.new_zeros(shape).flatten().scatter(0, plan.cell_C, leaving_C).view(shape)
        codes = plan.cell_C.new_zeros(shape).flatten().scatter_(0, plan.cell_C, plan.expert_C + 1).view(shape)
        rows_MD, gates, codes = _SendRows.apply(x_MD, gates, codes, self._rows)  # type: ignore[no-untyped-call]

        code_A, cell_A = _used(codes.flatten(), sum(self._choices.received))
        self.order = expert_order(code_A - 1, cell_A // plan.slots, len(rows_MD), self._present)
        return rows_MD, gates.flatten().gather(0, cell_A)

    def combine(self, y_MD: Tensor) -> Tensor:
        """Send the rows home and sum them there."""
        back_MD: Tensor = _AllToAll.apply(y_MD, self._rows.reversed())  # type: ignore[no-untyped-call]
        y_SD: Tensor = _Collect.apply(back_MD, self._token_M, self._place_M, self._bounds)  # type: ignore[no-untyped-call]
        return y_SD

    def choices_home(self, q_AF: Tensor) -> Tensor:
        """Send one row per assignment home, and put them in token-major order."""
        q_CF: Tensor = _AllToAll.apply(q_AF, self._choices.reversed())  # type: ignore[no-untyped-call]
        return permute_rows(q_CF, self._plan.arrive_C, self._plan.leave_C)

    def choices_out(self, a_CF: Tensor) -> Tensor:
        """Send one row per choice to the rank of its expert."""
        a_CF = permute_rows(a_CF, self._plan.leave_C, self._plan.arrive_C)
        a_AF: Tensor = _AllToAll.apply(a_CF, self._choices)  # type: ignore[no-untyped-call]
        return a_AF


def sum_over_ranks(x: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
    """Return the sum of `x` over the ranks of a group; its gradient is the sum of the ranks' gradients.

    Right where every rank adds the same function of the sum to its loss and gradients are then averaged over ranks.
    None stands for the default group; without torch.distributed the result is `x`.
    """
    if not dist.is_initialized() or dist.get_world_size(process_group) == 1:
        return x
    total: Tensor = _SumOverRanks.apply(x, process_group)  # type: ignore[no-untyped-call]
    return total


@dataclass(frozen=True)
class Splits:
    """How many rows go to, and come from, each rank of the group."""

    sent: list[int]
    received: list[int]
    group: ExpertGroup

    def reversed(self) -> "Splits":
        """Return the splits of the way back."""
        return Splits(self.received, self.sent, self.group)


def _used(codes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` codes that are not 0, and where they are; the host does not wait to count them."""
    used = codes > 0
    place = torch.where(used, used.cumsum(0) - 1, count)  # what is not used lands behind the end
    cells = codes.new_empty(count + 1).scatter_(0, place, torch.arange(len(codes), device=codes.device))
    return codes[cells[:count]], cells[:count]


def all_to_all(x: Tensor, splits: Splits) -> Tensor:
    """Return (sum of `splits.received`, ...): rows to their ranks, without gradient; counted by the group's meter."""
    received = x.new_empty(sum(splits.received), *x.shape[1:])
    group = splits.group
    dist.all_to_all_single(received, x.contiguous(), splits.received, splits.sent, group=group.process_group)
    row_bytes = x.element_size() * x.shape[1:].numel()
    group.meter.exchanges += 1
    group.meter.sent_bytes += (sum(splits.sent) - splits.sent[group.rank]) * row_bytes
    group.meter.received_bytes += (sum(splits.received) - splits.received[group.rank]) * row_bytes
    return received


class _AllToAll(torch.autograd.Function):
    """Rows to their ranks; gradients the same way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, splits: Splits) -> Tensor:
        ctx.splits = splits
        return all_to_all(x, splits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_to_all(grad, ctx.splits.reversed()), None


class _SendRows(torch.autograd.Function):
    """Rows, gates and codes to their ranks in one exchange; codes travel as the bits of the rows' number type."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, gates: Tensor, codes: Tensor, splits: Splits) -> tuple[Tensor, Tensor, Tensor]:
        ctx.splits, ctx.columns = splits, [x_MD.shape[1], gates.shape[1]]
        bits = _INTEGERS[x_MD.element_size()]
        received = all_to_all(torch.cat([x_MD, gates, codes.to(bits).view(x_MD.dtype)], dim=1), splits)
        rows_MD, gates, codes = torch.split(received, [*ctx.columns, codes.shape[1]], dim=1)
        codes = codes.contiguous().view(bits).long()
        ctx.mark_non_differentiable(codes)
        return rows_MD, gates, codes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MD: Tensor, grad_gates: Tensor, _: None) -> tuple[Tensor | None, ...]:
        grad = all_to_all(torch.cat([grad_MD, grad_gates], dim=1), ctx.splits.reversed())
        return *torch.split(grad, ctx.columns, dim=1), None, None


class _Spread(torch.autograd.Function):
    """x[token]; a token occurs once per rank that it visits. The transpose of `_Collect`."""

    @staticmethod
    def forward(ctx: Any, x_SD: Tensor, token_M: Tensor, place_M: Tensor, bounds: Tensor) -> Tensor:
        ctx.save_for_backward(place_M, bounds)
        return x_SD.index_select(0, token_M)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None, None, None]:
        return sum_runs(grad_MD.contiguous(), *ctx.saved_tensors), None, None, None


class _Collect(torch.autograd.Function):
    """Sum of each token's rows."""

    @staticmethod
    def forward(ctx: Any, y_MD: Tensor, token_M: Tensor, place_M: Tensor, bounds: Tensor) -> Tensor:
        ctx.save_for_backward(token_M)
        return sum_runs(y_MD, place_M, bounds)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor, None, None, None]:
        (token_M,) = ctx.saved_tensors
        return grad_SD.index_select(0, token_M), None, None, None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
        ctx.process_group = process_group
        return _reduced(x, process_group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _reduced(grad, ctx.process_group), None


def _reduced(x: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=process_group)
    return total
