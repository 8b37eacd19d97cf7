"""Shards from elsewhere on a disk of this node, shared by all its processes, and never more than a given size.

Files are named by their SHA-256, so a file under its name is whole, and belongs to whatever index asks for it. Kernel
locks (flock) say who is at what, and go with the process that holds them: an exclusive lock on a partial file is a
download under way, a shared lock on a shard keeps it from being removed. A partial file without a lock is a dead
process's, and is removed by the next one that needs room.
"""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from fcntl import LOCK_EX, LOCK_NB, LOCK_SH, LOCK_UN, flock
from pathlib import Path

from configs.atomic import cannot_write
from configs.errors import UserError
from data_pipeline.node_files import locked
from data_pipeline.storage import ShardFile

_SHARD = ".tar"
_PARTIAL = ".partial"

# Room that other readers hold is free again when their downloads end.
_ROOM_PATIENCE_SECONDS = 600.0
_ROOM_POLL_SECONDS = 0.2


class Busy(Exception):
    """Another process is fetching the shard."""


class Full(Exception):
    """There is no room for the shard now."""


class ShardCache:
    """A folder of shards, bounded in size. Picklable; any number of processes may use the same folder.

    Attributes:
        folder: of the cache.
        limit_bytes: size of all shards, those under way included, that no process goes beyond.
        evictions: shards that this process removed to make room.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self.evictions = 0

    def open(self, shard: ShardFile, fill: Callable[[int], None]) -> int:
        """Return a descriptor of the shard, for which `fill` writes it to a descriptor if it is not there.

        Of processes that ask at the same time one fetches and the others wait. The shard may be removed while it is
        open; its bytes stay.

        Raises:
            UserError: the shard does not fit, the disk is full, or what `fill` raises.
        """
        deadline = time.monotonic() + _ROOM_PATIENCE_SECONDS
        while True:
            try:
                descriptor = self._obtain(shard, fill, spare_bytes=0, wait=True)
                flock(descriptor, LOCK_UN)
                return descriptor
            except Full:
                if shard.file_bytes > self.limit_bytes or time.monotonic() > deadline:
                    raise UserError(self._describe_full(shard)) from None
                time.sleep(_ROOM_POLL_SECONDS)

    def hold(self, shard: ShardFile, fill: Callable[[int], None], spare_bytes: int) -> int:
        """Return a descriptor that keeps the shard from being removed until it is closed; see `open`.

        Raises:
            Busy: another process is fetching the shard.
            Full: it does not fit without taking from the last `spare_bytes`, or from what others hold.
            UserError: the disk is full, or what `fill` raises.
        """
        return self._obtain(shard, fill, spare_bytes=spare_bytes, wait=False)

    def holds(self, shard: ShardFile) -> bool:
        """Whether the shard is there."""
        return self._path(shard).exists()

    def forget(self, shard: ShardFile) -> None:
        """Remove a shard, such as one that the disk has damaged."""
        self._path(shard).unlink(missing_ok=True)

    def _obtain(self, shard: ShardFile, fill: Callable[[int], None], *, spare_bytes: int, wait: bool) -> int:
        """Return a descriptor with a shared lock."""
        path = self._path(shard)
        try:
            self._make_folder()
            while True:
                descriptor = self._lock_present(path, shard.file_bytes)
                if descriptor is None:
                    descriptor = self._fetch(path, shard.file_bytes, fill, spare_bytes=spare_bytes, wait=wait)
                if descriptor is not None:
                    return descriptor
        except OSError as error:
            raise cannot_write(self.folder, error) from error

    def _fetch(self, path: Path, size: int, fill: Callable[[int], None], *, spare_bytes: int, wait: bool) -> int | None:
        """Return a descriptor with a shared lock; None: another process has fetched it, or removed it again."""
        name = path.with_suffix(_PARTIAL)
        partial = _lock_partial(name, wait=wait)
        if partial is None:
            return None
        try:
            if path.exists():
                name.unlink()
                return None
            try:
                self._make_room(partial, size, self.limit_bytes - spare_bytes)
                fill(partial)
                os.fsync(partial)
                os.replace(name, path)
            except BaseException:
                name.unlink()  # It is this process's as long as it is locked.
                raise
        finally:
            os.close(partial)
        return self._lock_present(path, size)

    def _path(self, shard: ShardFile) -> Path:
        return self.folder / f"{shard.sha256}{_SHARD}"

    def _make_folder(self) -> None:
        """Other users may not write what this process trusts, nor read what it fetched with a password."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.folder.stat().st_uid != os.getuid():
            raise UserError(f"the cache {self.folder} belongs to another user: set data.cache_dir to a folder of yours")

    def _lock_present(self, path: Path, size: int) -> int | None:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        flock(descriptor, LOCK_SH)  # Who removes it holds it but for a moment.
        facts = os.fstat(descriptor)
        if facts.st_nlink and facts.st_size == size:
            os.utime(descriptor)  # The order in which shards are removed.
            return descriptor
        if facts.st_nlink:
            path.unlink(missing_ok=True)  # The machine went down before it was written out.
        os.close(descriptor)
        return None

    def _make_room(self, partial: int, size: int, limit: int) -> None:
        """Remove shards that nobody holds, those not used for longest first, and claim `size` bytes for `partial`."""
        if size > limit:
            raise Full
        with locked(self.folder / "lock"):
            files = self._list_files()
            excess = sum(facts.st_size for _, facts in files) + size - limit
            for path, facts in files:
                if excess <= 0:
                    break
                if path.suffix == _SHARD and _remove_unheld(path):
                    excess -= facts.st_size
                    self.evictions += 1
            if excess > 0:
                raise Full
            os.ftruncate(partial, size)

    def _list_files(self) -> list[tuple[Path, os.stat_result]]:
        """Return shards and partial files, those not used for longest first; partial files of the dead are removed."""
        found = []
        for path in self.folder.iterdir():
            if path.suffix == _SHARD or (path.suffix == _PARTIAL and not _remove_unheld(path)):
                with suppress(FileNotFoundError):
                    found.append((path, path.stat()))
        return sorted(found, key=lambda entry: entry[1].st_mtime_ns)

    def _describe_full(self, shard: ShardFile) -> str:
        limit, needed = self.limit_bytes / 2**30, shard.file_bytes / 2**30
        if shard.file_bytes > self.limit_bytes:
            return f"shard {shard.name} ({needed:.3g} GiB) is larger than data.cache_gib {limit:.3g}: raise it"
        return (
            f"the cache {self.folder} had no room for shard {shard.name} for {_ROOM_PATIENCE_SECONDS:.0f} s, as all of "
            f"its {limit:.3g} GiB are in use: raise data.cache_gib, or give each run its own data.cache_dir"
        )


def _lock_partial(path: Path, *, wait: bool) -> int | None:
    """Return a descriptor of the empty partial file with an exclusive lock; None: another process had it until now."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        flock(descriptor, LOCK_EX | LOCK_NB)
        # The one before may have finished or removed the file that was opened here.
        if _is_at(descriptor, path):
            os.ftruncate(descriptor, 0)
            return descriptor
    except BlockingIOError:
        if not wait:
            os.close(descriptor)
            raise Busy from None
        # Shared, since the file that is finished is held by such a lock, perhaps for long.
        flock(descriptor, LOCK_SH)
    os.close(descriptor)
    return None


def _remove_unheld(path: Path) -> bool:
    """Remove a file unless somebody holds a lock on it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        flock(descriptor, LOCK_EX | LOCK_NB)
        if _is_at(descriptor, path):  # Only who holds this lock may rename or remove the file.
            path.unlink()
            return True
    except BlockingIOError:
        pass
    finally:
        os.close(descriptor)
    return False


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
