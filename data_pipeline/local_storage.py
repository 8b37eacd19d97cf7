"""Shards in a folder of this machine, or of a file system that it mounts."""

import os
from pathlib import Path

from configs.errors import UserError
from data_pipeline.index_file import INDEX_FILE
from data_pipeline.source import JOB_FILE
from data_pipeline.storage import ShardFile, Storage
from data_pipeline.tarscan import file_sha256


class LocalStorage(Storage):
    """A folder: shards are read where they lie."""

    def __init__(self, folder: Path) -> None:
        self.place = str(folder)
        self._folder = folder

    def find(self, name: str) -> Path | None:
        """Return the file's path."""
        path = self._folder / name
        return path if path.is_file() else None

    def unindexed(self) -> UserError:
        """Return what a user is told when there is no index."""
        folder = self._folder
        if not folder.is_dir():
            return UserError(
                f"there is no folder {folder}: make data with `modsquad data rooms {folder} --images 1000`"
            )
        if (folder / JOB_FILE).is_file():
            return UserError(f"{folder} has no {INDEX_FILE} yet: the packing did not finish, run it again")
        if any(folder.glob("*.tar")):
            return UserError(
                f"{folder} holds tar shards but no {INDEX_FILE}: make it with `modsquad data index {folder}`"
            )
        return UserError(f"{folder} holds no shards: make data with `modsquad data rooms {folder} --images 1000`")

    def check(self, shard: ShardFile) -> None:
        """Compare the shard's size with the index's."""
        file, index = self._folder / shard.name, self._folder / INDEX_FILE
        try:
            found = file.stat().st_size
        except OSError as error:
            raise UserError(
                f"shard {file} is missing ({error.strerror}), though {index} lists it: restore it, or delete "
                f"{self._folder} and pack the data again"
            ) from None
        if found != shard.file_bytes:
            raise UserError(
                f"shard {file} has {found} bytes, but {index} says {shard.file_bytes}: it is truncated or was "
                f"replaced; restore it, or delete {self._folder} and pack the data again"
            )

    def open(self, shard: ShardFile) -> int:
        """Open the shard's file."""
        return os.open(self._folder / shard.name, os.O_RDONLY | os.O_CLOEXEC)

    def verify(self, shard: ShardFile) -> None:
        """Read the whole shard."""
        file = self._folder / shard.name
        try:
            found = file_sha256(file)
        except OSError as error:
            raise UserError(f"shard {file} cannot be read: {error.strerror}") from None
        if found != shard.sha256:
            raise UserError(f"shard {file} does not match its checksum: restore it")
