"""Batches for the trainer and for evaluation, read ahead by worker processes.

The loaders decide *what* to read in the trainer's process, from the plan; workers are stateless and only read and
decode it. So the batches do not depend on the number of workers, and nothing in a worker needs to be saved.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, get_worker_info

from configs.errors import UserError
from configs.schema import DataConfig
from configs.tasks import TaskSpec
from data_pipeline.batch import Batch
from data_pipeline.block import Parcel
from data_pipeline.cursor import Cursor
from data_pipeline.draws import Augment
from data_pipeline.planning.dealing import TaskHomes, deal_pairs, deal_slots
from data_pipeline.planning.plan import Slot, samples_of, shard_bounds
from data_pipeline.planning.planner import make_plan
from data_pipeline.reading import read_batch
from data_pipeline.remote.read_ahead import ReadAhead
from data_pipeline.shards import ShardIndex
from data_pipeline.tolerant import read_whole_members
from data_pipeline.workers import serve_the_trainer, worker_context

# Micro-batches that each worker keeps ready.
_PREFETCH = 2
# Enough places of an index for its average.
_SPREAD_SHARDS = 32


@dataclass(frozen=True)
class Request:
    """One micro-batch to read.

    Attributes:
        slots: its images and their tasks.
        global_pairs: (T,) int64 pairs of each task in the global batch that it is a part of.
    """

    slots: tuple[Slot, ...]
    global_pairs: NDArray[np.int64]


class _Loader(ABC):
    """Iterates over the batches of a sequence of requests; a new iteration ends the one before."""

    def __init__(
        self,
        index: ShardIndex,
        tasks: Sequence[TaskSpec],
        workers: int,
        augment: Augment | None,
        *,
        tolerant: bool = False,
    ) -> None:
        self._index = index
        self._tasks = tuple(tasks)
        self._workers = workers
        self._reader = _Reader(index, self._tasks, augment, tolerant)
        self._batches: Iterator[Batch | Parcel | UserError] | None = None
        self._turn = 0

    @abstractmethod
    def _requests(self) -> Iterator[Request]:
        """Yield what to read, in order."""

    def __iter__(self) -> Iterator[Batch]:
        """Start to read ahead, at once, and return the batches."""
        self.close()
        self._batches = iter(
            DataLoader(
                self._reader,
                batch_size=None,
                sampler=self._requests(),
                num_workers=self._workers,
                collate_fn=_unchanged,
                prefetch_factor=_PREFETCH if self._workers else None,
                multiprocessing_context=worker_context() if self._workers else None,
                # Without its own generator DataLoader draws from torch's global one, which is not ours to move.
                generator=torch.Generator(),
                worker_init_fn=serve_the_trainer if self._workers else None,
            )
        )
        return self._serve(self._turn)

    def _serve(self, turn: int) -> Iterator[Batch]:
        # Only the attribute holds the iterator, so that `close` ends its workers.
        try:
            while turn == self._turn and self._batches is not None:
                batch = _next_batch(self._batches)
                if batch is None:
                    return
                if isinstance(batch, UserError):
                    raise batch
                yield batch
        finally:
            if turn == self._turn:
                self.close()

    def close(self) -> None:
        """End the workers, close the shards, and end an iteration that is under way."""
        self._turn += 1
        self._batches = None
        self._index.close()


class TrainLoader(_Loader):
    """This rank's micro-batches of `steps` global batches, from the cursor's position on.

    Step s uses positions [p, p + images_per_step) of the plan, p = cursor.position + s * images_per_step. They are
    dealt to (accumulation step, rank); the union over both is the same for any world.

    Attributes:
        plan: the order of samples and tasks; `plan.unlabelled` counts the samples that no task can use.
    """

    def __init__(
        self,
        index: ShardIndex,
        config: DataConfig,
        tasks: Sequence[TaskSpec],
        *,
        images_per_step: int,
        micro_batch: int,
        rank: int,
        world: int,
        seed: int,
        cursor: Cursor,
        steps: int,
        homes: TaskHomes | None = None,
    ) -> None:
        """Prepare the stream.

        Args:
            index: training shards.
            config: workers, tasks per image, shares, window, augmentation.
            tasks: the run's T tasks.
            images_per_step: images of a global batch; a multiple of micro_batch * world.
            micro_batch: images per rank and forward pass.
            rank: of this process.
            world: number of ranks.
            seed: of the run.
            cursor: where to start.
            steps: global batches to yield.
            homes: which ranks get which tasks; None: all ranks alike.

        Raises:
            UserError: the cursor belongs to other shards or another seed, no sample has a wanted label, or the global
                batch cannot be dealt evenly, or the cache of remote shards is too small.
        """
        augment = Augment(seed, config.augment)
        super().__init__(index, tasks, config.workers, augment, tolerant=config.max_bad_samples > 0)
        cursor.check(index, seed)
        if images_per_step % (micro_batch * world):
            raise UserError(
                f"train.images_per_step {images_per_step} is not a multiple of micro_batch {micro_batch} x {world} "
                "ranks: change one of them"
            )
        self.plan = make_plan(index, config, tasks, seed)
        self._images_per_step = images_per_step
        self._parts = images_per_step // micro_batch
        self._rank = rank
        self._world = world
        self._start = cursor.position
        self._steps = steps
        # DataLoader asks for so many micro-batches before it hands over the first one.
        requested = max(1, config.workers * _PREFETCH)
        self._in_flight = images_per_step * (1 + math.ceil(requested * world / self._parts))
        self._read_ahead().check_room(self._in_flight)
        self._homes = homes

    def __len__(self) -> int:
        """Micro-batches of this rank."""
        return self._steps * self._parts // self._world

    def _requests(self) -> Iterator[Request]:
        with self._read_ahead() as ahead:
            for step in range(self._steps):
                first = self._start + step * self._images_per_step
                ahead.advance(first - self._in_flight, first + self._images_per_step)
                yield from self._deal(self.plan.slots(first, self._images_per_step))

    def _read_ahead(self) -> ReadAhead:
        end = self._start + self._steps * self._images_per_step
        cycle = len(self._index) - self.plan.unlabelled
        return ReadAhead(self._index, self.plan.samples, start=self._start, end=end, cycle=cycle)

    def _deal(self, slots: Sequence[Slot]) -> Iterator[Request]:
        pairs = _count_pairs(slots, len(self._tasks))
        parts = deal_pairs(slots, self._parts, self._homes) if self._homes else deal_slots(slots, self._parts)
        yield from (Request(part, pairs) for part in parts[self._rank :: self._world])


class EvaluationLoader(_Loader):
    """Samples once each over all ranks, with all their labels, unaugmented, in the order of the index.

    All ranks yield equally many batches, so that they meet in every collective; a rank that has run out yields empty
    ones. `global_pairs` counts the pairs of all ranks' batches of the same turn.
    """

    def __init__(
        self,
        index: ShardIndex,
        tasks: Sequence[TaskSpec],
        *,
        batch_size: int,
        rank: int,
        world: int,
        limit: int | None,
        workers: int,
        spread: bool = False,
        tolerant: bool = False,
    ) -> None:
        """Prepare the batches.

        Args:
            index: shards to evaluate on.
            tasks: the run's T tasks.
            batch_size: images per rank and batch.
            rank: of this process.
            world: number of ranks.
            limit: at most so many samples, from the start of the index; None: all.
            workers: processes that read ahead; 0: none.
            spread: take the limited samples from all over the index instead.
            tolerant: leave out damaged members; for statistics of training samples, never to evaluate.
        """
        super().__init__(index, tasks, workers, None, tolerant=tolerant)
        self._batch_size = batch_size
        self._rank = rank
        self._world = world
        count = len(index) if limit is None else min(limit, len(index))
        self._samples = _spread_over(index.shard_of, count) if spread else np.arange(count)
        self._in_flight = batch_size * world * (1 + max(1, workers * _PREFETCH))

    def __len__(self) -> int:
        """Batches of this rank, empty ones included."""
        return math.ceil(len(self._samples) / (self._batch_size * self._world))

    def _requests(self) -> Iterator[Request]:
        available = self._index.available([spec.name for spec in self._tasks])
        turn = self._batch_size * self._world
        count = len(self._samples)
        with ReadAhead(self._index, self._samples_at, start=0, end=count, cycle=count) as ahead:
            for first in range(0, count, turn):
                ahead.advance(first - self._in_flight, first + turn)
                samples = self._samples_at(first, turn).tolist()
                slots = [Slot(sample, tuple(np.flatnonzero(available[sample]).tolist()), 0) for sample in samples]
                mine = slots[self._rank * self._batch_size :][: self._batch_size]
                yield Request(tuple(mine), _count_pairs(slots, len(self._tasks)))

    def _samples_at(self, position: int, count: int) -> NDArray[np.int64]:
        return self._samples[position : position + count]


def _spread_over(shard_of: NDArray[np.int32], count: int) -> NDArray[np.int64]:
    """Return `count` samples or a few less, ascending, spread evenly over some shards, these evenly over all."""
    bounds = shard_bounds(shard_of)
    total = len(bounds) - 1
    # A remote shard is fetched whole, so only as many as needed where shards are small.
    some = max(_SPREAD_SHARDS, math.ceil(count * total / len(shard_of)))
    pool = samples_of(bounds, np.unique(np.arange(some) * total // some))
    count = min(count, len(pool))
    return np.asarray(pool[np.arange(count) * len(pool) // count])


class _Reader(Dataset[Batch | Parcel | UserError]):
    """Reads requests, in a worker or in the trainer's process; a worker packs its batches into parcels.

    A tolerant one leaves out damaged members, and tells of them in the batch.
    """

    def __init__(self, index: ShardIndex, tasks: tuple[TaskSpec, ...], augment: Augment | None, tolerant: bool) -> None:
        self._index = index
        self._tasks = tasks
        self._augment = augment
        self._tolerant = tolerant

    def __getitem__(self, request: Request) -> Batch | Parcel | UserError:
        # An error travels as a value: raised in a worker it would arrive wrapped in that worker's traceback.
        shared = get_worker_info() is not None
        read = read_whole_members if self._tolerant else read_batch
        try:
            batch = read(self._index, self._tasks, request.slots, request.global_pairs, self._augment, shared=shared)
            return Parcel.of(batch) if shared else batch
        except UserError as error:
            return error


def _next_batch(batches: Iterator[Batch | Parcel | UserError]) -> Batch | UserError | None:
    try:
        batch = next(batches, None)
        return batch.unpack() if isinstance(batch, Parcel) else batch
    except (RuntimeError, ConnectionError, EOFError) as error:
        # A worker that is gone is noticed by DataLoader's watch, or by a batch of it that can no longer be fetched.
        if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
            raise
        raise UserError(
            "a loader process was killed from outside, most likely for memory: lower data.workers or train.micro_batch"
        ) from None


def _count_pairs(slots: Sequence[Slot], tasks: int) -> NDArray[np.int64]:
    """Return (T,) how many of the slots serve each task."""
    served = [task for slot in slots for task in slot.tasks]
    return np.bincount(np.asarray(served, np.int64), minlength=tasks)


def _unchanged(batch: Any) -> Any:
    """Replace DataLoader's collation: the reader has stacked already."""
    return batch
