"""Shards behind a URL: fetched whole into a cache on this node's disk, checked, and read from there."""

import hashlib
import os
import threading
import time
from functools import partial
from pathlib import Path

from configs.atomic import atomic_path, cannot_write, write_text_atomically
from configs.errors import UserError
from data_pipeline.index_file import INDEX_FILE
from data_pipeline.node_files import locked
from data_pipeline.remote.fetching import Absent, FetchCounters, Fetcher
from data_pipeline.remote.shard_cache import ShardCache
from data_pipeline.remote.transport import join_url, shown_url
from data_pipeline.storage import ShardFile, Storage


class RemoteStorage(Storage):
    """A folder behind a URL of http, https, or any protocol of fsspec.

    A shard's checksum is compared when it is fetched; loading an index asks nothing of the server but the index.

    Attributes:
        cache: the node's shards.
    """

    evicts = True

    def __init__(self, url: str, cache_folder: Path, limit_bytes: int, fetcher: Fetcher | None = None) -> None:
        """Prepare to fetch.

        Args:
            url: of the folder.
            cache_folder: on a disk of this node; any number of runs and URLs may use the same one.
            limit_bytes: size of all shards in it.
            fetcher: how to fetch; None: the defaults.
        """
        self.place = shown_url(url)
        self._url = url
        self._cache_folder = cache_folder
        # What is small is kept by its URL: its content is not known beforehand.
        self._small_files = cache_folder / "places" / hashlib.sha256(url.encode()).hexdigest()[:16]
        self.cache = ShardCache(cache_folder / "shards", limit_bytes)
        self._fetcher = fetcher or Fetcher()

    @property
    def counters(self) -> FetchCounters:
        """What this process fetched and waited for."""
        return self._fetcher.counters

    def find(self, name: str) -> Path | None:
        """Fetch the file unless the copy of an earlier run is still up to date."""
        path = self._small_files / name
        version = path.with_name(f"{name}.version")
        try:
            # On its own: as a parent it would get the umask's mode, and it may be the `node_files.private_folder`.
            self._cache_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._small_files.mkdir(mode=0o700, parents=True, exist_ok=True)
            with locked(path.with_name(f"{name}.lock")):
                known = version.read_text(encoding="utf-8") if path.exists() and version.exists() else ""
                try:
                    with atomic_path(path) as temporary, temporary.open("wb") as file:
                        found = self._fetcher.fetch_file(join_url(self._url, name), file.fileno(), known)
                        if found is None:
                            raise _UpToDate
                except _UpToDate:
                    return path
                except Absent:
                    path.unlink(missing_ok=True)
                    return None
                write_text_atomically(version, found)
                return path
        except OSError as error:
            raise cannot_write(self._small_files, error) from error

    def unindexed(self) -> UserError:
        """Return what a user is told when there is no index."""
        return UserError(
            f"{self.where(INDEX_FILE)} does not exist: give the URL of a folder of shards with its index, as "
            "`modsquad data` writes it"
        )

    def check(self, shard: ShardFile) -> None:
        """Nothing: thousands of questions to a server would delay the start, and fetching compares anyway."""

    def open(self, shard: ShardFile) -> int:
        """Open the cached shard; fetch it first if it is not there."""
        present = self.cache.holds(shard)
        began = time.monotonic()
        descriptor = self.cache.open(shard, partial(self._fill, shard, threading.Event()))
        self.counters.add(hits=int(present), misses=int(not present), wait_seconds=time.monotonic() - began)
        return descriptor

    def hold(self, shard: ShardFile, spare_bytes: int, stop: threading.Event) -> int:
        """Return a descriptor that keeps the shard in the cache until it is closed; fetch it if it is not there.

        Raises:
            Busy, Full, UserError: see `ShardCache.hold`.
            Cancelled: `stop` was set.
        """
        return self.cache.hold(shard, partial(self._fill, shard, stop), spare_bytes)

    def verify(self, shard: ShardFile) -> None:
        """Fetch the shard, or compare the cached one; one that the disk has damaged is fetched again."""
        present = self.cache.holds(shard)
        if present and self._digest(shard) != shard.sha256:
            self.cache.forget(shard)
            present = False
        if not present:
            os.close(self.open(shard))

    def _fill(self, shard: ShardFile, stop: threading.Event, file: int) -> None:
        self._fetcher.fetch_shard(join_url(self._url, shard.name), shard, file, stop)

    def _digest(self, shard: ShardFile) -> str:
        with os.fdopen(self.open(shard), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


class _UpToDate(Exception):
    pass
