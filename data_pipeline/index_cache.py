"""From index.json to its table: made when an index is first opened, kept beside it, and mapped by all who come later.

The table of a small index stays in memory. Where the folder of the index cannot be written, the table lies in the
user's folder on this node (`data_pipeline.node_files`).
"""

import hashlib
import io
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

from configs.atomic import atomic_path
from configs.errors import UserError
from data_pipeline.index_file import parse_index
from data_pipeline.index_table import IndexTable, write_table
from data_pipeline.node_files import locked, private_folder

TABLE_FILE = "index.bin"
SMALL_BYTES = 4 << 20
"""Size of index.json up to which its table stays in memory."""


def open_table(index: Path) -> IndexTable:
    """Return the table of an index.json, making it if there is none that belongs to it.

    Of the processes of a node, one makes it while the others wait. A table belongs to an index.json of one size and one
    time of its last change.

    Raises:
        OSError: index.json cannot be read.
        ValueError: it is not an index of this version.
        UserError: there is no space for the table.
    """
    status = index.stat()
    source = (status.st_size, status.st_mtime_ns)
    if status.st_size <= SMALL_BYTES:
        memory = io.BytesIO()
        with index.open(encoding="utf-8") as text:
            write_table(memory, source, *parse_index(text))
        return IndexTable(memory.getvalue())
    found = _find(index, source)
    if found is None:
        path = _place_for_table(index)
        with ExitStack() as stack:
            # Some file systems know no locks: there, several processes may make the same table, and the last one stays.
            with suppress(OSError):
                stack.enter_context(locked(path.with_name(f".{path.name}.lock")))
            found = _find(index, source) or _make(index, source, path)
    return found


class MappedTable(IndexTable):
    """A table in a file. A pickled copy maps it anew, and takes no more room than its path."""

    def __init__(self, index: Path, path: Path) -> None:
        """Map the table at `path` of the index.json at `index`.

        Raises:
            OSError: it cannot be read.
            ValueError: it was cut, or is not a table of this version.
        """
        with path.open("rb") as file:
            super().__init__(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        self.path = path
        self._index = index

    def __reduce__(self) -> tuple[Callable[..., IndexTable], tuple[Path, tuple[int, ...]]]:
        return _reopen, (self._index, self.source)


def _reopen(index: Path, source: tuple[int, int]) -> IndexTable:
    """Return the table that a pickled index used."""
    table = _find(index, source) or open_table(index)
    if table.source != source:
        raise UserError(f"{index} changed while it was in use: start again")
    return table


def _places(index: Path) -> Iterator[Path]:
    """Yield where the table may be."""
    yield index.with_name(TABLE_FILE)
    folder = private_folder()
    if folder is not None:
        yield folder / f"index-{hashlib.sha256(os.fsencode(index.resolve())).hexdigest()[:32]}.bin"


def _place_for_table(index: Path) -> Path:
    """Return where the table is to be."""
    beside, *others = _places(index)
    return others[0] if others and not os.access(index.parent, os.W_OK) else beside


def _find(index: Path, source: tuple[int, int]) -> IndexTable | None:
    """Map the table; None: there is none, it was cut, or it belongs to another index.json."""
    for path in _places(index):
        with suppress(OSError, ValueError):
            table = MappedTable(index, path)
            if table.source == source:
                return table
    return None


def _make(index: Path, source: tuple[int, int], path: Path) -> IndexTable:
    with index.open(encoding="utf-8") as text:
        head, entries = parse_index(text)
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            write_table(file, source, head, entries)
    return MappedTable(index, path)
