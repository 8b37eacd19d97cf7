"""Writes that a crash cannot tear: a temporary file in the same folder, fsync, then one rename."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.errors import UserError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what the caller writes there becomes `path` when the block ends well.

    Folders on the way are created. When the block fails, `path` stays as it was and the temporary file goes.

    Raises:
        UserError: the folder cannot be made or written, or there is no space left.
    """
    # The suffix stays, because some writers choose the format by it.
    temporary = path.with_name(f".{path.stem}.{writer_name()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def writer_name() -> str:
    """Return a part of a file's name that no other writer has, in this process, another one or on another node."""
    return f"{os.uname().nodename}.{secrets.token_hex(4)}"


def write_text_atomically(path: Path, text: str) -> None:
    """Write `text` as UTF-8 through `atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def cannot_write(path: Path, error: OSError) -> UserError:
    """Return what a user is told about a file or folder that could not be written."""
    return UserError(f"cannot write {path}: {error.strerror or error}; free some space or choose another place")


def sync_folder(folder: Path) -> None:
    """Make creations and renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
