"""What one expert layer says about its routing: sums over this rank's tokens, per task.

These sums are all that the matching loss, the ledger and the telemetry need. Blocks return them as plain tensors, so
that they survive activation checkpointing: nothing is stored on a module, nothing is counted twice by a recomputation.

Shape legend: R rows (images or pairs), N tokens of a row, S = R * N tokens, T tasks, E experts, K chosen experts.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from model.router import Routing


@dataclass(frozen=True, kw_only=True)
class ExpertLayerInfo:
    """The facts of one expert layer.

    Attributes:
        name: unique name, also the module's path inside the backbone, such as "blocks.3.mlp".
        kind: what its experts are.
        block: number of its block, from 0.
        num_experts: experts E over all ranks.
        top_k: experts K that each token uses.
        sees_task: whether it runs once per pair, so that the task can decide; False in blocks that run once per image.
    """

    name: str
    kind: Literal["attention", "mlp"]
    block: int
    num_experts: int
    top_k: int
    sees_task: bool


@dataclass(frozen=True, kw_only=True)
class LayerRouting:
    """Sums over this rank's tokens for one expert layer.

    A token of a pair counts for the pair's task. In a layer that sees no task, a token of an image counts once for
    every task that the image serves.

    Attributes:
        info: which layer.
        prob_sum_TE: (T, E) float32 with gradient, sum of the full softmax p(e | x, t).
        tokens_T: (T,) float32, tokens of each task.
        counts_TE: (T, E) int64, how often the K choices named each expert; no gradient.
        z_sum: scalar float32 with gradient, sum of logsumexp(logits)^2 (router z-loss, arXiv 2202.08906, eq. 5).
        entropy_sum_T: (T,) float32, sum of each token's softmax entropy in nats; no gradient.
    """

    info: ExpertLayerInfo
    prob_sum_TE: Tensor
    tokens_T: Tensor
    counts_TE: Tensor
    z_sum: Tensor
    entropy_sum_T: Tensor


# Tensors that `routing_sums` returns and `LayerRouting` holds beside `info`.
SUMS_PER_LAYER = 5


def routing_sums(routing: Routing, membership_TR: Tensor, kept: Tensor | None) -> tuple[Tensor, ...]:
    """Return the tensors of a `LayerRouting`, in the order of its attributes.

    Args:
        routing: of S = R * N tokens, row after row.
        membership_TR: (T, R) float32, how often row r counts for task t.
        kept: (E',) int64, the experts that `routing.experts_SK` indexes; None: all of them.
    """
    rows, experts = membership_TR.shape[1], routing.probs_SE.shape[-1]
    tokens = routing.probs_SE.shape[0] // max(rows, 1)
    # Sums over tokens first, then a product with the membership: no atomics, hence repeatable bit by bit.
    prob_sum_TE = membership_TR @ routing.probs_SE.view(rows, tokens, experts).sum(1)
    z_S = routing.logits_SE.logsumexp(-1).square()
    z_sum = (membership_TR.sum(0) * z_S.view(rows, tokens).sum(1)).sum()
    with torch.no_grad():
        entropy_S = torch.special.entr(routing.probs_SE).sum(-1)
        entropy_sum_T = membership_TR @ entropy_S.view(rows, tokens).sum(1)
        experts_SK = routing.experts_SK if kept is None else kept[routing.experts_SK]
        chosen_RA = experts_SK.reshape(rows, tokens * experts_SK.shape[-1])
        counts_RE = torch.zeros(rows, experts, dtype=torch.int64, device=chosen_RA.device)
        counts_RE.scatter_add_(1, chosen_RA, torch.ones_like(chosen_RA))
        # Integer products exist on the CPU only; float64 is exact up to 2^53 tokens.
        counts_TE = (membership_TR.double() @ counts_RE.double()).long()
    return prob_sum_TE, membership_TR.sum(1) * tokens, counts_TE, z_sum, entropy_sum_T
