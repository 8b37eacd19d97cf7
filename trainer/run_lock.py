"""One run at a time in a folder: a lock that the system takes back when its holder ends, however that happens."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import FileIO
from pathlib import Path

from configs.atomic import cannot_write
from configs.errors import UserError


@contextmanager
def lock_run(run_dir: Path) -> Iterator[None]:
    """Keep other processes from training in `run_dir`, until the block ends or this process does.

    On a file system without locks, as Lustre may be mounted, nothing keeps them out.

    Raises:
        UserError: another process does so now, or the folder cannot be written.
    """
    path = run_dir / ".lock"
    with ExitStack() as resources:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            file = resources.enter_context(path.open("ab+", buffering=0))
            _take_lock(file, run_dir)
            file.truncate(0)
            file.write(f"{os.getpid()} on {os.uname().nodename}".encode())
        except OSError as error:
            raise cannot_write(path, error) from error
        yield


def _take_lock(file: FileIO, run_dir: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UserError(
            f"{run_dir} is in use by another run (process {file.read().decode() or 'unknown'}): "
            "stop that one, or choose another run_dir"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
