"""The plan of `data.balance: quota`: the tasks' shares in every batch, whatever labels are missing.

Every task walks its own shuffled passes over the samples that have its label; rare tasks wrap more often. Nothing is
laid out in advance: what comes at a position is computed from the position, the shards' label counts, and a few shards'
labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from data_pipeline.draws import generator
from data_pipeline.planning.labels import LabelTable
from data_pipeline.planning.pattern import TaskPattern
from data_pipeline.planning.plan import Ints, Plan, Slot, no_labels, samples_of, shard_bounds


class QuotaPlan(Plan):
    """Every position serves one task, by a `TaskPattern` of the shares.

    A batch of whole periods has exactly the shares, wherever it starts; with equal shares, the period is T. Any other
    batch is within one of equal shares, and within two of others.

    A task's n-th turn is the (n mod L)-th sample of its pass n // L, L the samples that have its label; each pass is a
    permutation of these. In pass k every task goes through the shards in the same random order, `window` of them at a
    time, whose samples are shuffled. So tasks of equal shares and labels use the same few shards; any task has no more
    than `window` in use.

    A slot's `epoch` is the number of its task's pass.
    """

    def __init__(
        self,
        shard_of: NDArray[np.int32],
        labels: LabelTable,
        *,
        seed: int,
        shares: Sequence[float],
        window: int,
        task_names: Sequence[str],
    ) -> None:
        """Prepare the plan of N samples and T tasks.

        Args:
            shard_of: (N,) shard of each sample, ascending.
            labels: of the N samples for the T tasks.
            seed: of the run.
            shares: T non-negative relative numbers of turns; a task of share 0 is never served.
            window: shards within which samples are shuffled.
            task_names: for messages.

        Raises:
            UserError: a task with a share has no labelled sample.
        """
        wanted = [share > 0 for share in shares]
        if not any(wanted):
            raise UserError("data.task_shares is 0 for every task of this run: give one a share")
        self._labels = labels.only(wanted)
        self._bounds = shard_bounds(shard_of)
        self._seed = seed
        self._window = window
        self._pattern = TaskPattern(shares, 1)
        self._counts, self.unlabelled = _count_by_shard(self._labels, self._bounds)
        if self.unlabelled == len(labels):
            raise no_labels(labels)
        self._totals = self._counts.sum(axis=1)
        for name, share, count in zip(task_names, shares, self._totals, strict=True):
            if share and not count:
                raise UserError(
                    f"none of the {len(labels)} training samples has a label of {name}, which data.balance: quota "
                    f"would give its share: set data.task_shares.{name}=0, or leave the task out"
                )
        # Two who look at different positions, the loader and what fetches shards ahead, find their parts again.
        self._pass = lru_cache(maxsize=2 * labels.tasks)(self._make_pass)
        self._block = lru_cache(maxsize=2 * labels.tasks)(self._make_block)

    def slots(self, position: int, count: int) -> list[Slot]:
        """Return the slots at positions [position, position + count) of the stream."""
        tasks, passes, samples = self._turns(position, count)
        turns = zip(samples.tolist(), tasks.tolist(), passes.tolist(), strict=True)
        return [Slot(sample, (task,), number) for sample, task, number in turns]

    def samples(self, position: int, count: int) -> Ints:
        """Return the (count,) samples of these slots."""
        return self._turns(position, count)[2]

    def _turns(self, position: int, count: int) -> tuple[Ints, Ints, Ints]:
        """Return (count,) tasks, passes of these tasks, and samples."""
        periods, places = np.divmod(position + np.arange(count), self._pattern.period)
        tasks = self._pattern.tasks[places, 0]
        units = periods * self._pattern.load[tasks] + self._pattern.unit[places, 0]
        passes, within = np.divmod(units, self._totals[tasks])
        samples = np.empty(count, np.int64)
        for task in np.unique(tasks).tolist():
            mine = np.flatnonzero(tasks == task)  # one unit of the task after the other
            while len(mine):
                part = self._part(task, int(passes[mine[0]]), int(within[mine[0]]))
                here = mine[: part.behind - int(within[mine[0]])]
                samples[here] = part.samples[within[here] - part.behind]  # counted from the end
                mine = mine[len(here) :]
        return tasks, passes, samples

    def _part(self, task: int, number: int, place: int) -> "_Part":
        """Return the part of a task's pass that a place of it lies in."""
        walk = self._pass(task, number)
        block = int(np.searchsorted(walk.ends, place, side="right"))
        return _Part(int(walk.ends[block]), self._block(task, number, block))

    def _make_pass(self, task: int, number: int) -> "_Pass":
        shards = generator("pass", self._seed, number).permutation(len(self._bounds) - 1)
        starts = np.arange(0, len(shards), self._window)
        return _Pass(shards, np.cumsum(np.add.reduceat(self._counts[task][shards], starts)))

    def _make_block(self, task: int, number: int, block: int) -> Ints:
        shards = self._pass(task, number).shards[block * self._window :][: self._window]
        rows = samples_of(self._bounds, shards)
        rng = generator("block", self._seed, task, number, block)
        return rng.permutation(rows[self._labels.has(task, rows)])


@dataclass(frozen=True)
class _Pass:
    """One task's way through the shards.

    Attributes:
        shards: (S,) in order.
        ends: (blocks,) labelled samples up to the end of each block of `window` shards.
    """

    shards: Ints
    ends: Ints


@dataclass(frozen=True)
class _Part:
    """The `samples` of a block, in order; `behind`: the place in the pass behind the last of them."""

    behind: int
    samples: Ints


def _count_by_shard(labels: LabelTable, bounds: Ints) -> tuple[Ints, int]:
    """Return (T, S) how many samples of a shard have a task's label, and how many samples have none at all."""
    counts = np.zeros((labels.tasks, len(bounds) - 1), np.int64)
    unlabelled = 0
    for shard, (first, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        codes = labels.codes(slice(first, end))
        unlabelled += int(np.count_nonzero(codes == 0))
        for task in range(labels.tasks):
            counts[task, shard] = np.count_nonzero(codes & codes.dtype.type(1 << task))
    return counts, unlabelled
