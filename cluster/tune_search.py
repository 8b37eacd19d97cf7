"""The search of `modsquad tune`: optuna's TPE (arXiv 2304.11127) over a finite space, asked for points and told speeds.

No point is asked for twice: what TPE proposes and was tried, or cannot run, is replaced by the nearest point that is
left. So a budget as large as the space tries all of it. The same tells in the same order give the same asks.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cluster.tune_space import Point, Space
from configs.errors import UserError

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.distributions import BaseDistribution

_RANDOM_TRIALS = 5


class Search:
    """Asks for points of a space; several may be under way at a time."""

    def __init__(self, space: Space, *, seed: int = 0, first: Sequence[Point] = ()) -> None:
        """Begin with nothing tried.

        Args:
            space: what to search.
            seed: of TPE.
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
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=_RANDOM_TRIALS, multivariate=True)
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._left = dict.fromkeys(space.points)
        self._first = [point for point in dict.fromkeys(first) if point in self._left]
        self._asked: dict[Point, Trial] = {}
        self._speeds: list[float] = []

    def ask(self) -> Point | None:
        """Return a point that was not asked for before, or None when all were."""
        if not self._left:
            return None
        if self._first:
            return self._take(self._first.pop(0))
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
            self._speeds.append(speed)
        self._study.tell(self._asked.pop(point), speed if speed is not None else min(self._speeds, default=0.0))

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
