"""The search of `modsquad tune` over a finite space: asked for points, told their speeds.

After a few points drawn at random, optuna's TPE (arXiv 2304.11127) and steps from the fastest point so far, which
change one key, take turns: TPE says where to look, the steps see to it that nothing beside the fastest is missed. No
point is asked for twice: what TPE proposes and was tried, or cannot run, is replaced by the nearest point that is left.
So a budget as large as the space tries all of it. The same tells in the same order give the same asks.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cluster.tune_space import Point, Space
from configs.errors import UserError

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.distributions import BaseDistribution

_RANDOM_TRIALS = 3


class Search:
    """Asks for points of a space; several may be under way at a time."""

    def __init__(self, space: Space, *, seed: int = 0, first: Sequence[Point] = ()) -> None:
        """Begin with nothing tried.

        Args:
            space: what to search.
            seed: of TPE, any number of 0 or more.
            first: points to ask for before any other; those that are not in the space are left out.

        Raises:
            UserError: optuna is not installed.
        """
        try:
            import optuna  # noqa: PLC0415  # an extra
        except ImportError:
            raise UserError("tuning needs optuna: pip install 'modsquad[tune]'") from None
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._optuna, self._space = optuna, space
        self._places = [{value: place for place, value in enumerate(values)} for values in space.values.values()]
        self._ranges: dict[str, BaseDistribution] = {
            key: optuna.distributions.IntDistribution(0, len(values) - 1) for key, values in space.values.items()
        }
        sampler = optuna.samplers.TPESampler(
            seed=seed % 2**32,  # optuna takes no larger one
            n_startup_trials=_RANDOM_TRIALS,
            multivariate=True,
        )
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._left = dict.fromkeys(space.points)
        self._first = [point for point in dict.fromkeys(first) if point in self._left]
        self._asked: dict[Point, Trial] = {}
        self._speeds: dict[Point, float] = {}
        self._asks = 0

    def ask(self) -> Point | None:
        """Return a point that was not asked for before, or None when all were."""
        if not self._left:
            return None
        if self._first:
            return self._take(self._first.pop(0))
        self._asks += 1
        if self._asks > _RANDOM_TRIALS and self._asks % 2 and (point := self._beside_fastest()):
            return self._take(point)
        trial = self._study.ask(self._ranges)
        wanted = tuple(trial.params[key] for key in self._ranges)
        point = min(self._left, key=lambda point: _distance(self._indices(point), wanted))
        if self._indices(point) != wanted:
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)  # which TPE does not learn from
            return self._take(point)
        del self._left[point]
        self._asked[point] = trial
        return point

    def take(self, point: Point) -> None:
        """Count a point of the space as asked for, such as one that an earlier search has tried."""
        self._first = [other for other in self._first if other != point]
        self._take(point)

    def tell(self, point: Point, speed: float | None) -> None:
        """Tell the speed (higher is better) of a point that was asked for; None: it failed.

        What fails counts as slow as the slowest, so that the search keeps away from there without losing its scale.
        """
        if speed is not None:
            self._speeds[point] = speed
        slowest = min(self._speeds.values(), default=0.0)
        self._study.tell(self._asked.pop(point), slowest if speed is None else speed)

    def _beside_fastest(self) -> Point | None:
        """Return a point that is left and differs from the fastest in one key, by as little as possible."""
        if not self._speeds:
            return None
        fastest = self._indices(max(self._speeds, key=self._speeds.__getitem__))
        point = min(self._left, key=lambda point: _distance(self._indices(point), fastest))
        return point if _distance(self._indices(point), fastest)[0] == 1 else None

    def _take(self, point: Point) -> Point:
        self._study.enqueue_trial(dict(zip(self._ranges, self._indices(point), strict=True)))
        self._asked[point] = self._study.ask(self._ranges)
        del self._left[point]
        return point

    def _indices(self, point: Point) -> tuple[int, ...]:
        return tuple(places[value] for places, value in zip(self._places, point, strict=True))


def _distance(one: Sequence[int], other: Sequence[int]) -> tuple[int, int]:
    """How many values differ, then by how many places."""
    return sum(a != b for a, b in zip(one, other, strict=True)), sum(
        abs(a - b) for a, b in zip(one, other, strict=True)
    )
