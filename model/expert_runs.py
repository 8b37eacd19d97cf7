"""Products of rows with the matrices of their experts: the one place where devices differ.

A GPU with the fused grouped kernel multiplies the rows of all experts at once: one run. Elsewhere each expert is a run
of its own, and layers take one run through all their work before they begin the next: what an expert computes then
stays in the cache. On a CPU that matters more than anything else here (docs/performance.md). There a run's length is
rounded up, with rows of zeros, since oneDNN prepares and keeps a kernel for every length that it meets: with lengths as
they come, neither their time nor their memory finds an end.

Shape legend: M rows, A assignments of rows to experts, Z places of the runs' rows, R of them in a run, E experts, D and
F any widths.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from model.expert_order import ExpertOrder

ROUNDED_TO = 32
"""Rows: the length of a run that is one expert's is a multiple of this."""


@dataclass(frozen=True)
class Run(ABC):
    """Some experts' rows, and how to multiply them.

    Attributes:
        places: which of the Z places.
    """

    places: slice

    @abstractmethod
    def take(self, values_MF: Tensor, index_A: Tensor) -> Tensor:
        """Return the rows of this run: (R, F), zero at places that no assignment has.

        Args:
            values_MF: (M, F) or (M,).
            index_A: (A,) the row of `values_MF` that each assignment, sorted by expert, wants.
        """

    @abstractmethod
    def linear(self, rows_RD: Tensor, weights_EDF: Tensor, out_ZF: Tensor, bias_EF: Tensor | None = None) -> Tensor:
        """Write each row times its expert's matrix, plus its bias, to this run's part of `out_ZF`; return that part.

        Args:
            rows_RD: the rows of this run.
            weights_EDF: matrices of all experts; may be a transposed view.
            out_ZF: receives the products of all runs.
            bias_EF: biases of all experts.
        """

    @abstractmethod
    def outer(self, left_RD: Tensor, right_RF: Tensor, out_EDF: Tensor) -> None:
        """Write left^T right over the rows of each expert of this run to its matrix of `out_EDF`; zero without rows."""

    @abstractmethod
    def column_sums(self, rows_RF: Tensor, out_EF: Tensor) -> None:
        """Write the sum of the rows of each expert of this run to its row of `out_EF`, accumulated in float32."""


@dataclass(frozen=True)
class ExpertRuns:
    """The runs of all experts, in order.

    Attributes:
        runs: they cover all places.
        place_A: (A,) int64, place of each row-major assignment.
        size: Z.
    """

    runs: tuple[Run, ...]
    place_A: Tensor
    size: int

    def __iter__(self) -> Iterator[Run]:
        return iter(self.runs)

    def buffer(self, like: Tensor, *width: int) -> Tensor:
        """Return an empty (Z, F) or (Z,) that runs can fill, of the dtype and device of `like`."""
        return like.new_empty(self.size, *width)


Ends = tuple[int, ...] | None
"""Where each expert's assignments end, on the host; None where the fused kernel finds that on the device."""


def ends_on_host(order: ExpertOrder, x: Tensor, widths: Sequence[int]) -> Ends:
    """Return what `expert_runs` needs to know, once for all products of a layer, forward and backward.

    Waits for the device unless it has the fused kernel.

    Args:
        order: the assignments.
        x: a tensor with the rows' dtype and device.
        widths: every D and F of the products to come.
    """
    return None if _has_kernel(x, len(order.row_A), widths) else tuple(order.ends_E.tolist())


def expert_runs(order: ExpertOrder, ends: Ends) -> ExpertRuns:
    """Return the runs of a layer call, without waiting for the device.

    Args:
        order: the assignments.
        ends: of the same assignments.
    """
    if ends is None:
        run = _AllExperts(slice(None), order.expert_A, order.ends_E)
        return ExpertRuns((run,), order.place_A, len(order.row_A))
    runs, size = [], 0
    for expert, (begin, end) in enumerate(zip((0, *ends[:-1]), ends, strict=True)):
        places = slice(size, size + _rounded(end - begin))
        runs.append(_OneExpert(places, slice(begin, end), expert))
        size = places.stop
    length_E = order.ends_E.diff(prepend=order.ends_E.new_zeros(1))
    idle_E = _rounded(length_E) - length_E
    shift_A = (idle_E.cumsum(0) - idle_E).index_select(0, order.expert_A)
    return ExpertRuns(tuple(runs), order.place_A + shift_A.index_select(0, order.place_A), size)


Length = TypeVar("Length", int, Tensor)


def _rounded(length: Length) -> Length:
    return (length + (ROUNDED_TO - 1)) // ROUNDED_TO * ROUNDED_TO


@dataclass(frozen=True)
class _OneExpert(Run):
    """The rows of one expert; plain products."""

    assignments: slice
    expert: int

    def take(self, values_MF: Tensor, index_A: Tensor) -> Tensor:
        index = index_A[self.assignments]
        rows_RF = values_MF.new_empty(self.places.stop - self.places.start, *values_MF.shape[1:])
        torch.index_select(values_MF, 0, index, out=rows_RF[: len(index)])
        rows_RF[len(index) :].zero_()
        return rows_RF

    def linear(self, rows_RD: Tensor, weights_EDF: Tensor, out_ZF: Tensor, bias_EF: Tensor | None = None) -> Tensor:
        out_RF = out_ZF[self.places]
        if bias_EF is None:
            return torch.mm(rows_RD, weights_EDF[self.expert], out=out_RF)
        return torch.addmm(bias_EF[self.expert], rows_RD, weights_EDF[self.expert], out=out_RF)

    def outer(self, left_RD: Tensor, right_RF: Tensor, out_EDF: Tensor) -> None:
        torch.mm(left_RD.t(), right_RF, out=out_EDF[self.expert])

    def column_sums(self, rows_RF: Tensor, out_EF: Tensor) -> None:
        torch.sum(rows_RF, dim=0, out=out_EF[self.expert])


@dataclass(frozen=True)
class _AllExperts(Run):
    """The rows of all experts, through the fused kernel, which leaves the ends of runs on the device."""

    expert_A: Tensor
    ends_E: Tensor

    def take(self, values_MF: Tensor, index_A: Tensor) -> Tensor:
        return values_MF.index_select(0, index_A)

    def linear(self, rows_RD: Tensor, weights_EDF: Tensor, out_ZF: Tensor, bias_EF: Tensor | None = None) -> Tensor:
        product_ZF = F.grouped_mm(rows_RD, weights_EDF, offs=self.ends_E)
        if bias_EF is None:
            return out_ZF.copy_(product_ZF)
        return torch.add(product_ZF, bias_EF.index_select(0, self.expert_A), out=out_ZF)

    def outer(self, left_RD: Tensor, right_RF: Tensor, out_EDF: Tensor) -> None:
        # The kernel of capability 10.0 leaves garbage where a run is empty (pytorch issue 172439).
        idle_E = self.ends_E.diff(prepend=self.ends_E.new_zeros(1)) == 0
        product_EDF = F.grouped_mm(left_RD.t(), right_RF, offs=self.ends_E)
        out_EDF.copy_(product_EDF.masked_fill_(idle_E[:, None, None], 0))

    def column_sums(self, rows_RF: Tensor, out_EF: Tensor) -> None:
        ones = rows_RF.new_ones(len(rows_RF), 8)  # eight columns: the kernel's 16 bytes
        sums_E8F = rows_RF.new_empty(len(self.ends_E), 8, rows_RF.shape[1])
        self.outer(ones, rows_RF, sums_E8F)
        out_EF.copy_(sums_E8F[:, 0])


def _has_kernel(x: Tensor, rows: int, widths: Sequence[int]) -> bool:
    """Whether F.grouped_mm has its fused kernel here; it wants rows, and strides in multiples of 16 bytes."""
    if not (x.is_cuda and x.dtype == torch.bfloat16 and rows):
        return False
    aligned = all(width % 8 == 0 for width in widths)
    return aligned and torch.cuda.get_device_capability(x.device)[0] in (9, 10)
