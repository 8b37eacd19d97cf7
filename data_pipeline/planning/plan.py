"""The plan of a run: which image comes when, and which tasks it serves.

An endless stream of slots, a pure function of the labels that exist and the seed. It knows nothing of ranks, workers or
batches, so any world reads the same stream, and a position in it is all there is to resume from.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from data_pipeline.planning.labels import Codes, LabelTable

Ints = NDArray[np.int64]

# Samples whose labels are looked at together.
_ROWS = 1 << 16


@dataclass(frozen=True)
class Slot:
    """One image's turn.

    Attributes:
        sample: index in the shards.
        tasks: indices of the tasks it serves, ascending.
        epoch: from 0, how often the stream went over the samples before; with the seed and the sample it fixes the
            augmentation.
    """

    sample: int
    tasks: tuple[int, ...]
    epoch: int


class Plan(ABC):
    """An endless stream of slots.

    Attributes:
        unlabelled: samples left out, because they have none of the labels of tasks with a share.
    """

    unlabelled: int

    @property
    def shared_bytes(self) -> int:
        """Bytes that the plan has laid out in files which the processes of a node share."""
        return 0

    @abstractmethod
    def slots(self, position: int, count: int) -> list[Slot]:
        """Return the slots at positions [position, position + count) of the stream."""

    @abstractmethod
    def samples(self, position: int, count: int) -> Ints:
        """Return the (count,) samples of these slots."""


def shard_bounds(shard_of: NDArray[np.int32]) -> Ints:
    """Return (S + 1,) where each shard's samples begin, and where the last ends; `shard_of` (N,) ascends."""
    return np.searchsorted(shard_of, np.arange(int(shard_of[-1]) + 2))


def samples_of(bounds: Ints, shards: Ints) -> Ints:
    """Return the samples of some shards, shard after shard."""
    sizes = np.diff(bounds)[shards]
    ends = np.cumsum(sizes)
    return np.asarray(np.arange(int(sizes.sum())) + np.repeat(bounds[shards] - (ends - sizes), sizes))


def count_labels(labels: LabelTable) -> tuple[Codes, Ints]:
    """Return the distinct label sets, ascending, and how many samples have each, looking at a few samples at a time."""
    counts: dict[int, int] = {}
    for first in range(0, len(labels), _ROWS):
        sets, count = np.unique(labels.codes(slice(first, first + _ROWS)), return_counts=True)
        for code, number in zip(sets.tolist(), count.tolist(), strict=True):
            counts[code] = counts.get(code, 0) + number
    found = sorted(counts)
    return np.array(found, np.uint64), np.array([counts[code] for code in found])


def no_labels(labels: LabelTable) -> UserError:
    """Return what a user is told when no sample can serve any task."""
    return UserError(
        f"none of the {len(labels)} training samples has a label of any of the {labels.tasks} tasks of this run: "
        "choose tasks that the shards hold, or other shards"
    )
