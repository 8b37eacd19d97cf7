"""The binary form of an index: one file that all processes of a node map, and of which each reads what it needs.

Parsing the index.json of millions of samples takes a minute and holding it takes gigabytes; opening its table takes
milliseconds, and memory only for the pages that are read. One block per shard, written as entries come: (n, F) offsets,
(n, F) sizes, ends of keys, keys. Behind them one number per sample and per set of labels, and a directory in JSON with
its checksum, so that a file that was cut or belongs to another index is noticed.
"""

import hashlib
import json
import mmap
import struct
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from operator import eq
from typing import Any, BinaryIO, NamedTuple, TypedDict, overload

import numpy as np
from numpy.typing import NDArray

from configs.task_definitions import TaskDefinition, derive_tasks
from configs.tasks import TaskTable
from data_pipeline.index_file import IndexHead
from data_pipeline.planning.labels import Codes, LabelTable, code_dtype
from data_pipeline.storage import ShardFile
from data_pipeline.tarscan import ShardEntry

_VERSION = 2
_ALIGNMENT = 8
_OFFSET, _SIZE, _END = struct.Struct("<q"), struct.Struct("<i"), struct.Struct("<I")
# Where the directory begins, its bytes, its SHA-256.
_FOOTER = struct.Struct("<QQ32s")


class Member(NamedTuple):
    """Where a member lies in its shard, and its format, such as `png`."""

    offset: int
    size: int
    suffix: str


class _Directory(TypedDict):
    """What is told about the blocks.

    Attributes:
        source: identifies the index.json that the table was made from.
        layouts: sets of member names, each the columns of some blocks.
        shards: (file, bytes, SHA-256, samples, layout, where the block begins).
        tasks: bit t of a label set tells of this task.
        define_tasks: definitions of tasks that are none of the task table.
        shard_of, label_sets: where these arrays begin.
    """

    version: int
    source: list[int]
    side: int
    layouts: list[list[str]]
    shards: list[tuple[str, int, str, int, int, int]]
    tasks: list[str]
    define_tasks: dict[str, Any]
    shard_of: int
    label_sets: int


def write_table(file: BinaryIO, source: Sequence[int], head: IndexHead, entries: Iterable[ShardEntry]) -> None:
    """Write the table of an index; of each entry little outlives its turn.

    Args:
        file: empty.
        source: identifies the index.json.
        head: the facts of the index.
        entries: its shards.
    """
    layouts: dict[tuple[str, ...], int] = {}
    task_table = derive_tasks(head.define_tasks)
    tasks: dict[str, int] = {}
    shards: list[tuple[str, int, str, int, int, int]] = []
    label_sets: list[Codes] = []
    for entry in entries:
        layout = layouts.setdefault(tuple(entry.members), len(layouts))
        shards.append((entry.file, entry.file_bytes, entry.sha256, len(entry.keys), layout, file.tell()))
        label_sets.append(_label_sets(entry, task_table, tasks))
        _write_block(file, entry)
    counts = [shard[3] for shard in shards]
    arrays: list[int] = []
    for array in (np.repeat(np.arange(len(counts), dtype=np.int32), counts), np.concatenate(label_sets)):
        arrays.append(file.tell())
        _write_aligned(file, array.tobytes())
    directory: _Directory = {
        "version": _VERSION,
        "source": list(source),
        "side": head.side,
        "layouts": [list(names) for names in layouts],
        "shards": shards,
        "tasks": list(tasks),
        "define_tasks": {name: definition.model_dump() for name, definition in head.define_tasks.items()},
        "shard_of": arrays[0],
        "label_sets": arrays[1],
    }
    text = json.dumps(directory).encode()
    place = file.tell()
    file.write(text)
    file.write(_FOOTER.pack(place, len(text), hashlib.sha256(text).digest()))


def _label_sets(entry: ShardEntry, task_table: TaskTable, tasks: dict[str, int]) -> Codes:
    """Return (n,) the labels of each sample as bits, numbered by `tasks`, which grows with the tasks that occur."""
    sets = np.zeros(len(entry.keys), code_dtype(len(task_table)))
    for name, members in entry.members.items():
        field = name.rpartition(".")[0]
        if field in task_table:
            bit = sets.dtype.type(1 << tasks.setdefault(field, len(tasks)))
            sets[np.array(members.offset) >= 0] |= bit
    return sets


def _write_block(file: BinaryIO, entry: ShardEntry) -> None:
    keys = [key.encode(errors="surrogatepass") for key in entry.keys]
    columns = entry.members.values()
    shape = (len(columns), len(keys))
    parts: list[NDArray[Any]] = [
        np.array([members.offset for members in columns], "<i8").reshape(shape).T,
        np.array([members.size for members in columns], "<i4").reshape(shape).T,
        np.array([0, *accumulate(map(len, keys))], "<u4"),
    ]
    _write_aligned(file, b"".join([*(part.tobytes() for part in parts), *keys]))


def _write_aligned(file: BinaryIO, data: bytes) -> None:
    file.write(data)
    file.write(bytes(-len(data) % _ALIGNMENT))


class IndexTable:
    """An index in its binary form, in a file or in memory. N samples.

    Attributes:
        source: identifies the index.json it was made from.
        side: height and width of every stored image, in pixels.
        shards: the shards' files.
        fields: member names without their formats.
        task_table: the tasks that fields may be labels of.
        keys: the N samples' keys.
        shard_of: (N,) int32, each sample's shard.
    """

    def __init__(self, data: mmap.mmap | bytes) -> None:
        """Read the directory of `data`.

        Raises:
            ValueError: it was cut, or is not a table of this version.
        """
        directory = _read_directory(data)
        self._data = data
        self.source = tuple(directory["source"])
        self.side = directory["side"]
        self.shards = tuple(ShardFile(*shard[:3]) for shard in directory["shards"])
        self._starts = list(accumulate((shard[3] for shard in directory["shards"]), initial=0))
        layouts = [_Layout(names) for names in directory["layouts"]]
        self._blocks = [_Block(shard[5], shard[3], layouts[shard[4]]) for shard in directory["shards"]]
        self.fields = frozenset(field for layout in layouts for field in layout.fields)
        self.task_table = derive_tasks(
            {name: TaskDefinition.model_validate(values) for name, values in directory["define_tasks"].items()}
        )
        self._bits = {task: bit for bit, task in enumerate(directory["tasks"])}
        self.keys = Keys(self)
        self.shard_of: NDArray[np.int32] = np.frombuffer(data, "<i4", len(self), directory["shard_of"])
        stored = code_dtype(len(self.task_table)).newbyteorder("<")
        self._label_sets = np.frombuffer(data, stored, len(self), directory["label_sets"])

    def __len__(self) -> int:
        return self._starts[-1]

    def __reduce__(self) -> tuple[Callable[..., "IndexTable"], tuple[Any, ...]]:
        return IndexTable, (self._data,)

    def member(self, sample: int, field: str) -> Member | None:
        """Return where a member of a sample lies; None: it has no such member."""
        shard, row = self._place(sample)
        return self._blocks[shard].member(self._data, row, field)

    def key(self, sample: int) -> str:
        """Return the key of a sample."""
        shard, row = self._place(sample)
        return self._blocks[shard].key(self._data, row)

    def labels(self, tasks: Sequence[str]) -> LabelTable:
        """Return which sample has a label of which task."""
        return LabelTable(self._label_sets, [self._bits.get(task) for task in tasks])

    def _place(self, sample: int) -> tuple[int, int]:
        """Return a sample's shard, and its number in it."""
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        shard = bisect_right(self._starts, sample) - 1
        return shard, sample - self._starts[shard]


class _Layout:
    """The columns of a block: `fields` says which columns hold a field, one per format."""

    def __init__(self, names: Sequence[str]) -> None:
        self.columns = len(names)
        self.fields: dict[str, list[tuple[int, str]]] = {}
        for column, name in enumerate(names):
            field, _, suffix = name.rpartition(".")
            self.fields.setdefault(field, []).append((column, suffix))


class _Block:
    """Where the members and keys of one shard's samples are told."""

    def __init__(self, first: int, samples: int, layout: _Layout) -> None:
        cells = samples * layout.columns
        self._layout = layout
        self._offsets = first
        self._sizes = first + cells * _OFFSET.size
        self._ends = self._sizes + cells * _SIZE.size
        self._keys = self._ends + (samples + 1) * _END.size

    def member(self, data: mmap.mmap | bytes, row: int, field: str) -> Member | None:
        for column, suffix in self._layout.fields.get(field, ()):
            cell = row * self._layout.columns + column
            (offset,) = _OFFSET.unpack_from(data, self._offsets + cell * _OFFSET.size)
            if offset >= 0:
                (size,) = _SIZE.unpack_from(data, self._sizes + cell * _SIZE.size)
                return Member(offset, size, suffix)
        return None

    def key(self, data: mmap.mmap | bytes, row: int) -> str:
        (first,) = _END.unpack_from(data, self._ends + row * _END.size)
        (end,) = _END.unpack_from(data, self._ends + (row + 1) * _END.size)
        return data[self._keys + first : self._keys + end].decode(errors="surrogatepass")


class Keys(Sequence[str]):
    """The keys of a table's samples, decoded as they are asked for."""

    def __init__(self, table: IndexTable) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...

    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        if isinstance(index, slice):
            return tuple(map(self._table.key, range(*index.indices(len(self)))))
        return self._table.key(index + len(self) if index < 0 else index)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    __hash__ = None  # type: ignore[assignment]

    def __iter__(self) -> Iterator[str]:
        return map(self._table.key, range(len(self)))


def _read_directory(data: mmap.mmap | bytes) -> _Directory:
    if len(data) < _FOOTER.size:
        raise ValueError("it was cut")
    place, size, digest = _FOOTER.unpack(data[-_FOOTER.size :])
    text = data[place : place + size]
    if place + size + _FOOTER.size != len(data) or hashlib.sha256(text).digest() != digest:
        raise ValueError("it was cut or damaged")
    directory: _Directory = json.loads(text)
    if directory["version"] != _VERSION:
        raise ValueError(f"its version is {directory['version']}")
    return directory
