"""Where a folder of shards lies: what an index asks of a local folder and of a URL alike.

A storage gives small files beside the shards by name, and shards as open files. What it opens keeps its bytes until it
is closed, whatever happens to the file's name meanwhile.
"""

import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from configs.errors import UserError

# The plan keeps about `shuffle_window_shards` shards in use; more open files than this help nobody.
_OPEN_FILES = 64


class ShardFile(NamedTuple):
    """One shard, as the index knows it.

    Attributes:
        name: file name inside the folder of the shards.
        file_bytes: size of the file.
        sha256: checksum of the file, hexadecimal.
    """

    name: str
    file_bytes: int
    sha256: str


class Storage(ABC):
    """A folder of shards, wherever it is. Picklable: a copy in another process reads the same shards.

    Attributes:
        place: the folder or URL, as messages name it.
        evicts: whether shards may vanish from the disk while they are open, to make room for others.
    """

    place: str
    evicts: bool = False

    @abstractmethod
    def find(self, name: str) -> Path | None:
        """Return where a small file beside the shards, such as index.json, can be read; None: there is none.

        Raises:
            UserError: it cannot be fetched.
        """

    @abstractmethod
    def unindexed(self) -> UserError:
        """Return what a user is told when there is no index."""

    @abstractmethod
    def check(self, shard: ShardFile) -> None:
        """Compare a shard with the index as far as that costs next to nothing.

        Raises:
            UserError: it is missing or has another size.
        """

    @abstractmethod
    def open(self, shard: ShardFile) -> int:
        """Return a new descriptor that reads the shard.

        Raises:
            OSError: it cannot be opened.
            UserError: it cannot be fetched, or does not belong to the index.
        """

    @abstractmethod
    def verify(self, shard: ShardFile) -> None:
        """Compare a shard's bytes with its checksum.

        Raises:
            UserError: it cannot be read, or differs.
        """

    def where(self, name: str) -> str:
        """Name a file of the folder for messages."""
        return f"{self.place}/{name}"


class OpenShards:
    """The shards of an index, each opened when it is first read; the least recently read one is closed for another.

    A pickled copy starts with none open.
    """

    def __init__(self, storage: Storage, shards: Sequence[ShardFile]) -> None:
        self._storage = storage
        self._shards = shards
        self._descriptors: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptors": OrderedDict()}

    def descriptor(self, shard: int) -> int:
        """Return a descriptor of the shard of this number; it is valid until another shard is asked for.

        Raises:
            OSError, UserError: see `Storage.open`.
        """
        if shard in self._descriptors:
            self._descriptors.move_to_end(shard)
            return self._descriptors[shard]
        if self._storage.evicts:
            self._close_evicted()
        if len(self._descriptors) >= _OPEN_FILES:
            os.close(self._descriptors.popitem(last=False)[1])
        descriptor = self._storage.open(self._shards[shard])
        self._descriptors[shard] = descriptor
        return descriptor

    def drop(self, shard: int) -> None:
        """Close the shard's descriptor, which does not read any more; the next one is new."""
        with suppress(OSError):  # It tells of the same failure.
            os.close(self._descriptors.pop(shard))

    def close(self) -> None:
        """Close all; a later read opens them again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _close_evicted(self) -> None:
        """Give back the disk space of shards that have no name any more."""
        evicted = [shard for shard, descriptor in self._descriptors.items() if os.fstat(descriptor).st_nlink == 0]
        for shard in evicted:
            os.close(self._descriptors.pop(shard))
