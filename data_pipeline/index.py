"""Reading shards: the index says where every member lies, so any member of any sample is one positioned read.

The index also knows which labels exist, so that the plan decides what to read before any tar is opened.
"""

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from configs.errors import UserError
from configs.tasks import TASKS, TaskSpec
from data_pipeline.codecs import decode_image, decode_label, decode_member
from data_pipeline.index_file import INDEX_FILE, IndexHead, parse_index
from data_pipeline.sample import AnyArray
from data_pipeline.source import JOB_FILE
from data_pipeline.tarscan import IMAGE_FIELD, MASK_FIELD, META_FIELD, Members, ShardEntry, file_sha256

# The plan keeps about `shuffle_window_shards` shards in use; more open files than this help nobody.
_OPEN_FILES = 64


class ShardIndex:
    """All samples of a folder of shards, each member readable alone. N samples.

    Reads are positioned, so one index may be used by forked or pickled copies of the process at the same time.

    Attributes:
        folder: where the shards are.
        size: height and width of every stored image, in pixels.
        tasks: labels that at least one sample has, sorted.
        keys: the N samples' keys.
        shard_of: (N,) int32, each sample's shard.
        shard_count: number of shards.
        file_bytes: size of all shards together.
        fingerprint: 16 hexadecimal digits that change with any byte of any shard.
    """

    def __init__(self, folder: Path, head: IndexHead, shards: Iterable[ShardEntry]) -> None:
        """Use `ShardIndex.load`. Of each entry only compact arrays outlive its turn."""
        self.folder = folder
        self.size = head.side
        self.file_bytes = 0
        keys: list[str] = []
        counts: list[int] = []
        checksums: list[tuple[str, str]] = []
        places: dict[str, list[_Places]] = {}
        for shard in shards:
            for name, members in shard.members.items():
                places.setdefault(name, []).append(_Places.of(len(keys), members))
            keys.extend(shard.keys)
            counts.append(len(shard.keys))
            checksums.append((shard.file, shard.sha256))
            self.file_bytes += shard.file_bytes
        self.keys = tuple(keys)
        self.shard_count = len(counts)
        self.shard_of: NDArray[np.int32] = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        self.fingerprint = hashlib.sha256(json.dumps(checksums).encode()).hexdigest()[:16]
        self._shards = tuple(checksums)
        self._columns = _merge_columns(places, len(keys))
        self.tasks = tuple(sorted(self._columns.keys() & TASKS.keys()))
        self._files: OrderedDict[int, int] = OrderedDict()

    @classmethod
    def load(cls, folder: Path | str) -> "ShardIndex":
        """Read the index of `folder` and compare it with the files that are there.

        Raises:
            UserError: no folder, no index, one that is damaged or of another version, a missing shard, or a shard whose
                size differs.
        """
        folder = Path(folder)
        path = folder / INDEX_FILE
        if not path.is_file():
            raise UserError(_describe_unindexed(folder))
        try:
            head, shards = parse_index(path.read_text(encoding="utf-8"))
            return cls(folder, head, (_present(path, shard) for shard in shards))
        except UserError:
            raise
        except (ValueError, OverflowError) as error:
            raise UserError(
                f"{path} is not an index that this version reads ({_describe(error)}): restore it, or delete it and "
                f"make it again by packing, or by `modsquad data index {folder}` for shards of another program"
            ) from None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None

    def __len__(self) -> int:
        return len(self.keys)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}

    def available(self, tasks: Sequence[str]) -> NDArray[np.bool_]:
        """Return (N, T) bool: which sample has a label of which task."""
        columns = [self._columns[task].offset >= 0 if task in self._columns else None for task in tasks]
        absent = np.zeros(len(self), np.bool_)
        return np.stack([absent if column is None else column for column in columns], axis=1)

    def has(self, sample: int, member: str) -> bool:
        """Whether the sample has the member: `rgb`, `mask_valid`, `meta` or a task's name."""
        return member in self._columns and bool(self._columns[member].offset[sample] >= 0)

    def where(self, sample: int, member: str) -> str:
        """Name a member for messages: shard, key and member."""
        file = self.folder / self._shards[int(self.shard_of[sample])][0]
        return f"shard {file}, sample {self.keys[sample]}, member {member}"

    def read(self, sample: int, member: str) -> bytes:
        """Return the bytes of one member.

        Raises:
            UserError: the sample has no such member, or the shard cannot be read or was cut.
        """
        if not self.has(sample, member):
            raise UserError(f"{self.where(sample, member)} does not exist")
        column = self._columns[member]
        size = int(column.size[sample])
        try:
            data = os.pread(self._descriptor(int(self.shard_of[sample])), size, int(column.offset[sample]))
        except OSError as error:
            raise UserError(f"{self.where(sample, member)} cannot be read: {error.strerror}") from None
        if len(data) != size:
            raise UserError(f"{self.where(sample, member)} is cut off: the shard is truncated, restore it")
        return data

    def suffix(self, sample: int, member: str) -> str:
        """Return the format of a member that exists, such as `png`."""
        column = self._columns[member]
        return column.suffixes[int(column.suffix[sample])]

    def image(self, sample: int) -> NDArray[np.uint8]:
        """Return the (S, S, 3) uint8 image.

        Raises:
            UserError: a damaged member, or another size than the index says.
        """
        where = self.where(sample, IMAGE_FIELD)
        image = decode_image(self.suffix(sample, IMAGE_FIELD), self.read(sample, IMAGE_FIELD), where)
        return self._sized(image, where)

    def label(self, sample: int, spec: TaskSpec) -> AnyArray:
        """Return a label as stored: dense (S, S) or (S, S, C), vectors (C,).

        Raises:
            UserError: no such label, a damaged member, a wrong bit depth, or another size than the index says.
        """
        where = self.where(sample, spec.name)
        data = self.read(sample, spec.name)
        label = decode_label(spec, self.suffix(sample, spec.name), data, where)
        return self._sized(label, where) if spec.dense else label

    def mask_valid(self, sample: int) -> NDArray[np.bool_]:
        """Return (S, S) bool, False where nothing is known about the scene; all True without such a member.

        Raises:
            UserError: a damaged member, or another size than the index says.
        """
        if not self.has(sample, MASK_FIELD):
            return np.ones((self.size, self.size), np.bool_)
        where = self.where(sample, MASK_FIELD)
        mask = decode_member(self.suffix(sample, MASK_FIELD), self.read(sample, MASK_FIELD), where)
        if mask.ndim != 2:
            raise UserError(f"{where} must be grey, but is {mask.shape}: convert it")
        return self._sized(mask, where) > 0

    def meta(self, sample: int) -> dict[str, Any]:
        """Return the facts stored about the sample; empty without such a member.

        Raises:
            UserError: the member is not a JSON object.
        """
        if not self.has(sample, META_FIELD):
            return {}
        data = self.read(sample, META_FIELD)
        try:
            facts = json.loads(data)
        except ValueError:
            facts = None
        if not isinstance(facts, dict):
            raise UserError(f"{self.where(sample, META_FIELD)} is not a JSON object: restore the shard")
        return facts

    def verify(self) -> None:
        """Compare every shard with its checksum.

        Raises:
            UserError: names the first shard whose bytes changed or cannot be read.
        """
        for file, sha256 in self._shards:
            try:
                found = file_sha256(self.folder / file)
            except OSError as error:
                raise UserError(f"shard {self.folder / file} cannot be read: {error.strerror}") from None
            if found != sha256:
                raise UserError(f"shard {self.folder / file} does not match its checksum: restore it")

    def close(self) -> None:
        """Close the files that reads opened; a later read opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _sized(self, array: AnyArray, where: str) -> AnyArray:
        if array.shape[:2] != (self.size, self.size):
            height, width = array.shape[:2]
            raise UserError(
                f"{where} is {height} x {width} pixels, but the images are {self.size} x {self.size}: resize it and "
                "make the shard again"
            )
        return array

    def _descriptor(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        if len(self._files) >= _OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        descriptor = os.open(self.folder / self._shards[shard][0], os.O_RDONLY | os.O_CLOEXEC)
        self._files[shard] = descriptor
        return descriptor


def _present(index: Path, shard: ShardEntry) -> ShardEntry:
    """Return the entry if its file is there and has the size that the index says."""
    file = index.parent / shard.file
    try:
        found = file.stat().st_size
    except OSError as error:
        raise UserError(
            f"shard {file} is missing ({error.strerror}), though {index} lists it: restore it, or delete "
            f"{index.parent} and pack the data again"
        ) from None
    if found != shard.file_bytes:
        raise UserError(
            f"shard {file} has {found} bytes, but {index} says {shard.file_bytes}: it is truncated or was replaced; "
            f"restore it, or delete {index.parent} and pack the data again"
        )
    return shard


@dataclass(frozen=True)
class _Places:
    """Places of one kind of member in one shard, whose samples are numbers `first` on."""

    first: int
    offset: NDArray[np.int64]
    size: NDArray[np.int32]

    @classmethod
    def of(cls, first: int, members: Members) -> "_Places":
        return cls(first, np.array(members.offset, np.int64), np.array(members.size, np.int32))


@dataclass(frozen=True)
class _Column:
    """Places of one field over all N samples.

    Attributes:
        offset: (N,) int64, -1 where absent.
        size: (N,) int32 bytes.
        suffix: (N,) int8, index into `suffixes`.
        suffixes: formats of the field.
    """

    offset: NDArray[np.int64]
    size: NDArray[np.int32]
    suffix: NDArray[np.int8]
    suffixes: tuple[str, ...]


def _merge_columns(places: dict[str, list[_Places]], count: int) -> dict[str, _Column]:
    """Join the shards' places, and the formats of one field; empties `places`, as the two together are large."""
    suffixes: dict[str, list[str]] = {}
    for name in sorted(places):
        field, _, suffix = name.rpartition(".")
        suffixes.setdefault(field, []).append(suffix)
    columns = {}
    for field, known in suffixes.items():
        column = _Column(
            np.full(count, -1, np.int64), np.zeros(count, np.int32), np.zeros(count, np.int8), tuple(known)
        )
        for number, suffix in enumerate(known):
            for part in places.pop(f"{field}.{suffix}"):
                rows, here = slice(part.first, part.first + len(part.offset)), part.offset >= 0
                column.offset[rows][here] = part.offset[here]
                column.size[rows][here] = part.size[here]
                column.suffix[rows][here] = number
        columns[field] = column
    return columns


def _describe(error: Exception) -> str:
    """Say in one line what is wrong with an index."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"


def _describe_unindexed(folder: Path) -> str:
    if not folder.is_dir():
        return f"there is no folder {folder}: make data with `modsquad data rooms {folder} --images 1000`"
    if (folder / JOB_FILE).is_file():
        return f"{folder} has no {INDEX_FILE} yet: the packing did not finish, run it again"
    if any(folder.glob("*.tar")):
        return f"{folder} holds tar shards but no {INDEX_FILE}: make it with `modsquad data index {folder}`"
    return f"{folder} holds no shards: make data with `modsquad data rooms {folder} --images 1000`"
