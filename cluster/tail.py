"""Several log files at once, line by line."""

from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Generic, TypeVar

Name = TypeVar("Name", bound=Hashable)


class LogTail(Generic[Name]):
    """Follows files that grow; one that is not there yet is empty."""

    def __init__(self, files: Mapping[Name, Path]) -> None:
        """Begin at the start of each file."""
        self._files = dict(files)
        self._places = dict.fromkeys(files, 0)
        self._rest = dict.fromkeys(files, b"")

    def last(self, lines: int) -> Iterator[tuple[Name, str]]:
        """Yield the last `lines` lines of each file, file by file, and go on behind them."""
        for name in self._files:
            found = list(self._read(name))
            yield from ((name, line) for line in found[len(found) - lines if lines < len(found) else 0 :])

    def new(self) -> Iterator[tuple[Name, str]]:
        """Yield the complete lines that were added since the last call."""
        for name in self._files:
            yield from ((name, line) for line in self._read(name))

    def _read(self, name: Name) -> Iterator[str]:
        path = self._files[name]
        if not path.is_file():
            return
        with path.open("rb") as file:
            file.seek(self._places[name])
            data = self._rest[name] + file.read()
            self._places[name] = file.tell()
        *complete, self._rest[name] = data.split(b"\n")
        for line in complete:
            yield line.decode(errors="replace")
