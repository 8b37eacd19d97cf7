"""Reading shards: the index says where every member lies, so any member of any sample is one positioned read.

The index also knows which labels exist, so that the plan decides what to read before any tar is opened.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from configs.errors import UserError
from configs.schema import DataConfig
from configs.task_definitions import DEFINITIONS_KEY, contradiction
from configs.tasks import TaskSpec, TaskTable
from data_pipeline.codecs import decode_image, decode_label, decode_member
from data_pipeline.index_cache import open_table
from data_pipeline.index_file import INDEX_FILE
from data_pipeline.index_table import IndexTable, Member
from data_pipeline.places import open_storage
from data_pipeline.planning.labels import LabelTable, unpack_codes
from data_pipeline.sample import AnyArray
from data_pipeline.skips import MemberError, UnfitMember
from data_pipeline.storage import OpenShards, Storage
from data_pipeline.tarscan import IMAGE_FIELD, MASK_FIELD, META_FIELD
from data_pipeline.tarwalk import BLOCK_BYTES, is_header_of


class ShardIndex:
    """All samples of a folder of shards, each member readable alone. N samples.

    Reads are positioned, so one index may be used by forked or pickled copies of the process at the same time.

    Attributes:
        storage: where the shards are.
        shards: the shards' files.
        shard_count: their number.
        size: height and width of every stored image, in pixels.
        tasks: labels that at least one sample has, sorted.
        file_bytes: size of all shards together.
        fingerprint: 16 hexadecimal digits that change with any byte of any shard.
    """

    def __init__(self, storage: Storage, table: IndexTable) -> None:
        """Use `ShardIndex.load`."""
        self.storage = storage
        self.shards = table.shards
        self.shard_count = len(self.shards)
        self.size = table.side
        self.file_bytes = sum(shard.file_bytes for shard in self.shards)
        checksums = json.dumps([(shard.name, shard.sha256) for shard in self.shards])
        self.fingerprint = hashlib.sha256(checksums.encode()).hexdigest()[:16]
        self.tasks = tuple(sorted(table.fields & table.task_table.keys()))
        self._table = table
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
            table = open_table(path)
        except (ValueError, OverflowError, RecursionError) as error:
            raise UserError(
                f"{where} is not an index that this version reads ({_describe(error)}): restore it, or delete it and "
                f"make it again by packing, or by `modsquad data index {storage.place}` for shards of another program"
            ) from None
        except OSError as error:
            raise UserError(f"{where} cannot be read: {error.strerror}") from None
        for shard in table.shards:
            storage.check(shard)
        return cls(storage, table)

    def __len__(self) -> int:
        return len(self._table)

    @property
    def task_table(self) -> TaskTable:
        """The task table and what these shards define beside it."""
        return self._table.task_table

    @property
    def keys(self) -> Sequence[str]:
        """The N samples' keys, read as they are asked for."""
        return self._table.keys

    @property
    def shard_of(self) -> NDArray[np.int32]:
        """(N,) each sample's shard."""
        return self._table.shard_of

    def check_tasks(self, specs: Iterable[TaskSpec]) -> None:
        """Check that tasks mean here what they mean elsewhere.

        Raises:
            UserError: the shards define one otherwise, or hold labels of one that their index does not define.
        """
        for spec in specs:
            ours = self.task_table.get(spec.name)
            if ours is None and spec.name in self._table.fields:
                raise UserError(
                    f"{self.storage.where(INDEX_FILE)} does not say what '{spec.name}' is, which it has members of: "
                    f"make it again by `modsquad data index {self.storage.place} --define RECIPE`"
                )
            if ours is not None and (key := contradiction(ours, spec)) is not None:
                raise UserError(
                    f"{self.storage.where(INDEX_FILE)}: task '{spec.name}' was packed with another `{key}` than the "
                    f"configuration says: leave {DEFINITIONS_KEY}.{spec.name} out of it, or pack the data again"
                )

    def labels(self, tasks: Sequence[str]) -> LabelTable:
        """Return which sample has a label of which task, without reading it."""
        return self._table.labels(tasks)

    def available(self, tasks: Sequence[str]) -> NDArray[np.bool_]:
        """Return (N, T) bool: which sample has a label of which task."""
        return unpack_codes(self.labels(tasks).codes(slice(None)), len(tasks))

    def has(self, sample: int, member: str) -> bool:
        """Whether the sample has the member: `rgb`, `mask_valid`, `meta` or a task's name."""
        return self._table.member(sample, member) is not None

    def where(self, sample: int, member: str) -> str:
        """Name a member for messages: shard, key and member."""
        file = self.shards[int(self.shard_of[sample])].name
        return f"shard {self.storage.where(file)}, sample {self.keys[sample]}, member {member}"

    def read(self, sample: int, member: str) -> bytes:
        """Return the bytes of one member.

        Raises:
            MemberError: its bytes cannot be read.
            UserError: the sample has no such member, or the shard cannot be opened, was cut, or was replaced.
        """
        place = self._place(sample, member)
        block = self._pread(sample, member, BLOCK_BYTES + place.size, place.offset - BLOCK_BYTES)
        if len(block) != BLOCK_BYTES + place.size:
            raise UserError(f"{self.where(sample, member)} is cut off: the shard is truncated, restore it")
        # A shard may be replaced at any time, even by one of its size.
        if not is_header_of(block[:BLOCK_BYTES], f"{self.keys[sample]}.{member}.{place.suffix}", place.size):
            raise UserError(
                f"{self.where(sample, member)} is not where the index says: the shard was replaced or damaged; restore "
                "it, or make the index of the new shards"
            )
        return block[BLOCK_BYTES:]

    def suffix(self, sample: int, member: str) -> str:
        """Return the format of a member, such as `png`.

        Raises:
            UserError: the sample has no such member.
        """
        return self._place(sample, member).suffix

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
            UserError: says what is wrong with the first shard whose bytes changed or cannot be read, and names the
                others.
        """
        faults: dict[str, UserError] = {}
        for shard in self.shards:
            try:
                self.storage.verify(shard)
            except UserError as error:
                faults[shard.name] = error
        if faults:
            first, *others = faults
            more = f"; so it is with {len(others)} more: {', '.join(others)}" if others else ""
            raise UserError(f"{faults[first]}{more}")

    def close(self) -> None:
        """Close the files that reads opened; a later read opens them again."""
        self._open.close()

    def _place(self, sample: int, member: str) -> Member:
        place = self._table.member(sample, member)
        if place is None:
            raise UserError(f"{self.where(sample, member)} does not exist")
        return place

    def _pread(self, sample: int, member: str, size: int, offset: int) -> bytes:
        """Read from the sample's shard; what fails with one descriptor is tried once more with another.

        A server of files that was started again, or a short failure, may leave a descriptor that never reads again.
        """
        shard = int(self.shard_of[sample])
        problem: str | None = None
        for _ in range(2):
            try:
                descriptor = self._open.descriptor(shard)
            except OSError as error:
                raise UserError(f"{self.where(sample, member)} cannot be opened: {error.strerror}") from None
            try:
                return os.pread(descriptor, size, offset)
            except OSError as error:
                problem = error.strerror
                self._open.drop(shard)
        raise MemberError(f"{self.where(sample, member)} cannot be read: {problem}")

    def _sized(self, array: AnyArray, where: str) -> AnyArray:
        if array.shape[:2] != (self.size, self.size):
            height, width = array.shape[:2]
            raise UnfitMember(
                f"{where} is {height} x {width} pixels, but the images are {self.size} x {self.size}: resize it and "
                "make the shard again"
            )
        return array


def _describe(error: Exception) -> str:
    """Say in one line what is wrong with an index."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
