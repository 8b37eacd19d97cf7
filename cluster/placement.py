"""Which rank owns which experts, which are shadowed, and whose pairs a rank serves: few tokens leave their rank.

After matching, a task uses few experts. Tasks are put in an order; a global batch sorted by it and cut into equal parts
gives each rank of an expert group few tasks (`home_shares`). Experts go to ranks, equally many to each, where the tasks
that choose them live and beside those chosen with them. The weights of a few experts travel to all ranks instead of
their tokens (shadowed experts, model.expert_layout): those that tasks everywhere choose, or that are too busy for one
rank. All is found together by local search on the expected bytes: a token of task t visits rank r with probability 1 -
prod over the rank's experts of (1 - share_te), as if its choices were independent; with the sharp shares of a matched
model that is nearly exact. A pure function of the usage ledger.

Shape legend: T tasks, E experts of a layer, R ranks of an expert group.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LOAD_LIMIT = 1.2
"""Most expected work of a rank in any layer, over an even share of it, where the experts' own loads allow that. On
images that the ledger has not seen it becomes a little more: at most 1.25 is wanted there."""
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
        shadow_bytes: what shadowing one expert costs, of all ranks together, per token of the expert group.
    """

    shares_TE: Floats
    row_bytes: float
    choice_bytes: float = 0.0
    shadow_bytes: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where experts and pairs go.

    Attributes:
        task_order: all tasks, in the order in which their pairs fill the ranks of an expert group.
        layers: layer name -> where its experts are.
    """

    task_order: tuple[int, ...]
    layers: dict[str, "LayerPlaces"]


@dataclass(frozen=True, kw_only=True)
class LayerPlaces:
    """Where the experts of one layer are.

    Attributes:
        order: the expert at each place; rank r owns the places [r * E / R, (r + 1) * E / R).
        shadowed: the experts whose weights travel, ascending.
    """

    order: tuple[int, ...]
    shadowed: tuple[int, ...] = ()


def place(
    layers: Mapping[str, LayerUse],
    task_weights: Sequence[float],
    ranks: int,
    *,
    most_shadowed: int = 0,
    load_limit: float = LOAD_LIMIT,
) -> Placement:
    """Return the placement with the fewest expected bytes that was found; the same for the same arguments.

    Args:
        layers: layer name -> its use; R divides the experts of each.
        task_weights: (T,) relative number of pairs of each task.
        ranks: R.
        most_shadowed: experts of a layer that may be shadowed; only as many are as save bytes or relieve busy ranks.
        load_limit: see `LOAD_LIMIT`; counts for more than bytes.
    """
    weights = np.asarray(task_weights, np.float64)
    weights = weights / weights.sum()
    searches = [_LayerSearch(use, weights, ranks, most_shadowed, load_limit) for use in layers.values()]
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
        layers={name: found.places() for name, found in zip(layers, placed, strict=True)},
    )


def expected_bytes(
    layers: Mapping[str, LayerUse], placement: Placement, task_weights: Sequence[float], ranks: int
) -> float:
    """Return what all layers move, forward and backward, per token of the expert group; arguments as in `place`."""
    weights = np.asarray(task_weights, np.float64)
    home_TR = home_shares(placement.task_order, weights / weights.sum(), ranks)
    return sum(
        _LayerSearch(use, home_TR.sum(1), ranks, 0, np.inf).cost(_State.of(placement.layers[name], ranks), home_TR)
        for name, use in layers.items()
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


def rank_loads(use: LayerUse, places: LayerPlaces, home_TR: Floats) -> Floats:
    """Return (R,): the choices that each rank's experts serve in a layer, over an even share of them.

    Args:
        use: of the layer.
        places: of its experts.
        home_TR: as from `home_shares`.
    """
    ranks = home_TR.shape[1]
    return _LayerSearch(use, home_TR.sum(1), ranks, 0, LOAD_LIMIT).loads(_State.of(places, ranks), home_TR)


@dataclass(frozen=True)
class _State:
    """The rank that owns each expert (E,), and whether it is shadowed (E,)."""

    rank_E: Ints
    shadowed_E: NDArray[np.bool_]

    @classmethod
    def of(cls, places: LayerPlaces, ranks: int) -> "_State":
        experts = np.arange(len(places.order))
        rank_E = np.empty(len(experts), np.int64)
        rank_E[list(places.order)] = experts // (len(experts) // ranks)
        return cls(rank_E, np.isin(experts, places.shadowed))

    def places(self) -> LayerPlaces:
        return LayerPlaces(
            order=tuple(np.argsort(self.rank_E, kind="stable").tolist()),
            shadowed=tuple(np.flatnonzero(self.shadowed_E).tolist()),
        )


class _LayerSearch:
    """Places the experts of one layer, for homes of the tasks that the caller varies."""

    def __init__(self, use: LayerUse, weights: Floats, ranks: int, most_shadowed: int, load_limit: float) -> None:
        self._use, self._weights, self._ranks, self._limit = use, weights, ranks, load_limit
        self._most_shadowed = most_shadowed
        self._log_TE = np.log1p(-use.shares_TE.clip(0, _MOST))
        self._even = ranks / max((weights @ use.shares_TE).sum(), 1e-300)  # 1 over an even rank's load
        top_k = use.shares_TE.sum(1).max()
        self._overload = _OVERLOAD * (use.row_bytes + use.choice_bytes) * top_k

    def place(self, home_TR: Floats) -> _State:
        """Return the best assignment choice by choice, after the best swaps of two experts and the best shadows."""
        experts = self._use.shares_TE.shape[1]
        local = experts // self._ranks
        kept_ER = self._use.shares_TE.T @ home_TR  # choices that stay at home with expert e on rank r
        expert, slot = linear_sum_assignment(-np.repeat(kept_ER, local, axis=1))
        rank_E = np.empty(experts, np.int64)
        rank_E[expert] = slot // local
        state = self._swapped(_State(rank_E, np.zeros(experts, bool)), home_TR)
        while state.shadowed_E.sum() < self._most_shadowed:
            gain, shadow = self._best_shadow(state, home_TR)
            if gain <= 1e-9 * self._overload:
                break
            shadowed_E = state.shadowed_E | (np.arange(experts) == shadow)
            state = self._swapped(_State(state.rank_E, shadowed_E), home_TR)
        return state

    def cost(self, state: _State, home_TR: Floats) -> float:
        """Return the expected bytes per token, and the price of overload."""
        logs_TR, choices_TR = self._sums(state)
        arriving_R = self._arriving(logs_TR, choices_TR, self._weights[:, None] - home_TR)
        shadows = self._use.shadow_bytes * state.shadowed_E.sum()
        return float(arriving_R.sum() + self._price(self.loads(state, home_TR)).sum() + shadows)

    def task_cost(self, state: _State) -> Floats:
        """Return (T, R): the bytes of a token of task t that lives on rank r."""
        logs_TR, choices_TR = self._sums(state)
        bytes_TR = self._use.row_bytes * -np.expm1(logs_TR) + self._use.choice_bytes * choices_TR
        cost: Floats = bytes_TR.sum(1, keepdims=True) - bytes_TR
        return cost

    def loads(self, state: _State, home_TR: Floats) -> Floats:
        """Return (R,) load of each rank over an even one: tokens choose a shadowed expert at home."""
        load_RE = np.where(state.shadowed_E, home_TR.T @ self._use.shares_TE, 0)
        owned_E = np.where(state.shadowed_E, 0, self._weights @ self._use.shares_TE)
        loads: Floats = (load_RE.sum(1) + np.bincount(state.rank_E, owned_E, self._ranks)) * self._even
        return loads

    def _sums(self, state: _State) -> tuple[Floats, Floats]:
        """Return (T, R) of each rank's unshadowed experts: the log-probability of no visit, and the choices."""
        holds_ER = np.eye(self._ranks)[state.rank_E] * ~state.shadowed_E[:, None]
        return self._log_TE @ holds_ER, self._use.shares_TE @ holds_ER

    def _arriving(self, logs: Floats, choices: Floats, away: Floats) -> Floats:
        """Return (...) bytes that arrive from elsewhere: of (T, ...) logs, choices and weights away."""
        bytes_T = self._use.row_bytes * -np.expm1(logs) + self._use.choice_bytes * choices
        arriving: Floats = (away * bytes_T).sum(0)
        return arriving

    def _price(self, load: Floats) -> Floats:
        price: Floats = self._overload * (load - self._limit).clip(min=0)
        return price

    def _swapped(self, state: _State, home_TR: Floats) -> _State:
        """Return the state after the best swaps of two experts, while there are any."""
        rank_E = state.rank_E.copy()
        while True:
            state = _State(rank_E, state.shadowed_E)
            gain, first, second = self._best_swap(state, home_TR)
            if gain <= 1e-9 * self._overload:
                return state
            rank_E[[first, second]] = rank_E[[second, first]]

    def _best_swap(self, state: _State, home_TR: Floats) -> tuple[float, int, int]:
        """Return (gain, expert, expert) of the swap that saves most; a shadowed expert brings nothing along."""
        rank_E = state.rank_E
        logs_TR, choices_TR = self._sums(state)
        load_R = self.loads(state, home_TR)
        away_TR = self._weights[:, None] - home_TR
        before_E = (self._arriving(logs_TR, choices_TR, away_TR) + self._price(load_R))[rank_E]
        log, share = (np.where(state.shadowed_E, 0, x) for x in (self._log_TE, self._use.shares_TE))
        even = self._weights @ share * self._even
        # The rank of e with f in place of e, for all e and f.
        after_EE = self._arriving(
            (logs_TR[:, rank_E] - log)[:, :, None] + log[:, None, :],
            (choices_TR[:, rank_E] - share)[:, :, None] + share[:, None, :],
            away_TR[:, rank_E][:, :, None],
        ) + self._price((load_R[rank_E] - even)[:, None] + even[None, :])
        gain_EE = before_E[:, None] + before_E[None, :] - after_EE - after_EE.T
        gain_EE[rank_E[:, None] == rank_E[None, :]] = -np.inf
        first, second = divmod(int(gain_EE.argmax()), len(rank_E))
        return float(gain_EE[first, second]), first, second

    def _best_shadow(self, state: _State, home_TR: Floats) -> tuple[float, int]:
        """Return (gain, expert) of the expert whose shadowing saves most."""
        rank_E, shares_TE = state.rank_E, self._use.shares_TE
        logs_TR, choices_TR = self._sums(state)
        away_TR = self._weights[:, None] - home_TR
        without_E = self._arriving(
            logs_TR[:, rank_E] - self._log_TE, choices_TR[:, rank_E] - shares_TE, away_TR[:, rank_E]
        )
        saved_E = self._arriving(logs_TR, choices_TR, away_TR)[rank_E] - without_E
        load_R = self.loads(state, home_TR)
        moved_RE = home_TR.T @ shares_TE - np.eye(self._ranks)[rank_E].T * (self._weights @ shares_TE)
        relief_E = self._price(load_R).sum() - self._price(load_R[:, None] + moved_RE * self._even).sum(0)
        gain_E = np.where(state.shadowed_E, -np.inf, saved_E + relief_E - self._use.shadow_bytes)
        return float(gain_E.max()), int(gain_E.argmax())


_Found = tuple[float, Ints, list[_State]]
"""Expected bytes and overload, order of tasks, where each layer's experts are."""


def _cost(found: _Found) -> float:
    return found[0]


def _search(searches: Sequence[_LayerSearch], weights: Floats, order: Ints, ranks: int) -> _Found:
    """Place experts and order tasks in turns, while that helps."""
    best: _Found = (np.inf, order, [])
    for _ in range(_ROUNDS):
        home_TR = home_shares(order.tolist(), weights, ranks)
        placed = [layer.place(home_TR) for layer in searches]
        cost = sum(layer.cost(state, home_TR) for layer, state in zip(searches, placed, strict=True))
        if cost >= best[0] * (1 - 1e-9):
            break
        best = (cost, order, placed)
        task_cost = sum(
            (layer.task_cost(state) for layer, state in zip(searches, placed, strict=True)), np.zeros(home_TR.shape)
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
