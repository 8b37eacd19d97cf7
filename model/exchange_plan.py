"""Where the tokens of one rank go in one expert layer: pure arithmetic on the routing, without communication.

A token goes once to each rank where some of its experts compute. The exchange follows this plan, and what it will move
is told by the plan alone, for any number of ranks in one process.

Shape legend: S tokens of this rank, K experts chosen per token, C = S * K choices; M rows that leave (token, rank),
rank-major; R ranks of the group; slots: cells of a row, one per expert of its rank that it may use.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.expert_layout import ExpertLayout
from model.expert_order import inverse_of

COUNT_BYTES = 2 * 8
"""Bytes that a rank tells each other rank before an exchange: how many rows and choices it will send."""


@dataclass(frozen=True)
class ExchangePlan:
    """What leaves one rank.

    Attributes:
        slots: most experts of one rank that a token can have.
        counts_R2: (R, 2) int64, rows and choices bound for each rank.
        leave_C: (C,) int64, token-major number of each leaving choice; choices leave rank by rank, token by token.
        arrive_C: (C,) int64, its inverse.
        row_C: (C,) int64, row of each leaving choice, ascending.
        cell_C: (C,) int64, row * slots + slot of each leaving choice.
        expert_C: (C,) int64, number of its expert among those that compute at its rank.
    """

    slots: int
    counts_R2: Tensor
    leave_C: Tensor
    arrive_C: Tensor
    row_C: Tensor
    cell_C: Tensor
    expert_C: Tensor


def plan_exchange(experts_SK: Tensor, layout: ExpertLayout) -> ExchangePlan:
    """Return the plan for one layer call; the host does not wait for the device.

    Args:
        experts_SK: (S, K) int64, distinct experts per token.
        layout: where this rank finds them.
    """
    tokens, top_k = experts_SK.shape
    slots = min(top_k, layout.present)
    rank_C, number_C = layout.find(experts_SK.flatten())
    owner_C, leave_C = rank_C.sort(stable=True)
    key_C = owner_C * tokens + leave_C // top_k
    first_C = torch.ones_like(key_C, dtype=torch.bool)
    first_C[1:] = key_C[1:] != key_C[:-1]

    place_C = torch.arange(len(key_C), device=key_C.device)
    row_C = first_C.cumsum(0) - 1
    slot_C = place_C - torch.where(first_C, place_C, 0).cummax(0).values
    counts = torch.stack([first_C.long(), torch.ones_like(key_C)], dim=1)
    return ExchangePlan(
        slots=slots,
        counts_R2=owner_C.new_zeros(layout.ranks, 2).index_add_(0, owner_C, counts),
        leave_C=leave_C,
        arrive_C=inverse_of(leave_C),
        row_C=row_C,
        cell_C=row_C * slots + slot_C,
        expert_C=number_C[leave_C],
    )


@dataclass(frozen=True, kw_only=True)
class ExchangeBytes:
    """Bytes that leave one rank in one layer and step, forward and backward, as the exchange moves them.

    Attributes:
        moved: everything: rows with gates and expert codes, counts, and for attention queries and head outputs.
        bound: the least that the mathematics allows: each (token, other rank) pair's row out and home, and its
            gradient; for attention also one query and one head output per choice of another rank's expert.
        per_copy: what one row per chosen expert, weighted at home, would move, in place of one per rank.
    """

    moved: int
    bound: int
    per_copy: int


def exchange_bytes(
    plan: ExchangePlan, rank: int, *, width: int, item_bytes: int, choice_width: int = 0
) -> ExchangeBytes:
    """Return what the tokens of `rank` cause to move: out, home, and their gradients.

    Rows that other ranks send back count for the rank whose tokens they are: summed over ranks, this is what all send.

    Args:
        plan: of this rank's tokens.
        rank: its place in the group.
        width: D.
        item_bytes: bytes of a number: 4 for float32, 2 for bfloat16.
        choice_width: numbers per choice that go home and out again: d_h for attention, 0 for an MLP.
    """
    rows, choices = (plan.counts_R2.sum(0) - plan.counts_R2[rank]).tolist()
    of_choices = 4 * choices * choice_width * item_bytes
    counts = COUNT_BYTES * (len(plan.counts_R2) - 1)
    # Forward: row, gates and codes out, row home. Backward: row home's gradient out, row's and gates' gradient back.
    moved = rows * (4 * width + 3 * plan.slots) * item_bytes + of_choices + counts
    per_copy = choices * 4 * width * item_bytes + of_choices + counts
    return ExchangeBytes(moved=moved, bound=rows * 4 * width * item_bytes + of_choices, per_copy=per_copy)
