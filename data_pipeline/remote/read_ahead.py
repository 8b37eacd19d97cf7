"""Fetch the shards of coming positions before they are read, and keep them until they are.

The trainer's process knows from the plan which shards come when. Threads fetch them in that order, as many as the cache
holds, and hold each from then until its last sample has been read. What nobody holds may make room for others, so the
cache fills ahead of the plan and empties behind it.
"""

import os
import threading
from collections.abc import Callable
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from data_pipeline.index import ShardIndex
from data_pipeline.remote.fetching import Cancelled
from data_pipeline.remote.shard_cache import Busy, Full
from data_pipeline.remote.storage import RemoteStorage

# Ranks of a node fetch together, each another shard; a rank alone needs a few connections to fill its line.
_THREADS = 3
# Each shard that is held takes a file descriptor, of which a process often has 1024.
_MOST_HELD = 256
# Room that is left to readers of other shards, such as those of validation, in largest shards.
_SPARE_SHARDS = 2
# A shard that so many shards' positions do not use is not in use.
_PAUSE_SHARDS = 8
# Many windows of shards; an epoch may be millions.
_CHECKED_POSITIONS = 1 << 18
# Others' downloads and holds end without a word.
_POLL_SECONDS = 0.5


class ReadAhead:
    """Shards of a sequence of positions, on their way to this node. Does nothing for local shards.

    Use as a context manager, or call `close`.
    """

    def __init__(
        self, index: ShardIndex, samples: Callable[[int, int], NDArray[np.int64]], *, start: int, end: int, cycle: int
    ) -> None:
        """Prepare for positions [start, end).

        Args:
            index: the shards.
            samples: `samples(position, count)` are the samples at [position, position + count), count >= 1.
            start: first position to be read.
            end: behind the last one.
            cycle: so many positions use about every shard, as those of an epoch do.
        """
        self._storage = index.storage if isinstance(index.storage, RemoteStorage) else None
        self._shards = index.shards
        self._shard_of = index.shard_of
        self._samples = samples
        self._scanned = start
        self._end = end
        self._cycle = cycle
        self._largest = max(shard.file_bytes for shard in index.shards)
        self._positions_per_shard = max(1, cycle // len(index.shards))
        # Shards from the reader's position to the last one that was looked at: where each is used last, and their size.
        self._last_use: dict[int, int] = {}
        self._bytes = 0
        self._wanted: list[int] = []
        self._held: dict[int, int] = {}
        self._fetching: set[int] = set()
        self._change = threading.Condition()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "ReadAhead":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def check_room(self, in_flight: int) -> None:
        """Refuse a cache that cannot hold what is in use at a time; looks at the first cycle, or at its start.

        Args:
            in_flight: positions that may be read at the same time.

        Raises:
            UserError: says how much is needed.
        """
        if self._storage is None or self._scanned >= self._end:
            return
        count = min(self._cycle, self._end - self._scanned, _CHECKED_POSITIONS)
        shards = self._shard_of[self._samples(self._scanned, count)]
        sizes = np.array([shard.file_bytes for shard in self._shards])
        pause = _PAUSE_SHARDS * self._positions_per_shard
        needed = _most_in_use(shards, sizes, pause, in_flight) + _SPARE_SHARDS * self._largest
        if needed > self._storage.cache.limit_bytes:
            gib = np.ceil(needed / 2**30 * 100) / 100
            raise UserError(
                f"data.cache_gib {self._storage.cache.limit_bytes / 2**30:.3g} is too small: shuffling the shards of "
                f"{self._storage.place} takes {gib:.2f} at a time; raise it to that, or lower "
                "data.shuffle_window_shards"
            )

    def advance(self, read: int, wanted: int) -> None:
        """Say where the reader is: all positions before `read` have been read, those before `wanted` come next."""
        if self._storage is None:
            return
        with self._change:
            self._scan(read, wanted)
            for shard in [shard for shard, last in self._last_use.items() if last < read]:
                del self._last_use[shard]
                self._bytes -= self._shards[shard].file_bytes
                if shard in self._held:
                    os.close(self._held.pop(shard))
            self._wanted = [shard for shard in self._wanted if shard in self._last_use]
            self._change.notify_all()
        if not self._threads:
            self._threads = [
                threading.Thread(target=self._work, args=(self._storage,), name="read-ahead", daemon=True)
                for _ in range(_THREADS)
            ]
            for thread in self._threads:
                thread.start()

    def close(self) -> None:
        """Stop fetching, and let go of all shards."""
        self._stop.set()
        with self._change:
            self._change.notify_all()
            while self._held:
                os.close(self._held.popitem()[1])

    def _scan(self, read: int, wanted: int) -> None:
        """Look at the positions up to `wanted`, and further as long as all shards since `read` fit into the cache."""
        assert self._storage is not None
        limit = self._storage.cache.limit_bytes - (_SPARE_SHARDS + 1) * self._largest
        end = min(self._end, max(wanted, read + self._cycle))
        step = max(1, self._positions_per_shard // 4)
        while self._scanned < end and (
            self._scanned < wanted or (self._bytes <= limit and len(self._last_use) < _MOST_HELD)
        ):
            count = min(step, end - self._scanned)
            self._note(self._shard_of[self._samples(self._scanned, count)])
            self._scanned += count

    def _note(self, shards: NDArray[np.int32]) -> None:
        """Note which shards the next positions use, in order, and where last."""
        distinct, first = np.unique(shards, return_index=True)
        last = len(shards) - 1 - np.unique(shards[::-1], return_index=True)[1]
        for place in np.argsort(first).tolist():
            shard = int(distinct[place])
            if shard not in self._last_use:
                self._wanted.append(shard)
                self._bytes += self._shards[shard].file_bytes
            self._last_use[shard] = self._scanned + int(last[place])

    def _work(self, storage: RemoteStorage) -> None:
        passed_over: set[int] = set()
        while (shard := self._next_shard(passed_over)) is not None:
            descriptor, full, busy = None, False, False
            try:
                descriptor = storage.hold(self._shards[shard], _SPARE_SHARDS * self._largest, self._stop)
            except Full:
                full = True
            except Busy:
                busy = True
            except (UserError, Cancelled):
                # Who needs it will try again, and tell the user.
                self._drop(shard)
            passed_over = passed_over | {shard} if busy else set()
            with self._change:
                self._fetching.discard(shard)
                if descriptor is not None:
                    self._keep(shard, descriptor)
                if full:
                    self._change.wait(_POLL_SECONDS)

    def _next_shard(self, passed_over: set[int]) -> int | None:
        """Return the first wanted shard that no other thread or process is fetching; None: there is nothing more to do.

        Shards of other processes' downloads are looked at again after a while.
        """
        with self._change:
            while not self._stop.is_set():
                for shard in self._wanted:
                    if shard not in self._fetching and shard not in passed_over:
                        self._fetching.add(shard)
                        return shard
                self._change.wait(_POLL_SECONDS)
                passed_over.clear()
            return None

    def _keep(self, shard: int, descriptor: int) -> None:
        if self._stop.is_set() or shard not in self._last_use or shard in self._held:
            os.close(descriptor)
        else:
            self._held[shard] = descriptor
            self._wanted.remove(shard)

    def _drop(self, shard: int) -> None:
        with self._change:
            if shard in self._wanted:
                self._wanted.remove(shard)


def _most_in_use(shards: NDArray[np.int32], sizes: NDArray[np.int64], pause: int, in_flight: int) -> int:
    """Return the most bytes that are in use at a time.

    A shard is in use from one of its positions to the next that is no further than `pause`, and for `in_flight`
    positions after the last of them.
    """
    order = np.argsort(shards, kind="stable")
    begins = (np.diff(shards[order]) != 0) | (np.diff(order) > pause)
    first, last = order[np.append(True, begins)], order[np.append(begins, True)]
    change = np.zeros(len(shards) + in_flight + 1, np.int64)
    np.add.at(change, first, sizes[shards[first]])
    np.add.at(change, last + in_flight, -sizes[shards[last]])
    return int(change.cumsum().max())
