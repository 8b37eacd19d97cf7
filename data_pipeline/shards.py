"""Storage: a folder of plain WebDataset tars with one index of what lies where.

`ShardWriter` and `write_index` make such a folder; `build_index` makes the index of tars from elsewhere; `ShardIndex`
reads them.
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import webdataset

from configs.atomic import atomic_path, sync_folder, writer_name
from configs.errors import UserError
from configs.task_definitions import definitions_of
from configs.tasks import TASKS, TaskTable, get_task
from data_pipeline.codecs import PNG, ImageCodec, LabelCodec, encode_label, encode_mask
from data_pipeline.index import ShardIndex
from data_pipeline.index_file import INDEX_FILE, IndexHead, format_index
from data_pipeline.sample import AnyArray, Sample
from data_pipeline.source import JOB_FILE
from data_pipeline.tarscan import IMAGE_FIELD, MASK_FIELD, META_FIELD, ShardEntry, scan_shard

__all__ = ["INDEX_FILE", "ShardEntry", "ShardIndex", "ShardWriter", "build_index", "write_index"]

_KEY = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*")


class ShardWriter:
    """Write samples into one shard; the file appears under its name only when it is complete.

    Use as a context manager. The bytes depend on the samples alone: no times, no users.

    Attributes:
        path: the shard, `<name>.tar`.
    """

    def __init__(
        self, path: Path, label_codec: LabelCodec = "png", image_codec: ImageCodec = PNG, task_table: TaskTable = TASKS
    ) -> None:
        """Prepare to write.

        Args:
            path: the shard; its folder must exist.
            label_codec: how dense labels and masks are stored.
            image_codec: how images are stored.
            task_table: the tasks that samples may have labels of.
        """
        self.path = path
        self._label_codec = label_codec
        self._image_codec = image_codec
        self._task_table = task_table
        self._partial = path.with_name(f".{path.name}.{writer_name()}.partial")
        self._entry: ShardEntry | None = None
        self._side = 0

    def __enter__(self) -> "ShardWriter":
        self._file = self._partial.open("wb")
        # A fixed owner and time make the bytes reproducible; GNU headers carry keys longer than 100 characters.
        self._tar = webdataset.TarWriter(
            self._file, mtime=0, encoder=False, user="modsquad", group="modsquad", format="GNU_FORMAT"
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._tar.close()
            if error is None:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                entry = scan_shard(self._partial)
                os.replace(self._partial, self.path)
                sync_folder(self.path.parent)
                self._entry = entry.model_copy(update={"file": self.path.name})
        finally:
            try:
                self._file.close()  # Writes what is buffered, so a full disk fails it again.
            finally:
                self._partial.unlink(missing_ok=True)

    @property
    def entry(self) -> ShardEntry:
        """The shard's part of the index; exists once the context is left."""
        assert self._entry is not None, "the entry exists after the writer is closed"
        return self._entry

    def write(self, sample: Sample) -> None:
        """Append one sample.

        Raises:
            UserError: a bad key, an image that is not square or differs in size from the first one, a label that does
                not fit its task's encoding or the image. Nothing of the sample is written then.
        """
        self._tar.write({"__key__": sample.key, **self._encode(sample)})

    def _encode(self, sample: Sample) -> dict[str, bytes]:
        if not _KEY.fullmatch(sample.key):
            raise UserError(f"sample key '{sample.key}' may hold letters, digits, '_', '-' and '/' only: rename it")
        try:
            encoded = {IMAGE_FIELD: self._image_codec.encode(sample.rgb)}
            encoded |= {
                task: encode_label(get_task(task, self._task_table), label, self._label_codec)
                for task, label in sample.labels.items()
            }
            if sample.mask_valid is not None:
                encoded[MASK_FIELD] = encode_mask(sample.mask_valid, self._label_codec)
        except UserError as error:
            raise UserError(f"sample {sample.key}: {error}") from None
        self._check_sizes(sample)
        self._side = sample.rgb.shape[0]
        members = {f"{field}.{suffix}": data for field, (suffix, data) in encoded.items()}
        return {**members, f"{META_FIELD}.json": json.dumps(dict(sample.meta), sort_keys=True).encode()}

    def _check_sizes(self, sample: Sample) -> None:
        side = self._side or sample.rgb.shape[0]
        pictures: dict[str, AnyArray] = {IMAGE_FIELD: sample.rgb}
        pictures |= {task: label for task, label in sample.labels.items() if self._task_table[task].dense}
        if sample.mask_valid is not None:
            pictures[MASK_FIELD] = sample.mask_valid
        for field, array in pictures.items():
            if array.shape[:2] != (side, side):
                height, width = array.shape[:2]
                raise UserError(
                    f"sample {sample.key}: '{field}' is {height} x {width} pixels, but everything in {self.path.name} "
                    f"must be {side} x {side}: resize it"
                )


def write_index(folder: Path, entries: Iterable[ShardEntry], task_table: TaskTable = TASKS) -> None:
    """Write index.json for the shards of `folder`, atomically.

    Args:
        folder: of the shards.
        entries: their parts of the index, in any order.
        task_table: the tasks that members may be labels of; those that occur are defined in the index.

    Raises:
        UserError: no shard, shards of different image sizes, or a key that two samples share.
    """
    lines: list[tuple[str, str]] = []
    owner: dict[str, str] = {}
    fields: set[str] = set()
    first: ShardEntry | None = None
    for shard in entries:
        first = first or shard
        if shard.side != first.side:
            raise UserError(
                f"{folder}: images are {first.side} pixels in {first.file}, but {shard.side} in {shard.file}: "
                "pack them in one size"
            )
        for key in shard.keys:
            if key in owner:
                raise UserError(f"{folder}: sample {key} is in {owner[key]} and again in {shard.file}: remove one")
            owner[key] = shard.file
        fields |= shard.fields
        lines.append((shard.file, shard.model_dump_json()))
    if first is None:
        raise UserError(f"{folder} holds no tar shards: nothing to index")
    tasks = tuple(sorted(fields & task_table.keys()))
    definitions = definitions_of(task_table[task] for task in tasks)
    head = IndexHead(side=first.side, tasks=tasks, define_tasks=definitions)
    with atomic_path(folder / INDEX_FILE) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(format_index(head, (line for _, line in sorted(lines))))


def build_index(folder: Path, task_table: TaskTable = TASKS) -> None:
    """Index every `*.tar` of a folder that was written elsewhere, and write its index.json.

    Args:
        folder: of the shards.
        task_table: as in `write_index`.

    Raises:
        UserError: no shard, one that cannot be read or that `scan_shard` or `write_index` refuses, or a folder of
            `data_pipeline.pack`: an index would declare an unfinished packing complete.
    """
    if (folder / JOB_FILE).is_file():
        raise UserError(f"{folder} was filled by a packing, which writes {INDEX_FILE} itself: run the packing again")
    try:
        write_index(folder, map(scan_shard, sorted(folder.glob("*.tar"))), task_table)
    except OSError as error:
        raise UserError(f"shard {error.filename} cannot be read: {error.strerror}") from None
