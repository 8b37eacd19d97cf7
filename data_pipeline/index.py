"""Reading shards: the index says where every member lies, so any member of any sample is one positioned read.

The index also knows which labels exist, so that the plan decides what to read before any tar is opened.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from configs.errors import UserError
from configs.schema import DataConfig
from configs.tasks import TASKS, TaskSpec
from data_pipeline.codecs import decode_image, decode_label, decode_member
from data_pipeline.index_file import INDEX_FILE, IndexHead, parse_index
from data_pipeline.places import open_storage
from data_pipeline.sample import AnyArray
from data_pipeline.skips import MemberError, UnfitMember
from data_pipeline.storage import OpenShards, ShardFile, Storage
from data_pipeline.tarscan import IMAGE_FIELD, MASK_FIELD, META_FIELD, Members, ShardEntry


class ShardIndex:
    """All samples of a folder of shards, each member readable alone. N samples.

    Reads are positioned, so one index may be used by forked or pickled copies of the process at the same time.

    Attributes:
        storage: where the shards are.
        shards: the shards' files.
        shard_count: their number.
        size: height and width of every stored image, in pixels.
        tasks: labels that at least one sample has, sorted.
        keys: the N samples' keys.
        shard_of: (N,) int32, each sample's shard.
        file_bytes: size of all shards together.
        fingerprint: 16 hexadecimal digits that change with any byte of any shard.
    """

    def __init__(self, storage: Storage, head: IndexHead, entries: Iterable[ShardEntry]) -> None:
        """Use `ShardIndex.load`. Of each entry only compact arrays outlive its turn."""
        self.storage = storage
        self.size = head.side
        keys: list[str] = []
        counts: list[int] = []
        shards: list[ShardFile] = []
        places: dict[str, list[_Places]] = {}
        for entry in entries:
            shard = ShardFile(entry.file, entry.file_bytes, entry.sha256)
            storage.check(shard)
            for name, members in entry.members.items():
                places.setdefault(name, []).append(_Places.of(len(keys), members))
            keys.extend(entry.keys)
            counts.append(len(entry.keys))
            shards.append(shard)
        self.shards = tuple(shards)
        self.shard_count = len(shards)
        self.file_bytes = sum(shard.file_bytes for shard in shards)
        self.keys = tuple(keys)
        self.shard_of: NDArray[np.int32] = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        checksums = json.dumps([(shard.name, shard.sha256) for shard in shards])
        self.fingerprint = hashlib.sha256(checksums.encode()).hexdigest()[:16]
        self._columns = _merge_columns(places, len(keys))
        self.tasks = tuple(sorted(self._columns.keys() & TASKS.keys()))
        self._open = OpenShards(storage, self.shards)

    @classmethod
    def load(cls, place: Path | str, config: DataConfig | None = None) -> "ShardIndex":
        """Read the index of a folder of shards, and compare it with the files that are there.

        Args:
            place: the folder, or its URL.
            config: how remote shards are cached; None: the defaults.

        Raises:
            UserError: no folder, no index, one that is damaged or of another version, a missing shard, or a shard whose
                size differs.
        """
        storage = open_storage(place, config or DataConfig())
        path = storage.find(INDEX_FILE)
        if path is None:
            raise storage.unindexed()
        where = storage.where(INDEX_FILE)
        try:
            head, entries = parse_index(path.read_text(encoding="utf-8"))
            return cls(storage, head, entries)
        except UserError:
            raise
        except (ValueError, OverflowError) as error:
            raise UserError(
                f"{where} is not an index that this version reads ({_describe(error)}): restore it, or delete it and "
                f"make it again by packing, or by `modsquad data index {storage.place}` for shards of another program"
            ) from None
        except OSError as error:
            raise UserError(f"{where} cannot be read: {error.strerror}") from None

    def __len__(self) -> int:
        return len(self.keys)

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
        file = self.shards[int(self.shard_of[sample])].name
        return f"shard {self.storage.where(file)}, sample {self.keys[sample]}, member {member}"

    def read(self, sample: int, member: str) -> bytes:
        """Return the bytes of one member.

        Raises:
            MemberError: its bytes cannot be read.
            UserError: the sample has no such member, or the shard cannot be opened or was cut.
        """
        if not self.has(sample, member):
            raise UserError(f"{self.where(sample, member)} does not exist")
        column = self._columns[member]
        size = int(column.size[sample])
        try:
            descriptor = self._open.descriptor(int(self.shard_of[sample]))
        except OSError as error:
            raise UserError(f"{self.where(sample, member)} cannot be opened: {error.strerror}") from None
        try:
            data = os.pread(descriptor, size, int(column.offset[sample]))
        except OSError as error:
            raise MemberError(f"{self.where(sample, member)} cannot be read: {error.strerror}") from None
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
            raise UnfitMember(f"{where} must be grey, but is {mask.shape}: convert it")
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
        for shard in self.shards:
            self.storage.verify(shard)

    def close(self) -> None:
        """Close the files that reads opened; a later read opens them again."""
        self._open.close()

    def _sized(self, array: AnyArray, where: str) -> AnyArray:
        if array.shape[:2] != (self.size, self.size):
            height, width = array.shape[:2]
            raise UnfitMember(
                f"{where} is {height} x {width} pixels, but the images are {self.size} x {self.size}: resize it and "
                "make the shard again"
            )
        return array


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
