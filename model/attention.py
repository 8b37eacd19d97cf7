"""Attention whose heads are experts (mixture of attention heads, arXiv 2210.05144), and ordinary multi-head attention.

Each expert owns a query and an output projection; keys and values are shared by all experts of a layer. A token's K
chosen experts are its K heads: y = sum_k gate_k * softmax(x Wq_k K^T / sqrt(d_h)) V Wo_k (DESIGN 3).

Shape legend: P rows (images or pairs), N tokens of a row, S = P * N tokens, K chosen experts, C = S * K choices,
token-major; M rows and A assignments at the experts; E experts, L of them on this rank; D width, d head width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from configs.schema import Init
from model.dispatch import ExpertGroup, make_exchange
from model.expert_order import ExpertOrder, sum_runs
from model.expert_runs import Ends, ends_on_host, expert_runs
from model.experts import expert_matrices
from model.router import Routing, seeded_generator
from model.shadowing import present_weights


class ExpertAttention(nn.Module):
    """A layer of E attention heads as experts, sharded over `group`; keys and values never leave their rank.

    Parameters: wq (L, D, d) and wo (L, d, D), flagged `is_expert`, initialised as in `experts.expert_matrices`; `kv`, a
    Linear from D to 2 d with bias, replicated.

    Args:
        width: D.
        head_width: d.
        num_experts: E over all ranks; raises UserError where `group.size` does not divide it.
        top_k: K, which `routing` must have.
        group: the ranks that hold the experts.
        seed: of the initial weights.
        init: see `experts.expert_matrices`.
    """

    def __init__(
        self,
        *,
        width: int,
        head_width: int,
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
        shapes = [(width, head_width), (head_width, width)]
        self.wq, self.wo = expert_matrices(self.layout.owned, shapes, seed, init)
        self.kv = nn.Linear(width, 2 * head_width)

        generator = seeded_generator(seed, num_experts)  # the stream after the last expert's
        nn.init.trunc_normal_(self.kv.weight, std=0.02, a=-0.04, b=0.04, generator=generator)
        nn.init.zeros_(self.kv.bias)

    def forward(self, x_PND: Tensor, routing: Routing) -> Tensor:
        """Return (P, N, D) in x's dtype: attention of each row's tokens to each other."""
        rows, tokens, width = x_PND.shape
        assert routing.experts_SK.shape == (rows * tokens, self.top_k)
        wq, wo = present_weights((self.wq, self.wo), self.layout, self.group)
        exchange = make_exchange(routing.experts_SK, self.layout, self.group)

        x_MD, gates_A = exchange.dispatch(x_PND.reshape(rows * tokens, width), routing.gates_SK)
        ends = ends_on_host(exchange.order, x_MD, wq.shape[1:])
        q_Ad: Tensor = _Queries.apply(x_MD, wq, exchange.order, ends)  # type: ignore[no-untyped-call]
        q_Cd = exchange.choices_home(q_Ad)
        # All heads share keys and values, so heads fold into the query length and K, V are never expanded.
        q = q_Cd.view(rows, 1, tokens * self.top_k, q_Cd.shape[1])
        key, value = self.kv(x_PND).unsqueeze(1).chunk(2, dim=-1)
        a_Cd = F.scaled_dot_product_attention(q, key, value).reshape(q_Cd.shape)
        a_Ad = exchange.choices_out(a_Cd)
        y_MD: Tensor = _Outputs.apply(a_Ad, gates_A, wo, exchange.order, ends)  # type: ignore[no-untyped-call]
        return exchange.combine(y_MD).view(rows, tokens, width)


class DenseAttention(nn.Module):
    """Multi-head self-attention of inner width heads * head_width; all projections have biases.

    Weights start from a normal of deviation 0.02 cut at 0.04, biases at zero.
    """

    def __init__(self, *, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_width = head_width
        self.qkv = nn.Linear(width, 3 * heads * head_width)
        self.out = nn.Linear(heads * head_width, width)
        for linear in (self.qkv, self.out):
            nn.init.trunc_normal_(linear.weight, std=0.02, a=-0.04, b=0.04)
            nn.init.zeros_(linear.bias)

    def forward(self, x_PND: Tensor) -> Tensor:
        """Return (P, N, D)."""
        rows, tokens, _ = x_PND.shape
        qkv = self.qkv(x_PND).view(rows, tokens, 3, self.heads, self.head_width)
        q, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, key, value)
        joined: Tensor = self.out(y.transpose(1, 2).reshape(rows, tokens, self.heads * self.head_width))
        return joined


def reference_expert_attention(
    x_PND: Tensor, routing: Routing, wq_EDd: Tensor, wo_EdD: Tensor, kv_weight: Tensor, kv_bias: Tensor
) -> Tensor:
    """Return (P, N, D): the definition, head by head with every token's own matrices, in plain autograd."""
    rows, tokens, width = x_PND.shape
    head_width = wq_EDd.shape[2]
    key, value = F.linear(x_PND, kv_weight, kv_bias).split(head_width, dim=-1)  # type: ignore[no-untyped-call]
    y_SD = torch.zeros_like(x_PND).view(rows * tokens, width)
    for slot in range(routing.experts_SK.shape[1]):
        expert_S = routing.experts_SK[:, slot]
        q = torch.einsum("sd,sdh->sh", x_PND.reshape(-1, width), wq_EDd[expert_S]).view(rows, tokens, head_width)
        attended = ((q @ key.transpose(1, 2)) / head_width**0.5).softmax(dim=-1) @ value
        out_SD = torch.einsum("sh,shd->sd", attended.reshape(-1, head_width), wo_EdD[expert_S])
        y_SD = y_SD + out_SD * routing.gates_SK[:, slot, None].to(x_PND.dtype)
    return y_SD.view(rows, tokens, width)


class _Queries(torch.autograd.Function):
    """(M, D) rows to (A, d) row-major queries, one per assignment; saves only its inputs."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, wq: Tensor, order: ExpertOrder, ends: Ends) -> Tensor:
        ctx.save_for_backward(x_MD, wq, *order)
        ctx.ends = ends
        runs = expert_runs(order, ends)
        q_Zd = runs.buffer(x_MD, wq.shape[2])
        for run in runs:
            run.linear(run.take(x_MD, order.row_A), wq, q_Zd)
        return q_Zd.index_select(0, runs.place_A)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_Ad: Tensor) -> tuple[Tensor | None, ...]:
        x_MD, wq, *indices = ctx.saved_tensors
        order = ExpertOrder(*indices)
        runs = expert_runs(order, ctx.ends)
        grad_wq, grad_ZD = torch.empty_like(wq), runs.buffer(x_MD, x_MD.shape[1])
        for run in runs:
            grad_Rd = run.take(grad_Ad, order.order_A)
            run.outer(run.take(x_MD, order.row_A), grad_Rd, grad_wq)
            run.linear(grad_Rd, wq.transpose(1, 2), grad_ZD)
        return sum_runs(grad_ZD, runs.place_A, order.bounds), grad_wq, None, None


class _Outputs(torch.autograd.Function):
    """(A, d) row-major attention outputs and their gates to (M, D), summed per row; saves only its inputs."""

    @staticmethod
    def forward(ctx: Any, a_Ad: Tensor, gates_A: Tensor, wo: Tensor, order: ExpertOrder, ends: Ends) -> Tensor:
        ctx.save_for_backward(a_Ad, gates_A, wo, *order)
        ctx.ends = ends
        runs = expert_runs(order, ends)
        y_ZD = runs.buffer(a_Ad, wo.shape[2])
        for run in runs:
            gates_R1 = run.take(gates_A, order.order_A)[:, None]
            run.linear(run.take(a_Ad, order.order_A).mul_(gates_R1), wo, y_ZD)
        return sum_runs(y_ZD, runs.place_A, order.bounds)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor | None, ...]:
        a_Ad, gates_A, wo, *indices = ctx.saved_tensors
        order = ExpertOrder(*indices)
        runs = expert_runs(order, ctx.ends)
        grad_wo, grad_Zd, grad_gates_Z = torch.empty_like(wo), runs.buffer(a_Ad, a_Ad.shape[1]), runs.buffer(a_Ad)
        for run in runs:
            a_Rd, gates_R1 = run.take(a_Ad, order.order_A), run.take(gates_A, order.order_A)[:, None]
            grad_RD = run.take(grad_MD, order.row_A)
            grad_Rd = run.linear(grad_RD, wo.transpose(1, 2), grad_Zd)
            grad_gates_Z[run.places] = torch.linalg.vecdot(grad_Rd, a_Rd)
            grad_Rd.mul_(gates_R1)
            run.outer(a_Rd.mul_(gates_R1), grad_RD, grad_wo)
        return grad_Zd.index_select(0, runs.place_A), grad_gates_Z.index_select(0, runs.place_A), grad_wo, None, None
