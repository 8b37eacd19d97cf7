"""Which rank holds which experts, and whose pairs it serves, so that few tokens leave their rank.

After matching, a task uses few experts. Tasks are put in an order; a global batch sorted by it and cut into equal parts
gives each rank of an expert group few tasks (`home_shares`). Experts go to ranks, equally many to each, where the tasks
that choose them live and beside those chosen with them. Both are found together by local search on the expected bytes:
a token of task t visits rank r with probability 1 - prod over the rank's experts of (1 - share_te), as if its choices
were independent; with the sharp shares of a matched model that is nearly exact. A pure function of the usage ledger.

Shape legend: T tasks, E experts of a layer, R ranks of an expert group.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LOAD_LIMIT = 1.25
"""Most work of a rank in any layer, over an even share of it, where the experts' own loads allow that."""
_STARTS = 12  # local searches, each from its own order of tasks
_SHAKES, _SHAKEN = 60, 4  # then searches from the best order with so many tasks mixed up
_ROUNDS = 8  # of placing experts and ordering tasks, in one search
_OVERLOAD = 100.0  # cost of a whole even share above the limit, in units of all bytes of a layer
_MOST = 1 - 1e-6  # a share of 1 would have the logarithm of 0


@dataclass(frozen=True, kw_only=True)
class LayerUse:
    """How the tasks use one expert layer.

    Attributes:
        shares_TE: (T, E) share of each task's tokens that choose each expert; a row sums to K, or to 0 if never seen.
        row_bytes: what one token costs for each other rank that it visits.
        choice_bytes: what each choice of another rank's expert costs on top: queries and head outputs of attention.
    """

    shares_TE: Floats
    row_bytes: float
    choice_bytes: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where experts and pairs go.

    Attributes:
        task_order: all tasks, in the order in which their pairs fill the ranks of an expert group.
        experts: layer name -> its expert at each place; rank r holds the places [r * E / R, (r + 1) * E / R).
    """

    task_order: tuple[int, ...]
    experts: dict[str, tuple[int, ...]]


def place(
    layers: Mapping[str, LayerUse], task_weights: Sequence[float], ranks: int, *, load_limit: float = LOAD_LIMIT
) -> Placement:
    """Return the placement with the fewest expected bytes that was found; the same for the same arguments.

    Args:
        layers: layer name -> its use; R divides the experts of each.
        task_weights: (T,) relative number of pairs of each task.
        ranks: R.
        load_limit: see `LOAD_LIMIT`; counts for more than bytes.
    """
    weights = np.asarray(task_weights, np.float64)
    weights = weights / weights.sum()
    searches = [_LayerSearch(use, weights, ranks, load_limit) for use in layers.values()]
    rng = np.random.default_rng(0)
    best = min((_search(searches, weights, rng.permutation(len(weights)), ranks) for _ in range(_STARTS)), key=_cost)
    for _ in range(_SHAKES):
        order = best[1].copy()
        shaken = rng.choice(len(order), min(_SHAKEN, len(order)), replace=False)
        order[shaken] = order[rng.permutation(shaken)]
        best = min(best, _search(searches, weights, order, ranks), key=_cost)
    _, order, placed = best
    return Placement(
        task_order=tuple(order.tolist()),
        experts={name: tuple(experts.tolist()) for name, experts in zip(layers, placed, strict=True)},
    )


def home_shares(task_order: Sequence[int], weights: Floats, ranks: int) -> Floats:
    """Return (T, R): the part of all pairs that are of task t and live on rank r; columns sum to 1 / R.

    Args:
        task_order: all tasks.
        weights: (T,) part of all pairs of each task; sums to 1.
        ranks: R.
    """
    ends = np.cumsum(weights[list(task_order)])
    cuts = np.arange(ranks + 1) / ranks
    overlap = np.minimum(ends[:, None], cuts[1:]) - np.maximum((ends - weights[list(task_order)])[:, None], cuts[:-1])
    shares = np.empty_like(overlap)
    shares[list(task_order)] = overlap.clip(min=0)
    return shares


def rank_loads(use: LayerUse, experts: Sequence[int], weights: Floats, ranks: int) -> Floats:
    """Return (R,): the choices that each rank's experts serve in a layer, over an even share of them.

    Args:
        use: of the layer.
        experts: its expert at each place.
        weights: (T,) part of all pairs of each task.
        ranks: R.
    """
    load_E = weights @ use.shares_TE
    loads: Floats = load_E[list(experts)].reshape(ranks, -1).sum(1) * ranks / max(load_E.sum(), 1e-300)
    return loads


class _LayerSearch:
    """Places the experts of one layer, for homes of the tasks that the caller varies."""

    def __init__(self, use: LayerUse, weights: Floats, ranks: int, load_limit: float) -> None:
        self._use, self._weights, self._ranks, self._limit = use, weights, ranks, load_limit
        self._log_TE = np.log1p(-use.shares_TE.clip(0, _MOST))
        load_E = weights @ use.shares_TE
        self._even_E = load_E * ranks / max(load_E.sum(), 1e-300)  # each expert's load over an even rank's
        top_k = use.shares_TE.sum(1).max()
        self._overload = _OVERLOAD * (use.row_bytes + use.choice_bytes) * top_k

    def place(self, home_TR: Floats) -> Ints:
        """Return the expert at each place: the best assignment choice by choice, then the best swaps of two experts."""
        experts = self._use.shares_TE.shape[1]
        local = experts // self._ranks
        kept_ER = self._use.shares_TE.T @ home_TR  # choices that stay at home with expert e on rank r
        expert, slot = linear_sum_assignment(-np.repeat(kept_ER, local, axis=1))
        rank_E = np.empty(experts, np.int64)
        rank_E[expert] = slot // local
        away_TR = self._weights[:, None] - home_TR
        while True:
            gain, first, second = self._best_swap(rank_E, away_TR)
            if gain <= 1e-9 * self._overload:
                return np.argsort(rank_E, kind="stable")
            rank_E[[first, second]] = rank_E[[second, first]]

    def cost(self, placed: Ints, home_TR: Floats) -> float:
        """Return the expected bytes per token, and the price of overload."""
        rank_E = self._ranks_of(placed)
        logs_TR, choices_TR, load_R = self._sums(rank_E)
        return float(self._rank_cost(logs_TR, choices_TR, load_R, self._weights[:, None] - home_TR).sum())

    def task_cost(self, placed: Ints) -> Floats:
        """Return (T, R): the bytes of a token of task t that lives on rank r."""
        logs_TR, choices_TR, _ = self._sums(self._ranks_of(placed))
        bytes_TR = self._use.row_bytes * -np.expm1(logs_TR) + self._use.choice_bytes * choices_TR
        cost: Floats = bytes_TR.sum(1, keepdims=True) - bytes_TR
        return cost

    def _ranks_of(self, placed: Ints) -> Ints:
        rank_E = np.empty_like(placed)
        rank_E[placed] = np.arange(len(placed)) // (len(placed) // self._ranks)
        return rank_E

    def _sums(self, rank_E: Ints) -> tuple[Floats, Floats, Floats]:
        holds_ER = np.eye(self._ranks)[rank_E]
        return self._log_TE @ holds_ER, self._use.shares_TE @ holds_ER, self._even_E @ holds_ER

    def _rank_cost(self, logs: Floats, choices: Floats, load: Floats, away: Floats) -> Floats:
        """Return what arrives at ranks from elsewhere: (T, ...) logs, choices and weights away, (...) loads."""
        bytes_T = self._use.row_bytes * -np.expm1(logs) + self._use.choice_bytes * choices
        cost: Floats = (away * bytes_T).sum(0) + self._overload * (load - self._limit).clip(min=0)
        return cost

    def _best_swap(self, rank_E: Ints, away_TR: Floats) -> tuple[float, int, int]:
        """Return (gain, expert, expert) of the swap that saves most."""
        logs_TR, choices_TR, load_R = self._sums(rank_E)
        before_E = self._rank_cost(logs_TR, choices_TR, load_R, away_TR)[rank_E]
        # The rank of e with f in place of e, for all e and f.
        log, share, even = self._log_TE, self._use.shares_TE, self._even_E
        after_EE = self._rank_cost(
            (logs_TR[:, rank_E] - log)[:, :, None] + log[:, None, :],
            (choices_TR[:, rank_E] - share)[:, :, None] + share[:, None, :],
            (load_R[rank_E] - even)[:, None] + even[None, :],
            away_TR[:, rank_E][:, :, None],
        )
        gain_EE = before_E[:, None] + before_E[None, :] - after_EE - after_EE.T
        gain_EE[rank_E[:, None] == rank_E[None, :]] = -np.inf
        first, second = divmod(int(gain_EE.argmax()), len(rank_E))
        return float(gain_EE[first, second]), first, second


_Found = tuple[float, Ints, list[Ints]]
"""Expected bytes and overload, order of tasks, places of each layer."""


def _cost(found: _Found) -> float:
    return found[0]


def _search(searches: Sequence[_LayerSearch], weights: Floats, order: Ints, ranks: int) -> _Found:
    """Place experts and order tasks in turns, while that helps."""
    best: _Found = (np.inf, order, [])
    for _ in range(_ROUNDS):
        home_TR = home_shares(order.tolist(), weights, ranks)
        placed = [layer.place(home_TR) for layer in searches]
        cost = sum(layer.cost(places, home_TR) for layer, places in zip(searches, placed, strict=True))
        if cost >= best[0] * (1 - 1e-9):
            break
        best = (cost, order, placed)
        task_cost = sum(
            (layer.task_cost(p) for layer, p in zip(searches, placed, strict=True)), np.zeros(home_TR.shape)
        )
        order = _order_tasks(order, task_cost, weights, ranks)
    return best


def _order_tasks(order: Ints, cost_TR: Floats, weights: Floats, ranks: int) -> Ints:
    """Move one task to another turn, again and again, always where it saves most."""

    def cost_of(candidate: Ints) -> float:
        return float((home_shares(candidate.tolist(), weights, ranks) * cost_TR).sum())

    cost = cost_of(order)
    while True:
        moved = [
            np.insert(np.delete(order, i), j, order[i]) for i in range(len(order)) for j in range(len(order)) if i != j
        ]
        costs = [cost_of(candidate) for candidate in moved]
        if not costs or min(costs) >= cost * (1 - 1e-9):
            return order
        best = int(np.argmin(costs))
        order, cost = moved[best], costs[best]
