"""Expert MLPs: y = sum_k gate_k * FFN_k(x) over a token's K experts, FFN = Linear, GELU, Linear with biases (DESIGN 3).

The weights of all local experts are stacked, and each expert runs once, on one contiguous run of rows. Experts without
tokens run too and receive zero gradients, so that every rank has the same graph. `reference_expert_mlp` is the same
mathematics as a plain loop, for tests.

Shape legend: S tokens at home, K chosen experts, M rows at the experts, A (row, expert) assignments, E experts, L of
them on this rank, D width, H hidden width, F any width.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from configs.schema import Init
from model.dispatch import ExpertGroup, make_exchange
from model.expert_order import ExpertOrder, sum_runs
from model.router import Routing, seeded_generator


class ExpertMLP(nn.Module):
    """A layer of E expert MLPs, sharded over `group`.

    Parameters, stacked over the L local experts and flagged `is_expert`: w1 (L, D, H), b1 (L, H), w2 (L, H, D),
    b2 (L, D). Their initial values depend on `seed` and each expert's global index alone, whatever the group.

    Args:
        width: D.
        hidden: H.
        num_experts: E over all ranks; raises UserError where `group.size` does not divide it.
        top_k: K, which `routing` must have.
        group: the ranks that hold the experts.
        seed: of the initial weights.
        init: see `expert_matrices`.
    """

    def __init__(
        self,
        *,
        width: int,
        hidden: int,
        num_experts: int,
        top_k: int,
        group: ExpertGroup,
        seed: int = 0,
        init: Init = "standard",
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.top_k = top_k
        self.group = group
        experts = group.experts(num_experts)
        self.w1, self.w2 = expert_matrices(experts, [(width, hidden), (hidden, width)], seed, init)
        self.b1 = expert_parameter(torch.zeros(len(experts), hidden))
        self.b2 = expert_parameter(torch.zeros(len(experts), width))

    def forward(self, x_SD: Tensor, routing: Routing) -> Tensor:
        """Return (S, D) in x's dtype: every token's experts, weighted by their gates."""
        assert routing.experts_SK.shape == (len(x_SD), self.top_k)
        exchange = make_exchange(routing.experts_SK, self.num_experts, self.group)
        x_MD, gates_A = exchange.dispatch(x_SD, routing.gates_SK)
        y_MD: Tensor = _ExpertMLP.apply(x_MD, gates_A, self.w1, self.b1, self.w2, self.b2, exchange.order)  # type: ignore[no-untyped-call]
        return exchange.combine(y_MD)


def reference_expert_mlp(
    x_SD: Tensor, routing: Routing, w1_EDH: Tensor, b1_EH: Tensor, w2_EHD: Tensor, b2_ED: Tensor
) -> Tensor:
    """Return (S, D): every expert on its tokens, one after the other, in plain autograd."""
    y_SD = torch.zeros_like(x_SD)
    for expert in range(len(w1_EDH)):
        token, slot = (routing.experts_SK == expert).nonzero(as_tuple=True)
        hidden = F.gelu(x_SD[token] @ w1_EDH[expert] + b1_EH[expert])
        out = hidden @ w2_EHD[expert] + b2_ED[expert]
        y_SD = y_SD.index_add(0, token, out * routing.gates_SK[token, slot, None].to(x_SD.dtype))
    return y_SD


def expert_matrices(experts: range, shapes: Sequence[tuple[int, int]], seed: int, init: Init) -> list[nn.Parameter]:
    """Return one stacked parameter (L, fan_in, fan_out) per shape, the same for a global expert in any group.

    Drawn from U(-a, a). `standard`: a = sqrt(3 / fan_in), i.e. deviation fan_in^-1/2, keeps the variance from input to
    output (LeCun 1998, Efficient BackProp, section 4.6). Gates that are not renormalised sum to about K / E, so that
    experts drawn any smaller start as almost nothing beside the residual. `published` (the published model) is smaller:
    a = 1 / fan_in.
    """
    drawn = []
    for expert in experts:
        generator = seeded_generator(seed, expert)
        bounds = [math.sqrt(3 / fan_in) if init == "standard" else 1 / fan_in for fan_in, _ in shapes]
        drawn.append(
            [torch.empty(shape).uniform_(-a, a, generator=generator) for shape, a in zip(shapes, bounds, strict=True)]
        )
    return [expert_parameter(torch.stack(matrices)) for matrices in zip(*drawn, strict=True)]


def expert_parameter(stacked: Tensor) -> nn.Parameter:
    """Return a parameter flagged `is_expert`: a shard of its own on each rank of the expert group."""
    parameter = nn.Parameter(stacked)
    parameter.is_expert = True  # type: ignore[attr-defined]
    return parameter


def grouped_linear(rows_AD: Tensor, weights_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """Return (A, F): each expert's run of rows times its matrix.

    With its transpose `grouped_outer`, the only code that depends on the device: one kernel on CUDA from compute
    capability 9.0 in bfloat16, elsewhere a loop over experts (on CPUs as fast, and free of the kernel's limits).

    Args:
        rows_AD: (A, D) rows sorted by expert.
        weights_EDF: (E, D, F), may be a transposed view.
        ends_E: (E,) int32, where each expert's run ends.
    """
    if _has_kernel(rows_AD, weights_EDF):
        return F.grouped_mm(rows_AD, weights_EDF, offs=ends_E)
    out_AF = rows_AD.new_empty(len(rows_AD), weights_EDF.shape[2])
    begin = 0
    for expert, end in enumerate(ends_E.tolist()):
        torch.mm(rows_AD[begin:end], weights_EDF[expert], out=out_AF[begin:end])
        begin = end
    return out_AF


def grouped_outer(left_AD: Tensor, right_AF: Tensor, ends_E: Tensor) -> Tensor:
    """Return (E, D, F): left^T right over each expert's run of rows, zero where it has none."""
    if _has_kernel(left_AD, right_AF):
        # The kernel of capability 10.0 leaves garbage where a run is empty (pytorch issue 172439).
        idle_E = ends_E.diff(prepend=ends_E.new_zeros(1)) == 0
        return F.grouped_mm(left_AD.t(), right_AF, offs=ends_E).masked_fill_(idle_E[:, None, None], 0)
    out_EDF = left_AD.new_empty(len(ends_E), left_AD.shape[1], right_AF.shape[1])
    begin = 0
    for expert, end in enumerate(ends_E.tolist()):
        torch.mm(left_AD[begin:end].t(), right_AF[begin:end], out=out_EDF[expert])
        begin = end
    return out_EDF


def _has_kernel(rows_AD: Tensor, other: Tensor) -> bool:
    """Whether F.grouped_mm has its fused kernel here; it wants rows, and strides in multiples of 16 bytes."""
    if not (rows_AD.is_cuda and rows_AD.dtype == torch.bfloat16 and len(rows_AD)):
        return False
    aligned = rows_AD.shape[-1] % 8 == 0 and other.shape[-1] % 8 == 0
    return aligned and torch.cuda.get_device_capability(rows_AD.device)[0] in (9, 10)


class _ExpertMLP(torch.autograd.Function):
    """(M, D) rows and (A,) row-major gates to (M, D): for each row, sum over its experts of gate * FFN.

    The gate multiplies the hidden activation, not the output: its gradient then needs no expert outputs, and all that
    is saved is the input, the gates and the pre-activation. GELU is computed again in backward. Bias sums are matrix
    products, which accumulate bfloat16 in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, x_MD: Tensor, gates_A: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, order: ExpertOrder
    ) -> Tensor:
        gates_A = gates_A.index_select(0, order.order_A)
        pre_AH = grouped_linear(x_MD.index_select(0, order.row_A), w1, order.ends_E)
        pre_AH += b1.index_select(0, order.expert_A)
        out_AD = grouped_linear(F.gelu(pre_AH).mul_(gates_A[:, None]), w2, order.ends_E)
        y_MD = sum_runs(out_AD, order.place_A, order.bounds)
        y_MD.addmm_(_mixture(gates_A, order, len(x_MD)), b2)
        ctx.save_for_backward(x_MD, gates_A, pre_AH, w1, w2, b2, *order)
        return y_MD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor | None, ...]:
        x_MD, gates_A, pre_AH, w1, w2, b2, *indices = ctx.saved_tensors
        order = ExpertOrder(*indices)
        grad_MD = grad_MD.contiguous()

        grad_b2 = _mixture(gates_A, order, len(x_MD)).t() @ grad_MD
        grad_gates_A = (grad_MD @ b2.t()).flatten().index_select(0, order.row_A * len(b2) + order.expert_A)

        grad_AD = grad_MD.index_select(0, order.row_A)
        grad_AH = grouped_linear(grad_AD, w2.transpose(1, 2), order.ends_E)
        hidden_AH = F.gelu(pre_AH)
        grad_gates_A += torch.linalg.vecdot(grad_AH, hidden_AH)
        grad_w2 = grouped_outer(hidden_AH.mul_(gates_A[:, None]), grad_AD, order.ends_E)
        del hidden_AH, grad_AD

        grad_pre_AH = torch.ops.aten.gelu_backward(grad_AH.mul_(gates_A[:, None]), pre_AH)
        del grad_AH
        grad_w1 = grouped_outer(x_MD.index_select(0, order.row_A), grad_pre_AH, order.ends_E)
        ones = grad_pre_AH.new_ones(len(grad_pre_AH), 8)  # eight columns: the kernel's 16 bytes
        grad_b1 = grouped_outer(ones, grad_pre_AH, order.ends_E)[:, 0]
        grad_x_MD = sum_runs(grouped_linear(grad_pre_AH, w1.transpose(1, 2), order.ends_E), order.place_A, order.bounds)
        return grad_x_MD, grad_gates_A.index_select(0, order.place_A), grad_w1, grad_b1, grad_w2, grad_b2, None


def _mixture(gates_A: Tensor, order: ExpertOrder, rows: int) -> Tensor:
    """Return (M, L): each row's gates, zero for experts that it did not choose."""
    experts = len(order.ends_E)
    dense = gates_A.new_zeros(rows * experts)
    return dense.scatter_(0, order.row_A * experts + order.expert_A, gates_A).view(rows, experts)
