"""Task affinity: how far two tasks use the same experts, from the routing ledger.

With u[t, l, e] = counts / (K * tokens), the share of task t's choices in layer l that fell on expert e,

    affinity(s, t) = mean over layers l of  sum_e min(u[s, l, e], u[t, l, e])
                   = mean over layers l of  1 - total variation(u[s, l], u[t, l])

is the share of their choices that two tasks have in common: 1 for equal use, 0 for disjoint experts. Layers that see
no task are left out: there all tasks of an image use the same experts by construction.

Shape legend: T tasks, E experts, K chosen experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
from scipy.spatial.distance import squareform

from model.routing_stats import RoutingLedger

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Affinity:
    """Which tasks are alike.

    Attributes:
        tasks: names of the T tasks.
        affinity_TT: (T, T) in [0, 1]; NaN for a task without tokens.
        tree: (T - 1, 4), scipy's linkage of 1 - affinity by average distance, leaves in the order that puts like beside
            like (Bar-Joseph et al., Bioinformatics 2001); an unknown affinity counts as 0 here. Empty for one task.
        order: the tasks as the tree's leaves, from first to last.
    """

    tasks: tuple[str, ...]
    affinity_TT: Floats
    tree: Floats
    order: tuple[int, ...]


def task_affinity(ledger: RoutingLedger) -> Affinity | None:
    """Return the affinities of a run's tasks; None where no expert layer sees the task."""
    shares = [expert_shares(ledger, info.name) / info.top_k for info in ledger.layers if info.sees_task]
    return affinity_of(ledger.tasks, shares) if shares else None


def affinity_of(tasks: Sequence[str], shares: Sequence[Floats]) -> Affinity:
    """Return the affinities of tasks.

    Args:
        tasks: names of the T tasks.
        shares: one per layer, (T, E) distributions over its experts; rows sum to 1, or are NaN throughout.
    """
    affinity_TT = np.mean([np.minimum(u_TE[:, None], u_TE).sum(-1) for u_TE in shares], axis=0)
    if len(tasks) < 2:
        return Affinity(tasks=tuple(tasks), affinity_TT=affinity_TT, tree=np.empty((0, 4)), order=(0,))
    # Rounding may leave an affinity just above 1, and the diagonal just off 0.
    distance = squareform((1 - np.nan_to_num(affinity_TT)).clip(min=0), checks=False)
    tree = optimal_leaf_ordering(linkage(distance, method="average"), distance)
    order = tuple(int(task) for task in leaves_list(tree))
    return Affinity(tasks=tuple(tasks), affinity_TT=affinity_TT, tree=tree, order=order)


def expert_shares(ledger: RoutingLedger, layer: str) -> Floats:
    """Return (T, E): the share of each task's tokens that chose each expert; a row sums to K, NaN without tokens."""
    share_TE = ledger.counts[layer].cpu().double() / ledger.tokens[layer].cpu()[:, None]
    return np.asarray(share_TE.numpy(), dtype=np.float64)
