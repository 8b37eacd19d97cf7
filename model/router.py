"""Routers: which K of an expert layer's E experts each token uses, and how strongly.

One stacked parameter holds the routers of all tasks, so that every rank runs the same graph and every router receives
a gradient, zero where its task is absent. Routing is float32 whatever the precision of the weights, and dropless.

Shape legend: P rows (images or pairs), N tokens of a row, S = P * N tokens, D width, E experts, K chosen experts,
R routers (tasks, or one router that sees no task), Q experts that may be chosen (all E, or those kept by extraction).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.counter_noise import standard_normal


@dataclass(frozen=True)
class Routing:
    """The choices of one expert layer for S tokens.

    Attributes:
        probs_SE: (S, E) float32 with gradient, softmax over all experts; the matching loss needs all of it.
        gates_SK: (S, K) float32 with gradient, weights of the chosen experts, largest first.
        experts_SK: (S, K) int64, the chosen experts as indices into the experts that the layer holds.
        logits_SE: (S, E) float32 with gradient, noise included where there is any.
    """

    probs_SE: Tensor
    gates_SK: Tensor
    experts_SK: Tensor
    logits_SE: Tensor


class TaskRouter(nn.Module):
    """One linear router without bias per task: p = softmax(x W[t]); the K largest are chosen, the lower index on ties.

    With `noise`, training adds eps * softplus(x Wn[t]), eps ~ N(0, 1), to the logits (noisy top-k gating, arXiv
    1701.06538, eq. 4). Wn starts at zero, as in that paper; W is drawn from a normal of deviation 0.02 cut at 0.04.
    eps is a function of `seed` and the row's stream (`model.counter_noise`): no other row has a part in it.

    Args:
        width: D.
        num_experts: E, the width of the softmax.
        num_tasks: R; 1 for one router that serves all rows.
        top_k: K.
        renormalize_gates: scale a token's K gates to sum 1; otherwise they are the chosen p as they are.
        noise: whether training adds noise.
        seed: of the initial weights and of the noise.
        kept: (Q,) int64 distinct experts, Q >= K, or None for all. The others stay in the softmax but cannot be chosen,
            and `Routing.experts_SK` counts within `kept`: this is how an extracted squad routes exactly as before.
    """

    kept: Tensor | None

    def __init__(
        self,
        *,
        width: int,
        num_experts: int,
        num_tasks: int,
        top_k: int,
        renormalize_gates: bool = False,
        noise: bool = False,
        seed: int = 0,
        kept: Tensor | None = None,
    ) -> None:
        super().__init__()
        choices = num_experts if kept is None else len(kept)
        if not 1 <= top_k <= choices:
            raise ValueError(f"router: top_k {top_k} is not between 1 and the {choices} experts to choose from")
        self.top_k = top_k
        self.renormalize_gates = renormalize_gates
        self.seed = seed
        self.weight = nn.Parameter(torch.empty(num_tasks, width, num_experts))
        self.noise_weight = nn.Parameter(torch.zeros(num_tasks, width, num_experts)) if noise else None
        self.register_buffer("kept", kept)

        nn.init.trunc_normal_(self.weight, std=0.02, a=-0.04, b=0.04, generator=seeded_generator(seed))

    def forward(self, x_PND: Tensor, task_P: Tensor | None, stream_P3: Tensor | None = None) -> Routing:
        """Route the tokens of P rows.

        Args:
            x_PND: (P, N, D) tokens, any floating dtype.
            task_P: (P,) int64 router of each row; None where there is one router only.
            stream_P3: (P, 3) int64 from 0 to 2^32 - 1, the stream of each row's noise; read where noise is added.

        Raises:
            ValueError: there are no streams to draw the noise from.
        """
        logits_PNE = _route(x_PND, self.weight, task_P)
        if self.noise_weight is not None and self.training:
            if stream_P3 is None:
                raise ValueError("router noise is drawn from the turns of the images: give them, or call eval()")
            _, N, E = logits_PNE.shape
            deviation_PNE = F.softplus(_route(x_PND, self.noise_weight, task_P))
            logits_PNE = logits_PNE + standard_normal(self.seed, stream_P3, tokens=N, width=E) * deviation_PNE
        return self._choose(logits_PNE.flatten(0, 1))

    def _choose(self, logits_SE: Tensor) -> Routing:
        probs_SE = logits_SE.softmax(dim=-1)
        kept = self.kept
        choosable_SQ = logits_SE if kept is None else logits_SE.index_select(1, kept)
        # A stable sort of logits breaks ties by index on every device, and still ranks what underflows in the softmax.
        ranking_SQ = choosable_SQ.detach().sort(dim=-1, descending=True, stable=True).indices
        experts_SK = ranking_SQ[:, : self.top_k].contiguous()  # a view would keep the whole ranking for backward
        columns_SK = experts_SK if kept is None else kept[experts_SK]
        if self.renormalize_gates:
            gates_SK = logits_SE.gather(1, columns_SK).softmax(dim=-1)  # = p / sum of chosen p, without 0 / 0
        else:
            gates_SK = probs_SE.gather(1, columns_SK)
        return Routing(probs_SE=probs_SE, gates_SK=gates_SK, experts_SK=experts_SK, logits_SE=logits_SE)


def seeded_generator(*key: int) -> torch.Generator:
    """Return a CPU generator whose stream depends on every number of `key`, and on nothing else."""
    seed = int(np.random.SeedSequence((len(key), *key)).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(seed)


def _route(x_PND: Tensor, weight_RDE: Tensor, task_P: Tensor | None) -> Tensor:
    """Return logits (P, N, E) float32 of each row under its router."""
    if task_P is None:
        assert weight_RDE.shape[0] == 1, "several routers need the task of each row"
        task_P = torch.zeros(len(x_PND), dtype=torch.int64, device=x_PND.device)
    logits_PNE: Tensor = _Route.apply(x_PND, weight_RDE, task_P)  # type: ignore[no-untyped-call]
    return logits_PNE


class _Route(torch.autograd.Function):
    """x[p] weight[task[p]] in float32; saves only its inputs.

    Tokens of another precision are cast again in backward: kept in float32 they would be the largest tensor of an
    expert layer. The gradient of the weight is a product with the one-hot matrix of the tasks, not a scatter:
    repeatable on every device.
    """

    @staticmethod
    def forward(ctx: Any, x_PND: Tensor, weight_RDE: Tensor, task_P: Tensor) -> Tensor:
        ctx.save_for_backward(x_PND, weight_RDE, task_P)
        return torch.bmm(x_PND.float(), weight_RDE.index_select(0, task_P).float())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PNE: Tensor) -> tuple[Tensor, Tensor, None]:
        x_PND, weight_RDE, task_P = ctx.saved_tensors
        weight_PED = weight_RDE.index_select(0, task_P).float().transpose(1, 2)
        grad_x_PND = torch.bmm(grad_PNE, weight_PED).to(x_PND.dtype)
        grad_PDE = torch.bmm(x_PND.float().transpose(1, 2), grad_PNE)
        member_RP = task_P == torch.arange(len(weight_RDE), device=task_P.device)[:, None]
        grad_RDE = (member_RP.float() @ grad_PDE.flatten(1)).view_as(weight_RDE)
        return grad_x_PND, grad_RDE.to(weight_RDE.dtype), None
