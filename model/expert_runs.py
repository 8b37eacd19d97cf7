"""Products of rows with the matrices of their experts: the one place where devices differ.

A GPU with the fused grouped kernel multiplies the rows of all experts at once: one run. Elsewhere each expert is a run
of its own, and layers take one run through all their work before they begin the next: what an expert computes then
stays in the cache. On a CPU that matters more than anything else here (docs/performance.md).

Shape legend: A rows sorted by expert, R of them in a run, E experts, D and F any widths.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.expert_order import ExpertOrder


@dataclass(frozen=True)
class Run:
    """Consecutive sorted rows, and how to multiply them.

    Attributes:
        rows: which of the A sorted rows.
    """

    rows: slice

    def linear(self, rows_RD: Tensor, weights_EDF: Tensor, out_AF: Tensor, bias_EF: Tensor | None = None) -> Tensor:
        """Write each row times its expert's matrix, plus its bias, to this run's part of `out_AF`; return that part.

        Args:
            rows_RD: the rows of this run.
            weights_EDF: matrices of all experts; may be a transposed view.
            out_AF: receives the products of all runs.
            bias_EF: biases of all experts.
        """
        raise NotImplementedError

    def outer(self, left_RD: Tensor, right_RF: Tensor, out_EDF: Tensor) -> None:
        """Write left^T right over the rows of each expert of this run to its matrix of `out_EDF`; zero without rows."""
        raise NotImplementedError

    def column_sums(self, rows_RF: Tensor, out_EF: Tensor) -> None:
        """Write the sum of the rows of each expert of this run to its row of `out_EF`, accumulated in float32."""
        raise NotImplementedError


@dataclass(frozen=True)
class _OneExpert(Run):
    """The rows of one expert; plain products."""

    expert: int

    def linear(self, rows_RD: Tensor, weights_EDF: Tensor, out_AF: Tensor, bias_EF: Tensor | None = None) -> Tensor:
        out_RF = out_AF[self.rows]
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

    def linear(self, rows_RD: Tensor, weights_EDF: Tensor, out_AF: Tensor, bias_EF: Tensor | None = None) -> Tensor:
        product_AF = F.grouped_mm(rows_RD, weights_EDF, offs=self.ends_E)
        if bias_EF is None:
            return out_AF.copy_(product_AF)
        return torch.add(product_AF, bias_EF.index_select(0, self.expert_A), out=out_AF)

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


def expert_runs(order: ExpertOrder, x: Tensor, widths: Sequence[int]) -> list[Run]:
    """Return the runs of all experts, in order.

    Args:
        order: the assignments.
        x: a tensor with the rows' dtype and device.
        widths: every D and F of the products to come.
    """
    if _has_kernel(x, len(order.row_A), widths):
        return [_AllExperts(slice(None), order.expert_A, order.ends_E)]
    ends = order.ends_E.tolist()
    return [
        _OneExpert(slice(begin, end), expert)
        for expert, (begin, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True))
    ]


def _has_kernel(x: Tensor, rows: int, widths: Sequence[int]) -> bool:
    """Whether F.grouped_mm has its fused kernel here; it wants rows, and strides in multiples of 16 bytes."""
    if not (x.is_cuda and x.dtype == torch.bfloat16 and rows):
        return False
    aligned = all(width % 8 == 0 for width in widths)
    return aligned and torch.cuda.get_device_capability(x.device)[0] in (9, 10)
