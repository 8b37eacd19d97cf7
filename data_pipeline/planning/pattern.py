"""A fixed pattern of tasks: which tasks are served at which position of an endless stream, from the shares alone.

The pattern repeats, so that any position is known at once, and knows neither samples nor batches.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from data_pipeline.planning.assignment import fair_budgets, pace_tasks, rotate_tasks

MAX_PERIOD = 4096
"""Longest pattern. Shares that would need a longer one are rounded to this many positions, at least one per task."""


class TaskPattern:
    """Tasks at the positions of an endless stream, m distinct ones at each.

    Over whole periods, each task gets its share exactly; no task gets more than one unit per position, and what is
    over goes to the others in proportion to their shares. Between, every prefix has every task within one unit of its
    rate, hence any run of positions within two. Equal shares: any two tasks within one of each other in any run.

    Attributes:
        period: Q, positions after which the pattern repeats.
        tasks: (Q, m) int64, the tasks of each position, ascending.
        load: (T,) int64, units of each task in a period.
        unit: (Q, m) int64, how many units of that task came before in the period.
    """

    def __init__(self, shares: Sequence[float], per_position: int) -> None:
        """Make the pattern.

        Args:
            shares: (T,) non-negative; tasks of share 0 are not in the pattern.
            per_position: m, at most the number of tasks with a share.
        """
        wanted = np.flatnonzero(shares)
        whole = _whole_shares([shares[task] for task in wanted.tolist()])
        if len(set(whole)) == 1:
            turns = rotate_tasks(0, len(whole) // math.gcd(len(whole), per_position), per_position, len(whole))
        else:
            load = _loads(whole, per_position)
            turns = np.nonzero(pace_tasks(load, int(load.sum()) // per_position))[1].reshape(-1, per_position)
        self.tasks: NDArray[np.int64] = np.sort(wanted[turns], axis=1)
        self.period = len(turns)
        self.load: NDArray[np.int64] = np.bincount(self.tasks.ravel(), minlength=len(shares))
        self.unit = np.zeros_like(self.tasks)
        for task in wanted:
            mine = self.tasks == task
            self.unit[mine] = np.arange(np.count_nonzero(mine))


def _whole_shares(shares: Sequence[float]) -> list[int]:
    """Return the least whole numbers of the same proportions; decimals are meant as they are written."""
    exact = [Fraction(repr(float(share))) for share in shares]
    scale = math.lcm(*(share.denominator for share in exact))
    whole = [int(share * scale) for share in exact]
    divisor = math.gcd(*whole)
    return [share // divisor for share in whole]


def _loads(shares: list[int], per_position: int) -> NDArray[np.int64]:
    """Return each task's units in one period.

    A task whose share is over one unit per position gets just that, and the rest is divided anew.
    """
    full: set[int] = set()
    while True:
        rest = sum(share for task, share in enumerate(shares) if task not in full)
        over = {t for t, share in enumerate(shares) if t not in full and (per_position - len(full)) * share >= rest}
        if not over:
            break
        full |= over
    free = per_position - len(full)
    if not free:
        return np.array([int(task in full) for task in range(len(shares))])
    units = [rest if task in full else free * share for task, share in enumerate(shares)]
    divisor = math.gcd(rest, *units)
    if rest // divisor <= MAX_PERIOD:
        return np.array([unit // divisor for unit in units])
    parts = np.array([float(Fraction(share, sum(shares))) for share in shares])
    load: NDArray[np.int64] = fair_budgets(
        np.ones((1, len(shares)), np.bool_), np.array([MAX_PERIOD]), per_position, parts
    )[0]
    missing = load == 0
    load[missing] = 1
    load[load.argmax()] -= np.count_nonzero(missing)
    return load
