"""Arrays that the processes of one node share: made once, kept in a file, mapped by each.

The files lie in a folder of the user below `tempfile.gettempdir()`, which TMPDIR chooses. Whoever uses a file holds a
shared lock on it, which the system drops however the process ends; a file that nobody has locked is removed by the next
to come by. A file is checked when it is opened, and made again if it is damaged or gone. Files that nobody changes are
opened for writing too: on NFS an exclusive lock needs that.
"""

import fcntl
import hashlib
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

SMALL_BYTES = 4 << 20
"""Arrays up to this size stay in each process' memory."""

_DIGEST_BYTES = hashlib.sha256().digest_size


class SharedArray:
    """An array, read-only where it is shared; `close` or the end of the process gives it back.

    Attributes:
        array: its values; not to be used after `close`.
        path: the file it lies in; None: in this process' memory.
    """

    def __init__(self, array: NDArray[Any], path: Path | None = None, file: BinaryIO | None = None) -> None:
        """Use `shared_array`. `file` holds the shared lock."""
        self.array = array
        self.path = path
        self._finalizer = None if path is None or file is None else weakref.finalize(self, _give_back, path, file)

    def close(self) -> None:
        """Give the array back; its file goes with its last user."""
        if self._finalizer is not None:
            self._finalizer()


def shared_array(name: str, num_bytes: int, make: Callable[[], NDArray[Any]]) -> SharedArray:
    """Return the array that `make` returns, from the memory of this node if it is there already.

    One process makes it while the others wait. Where no file can be written, the array stays in memory.

    Args:
        name: of the file; must identify the content.
        num_bytes: about its size; small arrays touch no file.
        make: a pure function.
    """
    folder = private_folder() if num_bytes > SMALL_BYTES else None
    if folder is None:
        return SharedArray(make())
    path = folder / f"{name}.npy"
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / f"{name}.lock"))
        except OSError:
            return SharedArray(make())
        _sweep(folder)
        found = _open(path)
        if found is None:
            array = make()
            found = _write(path, array) or SharedArray(array)
        return found


def user_folder() -> Path:
    """Return the folder of this user's shared files on this node; it need not exist."""
    return Path(tempfile.gettempdir()) / f"modsquad-{os.getuid()}"


def private_folder() -> Path | None:
    """Make `user_folder`, and return it if it belongs to this user alone; None: it does not, or cannot be made.

    One of this user's that others may read is closed to them; what they may have written is not trusted.
    """
    folder = user_folder()
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if status.st_uid != os.getuid() or status.st_mode & 0o170022 != 0o040000:
            return None
        if status.st_mode & 0o077:
            folder.chmod(0o700)
    except OSError:
        return None
    return folder


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock that is a file of its own, and goes with the lock.

    Raises:
        BlockingIOError: another process holds it, and `wait` is False.
        OSError: the file cannot be made, or the file system knows no locks.
    """
    while True:
        file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise
        if _is_at(file, path):
            break
        file.close()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def _open(path: Path) -> SharedArray | None:
    """Lock and map a file; None: it is not there, or damaged."""
    try:
        file = path.open("r+b")
    except OSError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH)
        if not _is_at(file, path) or not _is_whole(file):
            raise ValueError("removed meanwhile, or damaged")
        file.seek(0)
        array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError):
        file.close()
        return None
    return SharedArray(array, path, file)


def _write(path: Path, array: NDArray[Any]) -> SharedArray | None:
    """Write a file and map it; None: no space, or the folder cannot be written."""
    temporary = path.with_suffix(f".{os.getpid()}.partial")
    try:
        with temporary.open("w+b") as file:
            # Locked before it has its name, so that nobody sweeps it away.
            fcntl.flock(file, fcntl.LOCK_SH)
            np.save(file, array, allow_pickle=False)
            file.seek(0)
            digest = _digest(file, os.fstat(file.fileno()).st_size)
            file.write(digest)
            file.flush()
            temporary.replace(path)
            return _open(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        return None


def _is_whole(file: BinaryIO) -> bool:
    """Whether the file ends with the checksum of what comes before."""
    content = os.fstat(file.fileno()).st_size - _DIGEST_BYTES
    return content >= 0 and _digest(file, content) == file.read()


def _digest(file: BinaryIO, size: int) -> bytes:
    """Return the checksum of the next `size` bytes."""
    digest = hashlib.sha256()
    while size and (block := file.read(min(size, 1 << 20))):
        digest.update(block)
        size -= len(block)
    return digest.digest()


def _sweep(folder: Path) -> None:
    """Remove files that no process uses, and what killed writers left."""
    for path in (path for kind in ("npy", "partial", "lock") for path in folder.glob(f"*.{kind}")):
        with suppress(OSError), path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, path):
                path.unlink()


def _give_back(path: Path, file: BinaryIO) -> None:
    """Drop the shared lock, and remove the file if that was the last."""
    with file, suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(file, path):
            path.unlink()


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether the open file still has that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False
