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
from model.expert_runs import Ends, ends_on_host, expert_runs
from model.router import Routing, seeded_generator
from model.shadowing import present_weights


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
        self.top_k = top_k
        self.group = group
        self.layout = group.layout(num_experts)
        experts = self.layout.owned
        self.w1, self.w2 = expert_matrices(experts, [(width, hidden), (hidden, width)], seed, init)
        self.b1 = expert_parameter(torch.zeros(len(experts), hidden))
        self.b2 = expert_parameter(torch.zeros(len(experts), width))

    def forward(self, x_SD: Tensor, routing: Routing) -> Tensor:
        """Return (S, D) in x's dtype: every token's experts, weighted by their gates."""
        assert routing.experts_SK.shape == (len(x_SD), self.top_k)
        weights = present_weights((self.w1, self.b1, self.w2, self.b2), self.layout, self.group)
        exchange = make_exchange(routing.experts_SK, self.layout, self.group)
        x_MD, gates_A = exchange.dispatch(x_SD, routing.gates_SK)
        ends = ends_on_host(exchange.order, x_MD, self.w1.shape[1:])
        y_MD: Tensor = _ExpertMLP.apply(x_MD, gates_A, *weights, exchange.order, ends)  # type: ignore[no-untyped-call]
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


class _ExpertMLP(torch.autograd.Function):
    """(M, D) rows and (A,) row-major gates to (M, D): for each row, sum over its experts of gate * FFN.

    The gate multiplies the hidden activation, not the output: its gradient then needs no expert outputs, and all that
    is saved is the input, the gates and the pre-activation. GELU is computed again in backward. Sums over rows are
    matrix products or reductions that accumulate bfloat16 in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_MD: Tensor,
        gates_A: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
        order: ExpertOrder,
        ends: Ends,
    ) -> Tensor:
        runs = expert_runs(order, ends)
        pre_ZH, out_ZD = runs.buffer(x_MD, w1.shape[2]), runs.buffer(x_MD, x_MD.shape[1])
        for run in runs:
            pre_RH = run.linear(run.take(x_MD, order.row_A), w1, pre_ZH, b1)
            gates_R1 = run.take(gates_A, order.order_A)[:, None]
            run.linear(F.gelu(pre_RH).mul_(gates_R1), w2, out_ZD)
        y_MD = sum_runs(out_ZD, runs.place_A, order.bounds)
        y_MD.addmm_(_mixture(gates_A, order, len(x_MD)), b2)
        ctx.save_for_backward(x_MD, gates_A, pre_ZH, w1, w2, b2, *order)
        ctx.ends = ends
        return y_MD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor | None, ...]:
        x_MD, gates_A, pre_ZH, w1, w2, b2, *indices = ctx.saved_tensors
        order = ExpertOrder(*indices)
        grad_MD = grad_MD.contiguous()

        runs = expert_runs(order, ctx.ends)
        grad_w1, grad_b1, grad_w2 = torch.empty_like(w1), w1.new_empty(w1.shape[0], w1.shape[2]), torch.empty_like(w2)
        grad_ZH, grad_x_ZD, grad_gates_Z = torch.empty_like(pre_ZH), runs.buffer(x_MD, x_MD.shape[1]), runs.buffer(x_MD)
        for run in runs:
            pre_RH, gates_R1 = pre_ZH[run.places], run.take(gates_A, order.order_A)[:, None]
            grad_RD = run.take(grad_MD, order.row_A)
            grad_RH = run.linear(grad_RD, w2.transpose(1, 2), grad_ZH)
            hidden_RH = F.gelu(pre_RH)
            grad_gates_Z[run.places] = torch.linalg.vecdot(grad_RH, hidden_RH)
            run.outer(hidden_RH.mul_(gates_R1), grad_RD, grad_w2)
            del hidden_RH, grad_RD

            grad_pre_RH = torch.ops.aten.gelu_backward(grad_RH.mul_(gates_R1), pre_RH)
            run.outer(run.take(x_MD, order.row_A), grad_pre_RH, grad_w1)
            run.column_sums(grad_pre_RH, grad_b1)
            run.linear(grad_pre_RH, w1.transpose(1, 2), grad_x_ZD)
        grad_x_MD = sum_runs(grad_x_ZD, runs.place_A, order.bounds)

        grad_b2 = _mixture(gates_A, order, len(x_MD)).t() @ grad_MD
        through_b2_A = (grad_MD @ b2.t()).flatten().index_select(0, _cells(order))
        grad_gates_A = grad_gates_Z.index_select(0, runs.place_A) + through_b2_A
        return grad_x_MD, grad_gates_A, grad_w1, grad_b1, grad_w2, grad_b2, None, None


def _mixture(gates_A: Tensor, order: ExpertOrder, rows: int) -> Tensor:
    """Return (M, L): each row's gates, zero for experts that it did not choose."""
    experts = len(order.ends_E)
    return gates_A.new_zeros(rows * experts).scatter_(0, _cells(order), gates_A).view(rows, experts)


def _cells(order: ExpertOrder) -> Tensor:
    """Return (A,) int64: where each row-major assignment stands in a table of M rows and L experts."""
    return (order.row_A * len(order.ends_E) + order.expert_A).index_select(0, order.place_A)
