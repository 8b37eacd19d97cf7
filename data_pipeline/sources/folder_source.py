"""Any folder or table of images and labels as samples, as a YAML file describes it (`sources.folder_spec`).

Images may be of any size. Codes take the nearest pixel, images and smooth maps the mean.
"""

import hashlib
from copy import copy
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from data_pipeline.sample import AnyArray, Sample, known_labels
from data_pipeline.source import PartialSample, Problem
from data_pipeline.sources.entries import Entries
from data_pipeline.sources.folder_arrays import read_array, read_picture
from data_pipeline.sources.folder_files import IMAGE, Row, find_rows, printable
from data_pipeline.sources.folder_labels import Converted, FileLabel
from data_pipeline.sources.folder_spec import MASK, load_spec
from data_pipeline.sources.folder_splits import take_part
from data_pipeline.sources.folder_vectors import VectorLabel
from data_pipeline.sources.squares import check_aspect, nearest_at, square_mean, square_nearest

Bools = NDArray[np.bool_]


class FolderSource:
    """The samples that a description leads to, those of one part of its split.

    `source[i]` raises `PartialSample` for a sample with files or cells that cannot be used; the rest is in its
    `sample`, which is None without an image. What belongs to no sample comes last: labels without an image, lines of a
    table or list that lead nowhere.

    `mask_valid` is what the description says, else where a depth label gives a depth; and where normals are given, if
    their encoding has no code for unknown.

    Attributes:
        name: identifies the content: description, names, fields and files, size and part.
        task_table: the task table and what the description defines beside it.
        facts: a line on the split, if there is one.
    """

    def __init__(self, description: Path, size: int, split: str | None = None) -> None:
        """Find the samples; no image is opened yet.

        Args:
            description: the YAML file.
            size: side of the square samples in pixels.
            split: part to take, where the description parts the samples.

        Raises:
            UserError: as `load_spec`, `find_rows` and `take_part`; a size below 1; a part without a split or the other
                way round.
        """
        if size < 1:
            raise UserError(f"size {size}: give the side of the samples in pixels, 1 or more")
        self._spec = load_spec(description)
        self.task_table = self._spec.task_table
        self._size = size
        folder = description.parent
        table = None if self._spec.table is None else folder / self._spec.table
        try:
            found = find_rows(self._spec, folder / self._spec.root, table)
            self.facts: tuple[str, ...] = ()
            if self._spec.split is not None:
                if split is None:
                    raise UserError("split: the samples are parted: say which part to take, such as --split train")
                found, fact = take_part(found, self._spec.split, split, folder)
                self.facts = (fact,)
            elif split is not None:
                raise UserError(f"the samples are not parted, so there is no '{split}': say how as `split`")
        except UserError as error:
            raise UserError(f"{description}: {error}") from None
        self._split = split
        self._entries = Entries(found.rows, found.problems)
        files = [(row.name, row.fields, sorted(row.files)) for row in found.rows]
        content = (repr(self._spec), size, split, files, found.problems)
        digest = hashlib.sha256(repr(content).encode("utf-8", "backslashreplace")).hexdigest()[:16]
        self.name = f"folder-{size}px-{len(self._spec.labels)}tasks-{digest}"

    def __len__(self) -> int:
        return len(self._entries)

    def part(self, samples: range) -> "FolderSource":
        """Return the source of some samples alone; its name is that of the whole."""
        part = copy(self)
        part._entries = self._entries.part(samples)
        return part

    def __getitem__(self, index: int) -> Sample:
        row = self._entries[index]
        problems = list(row.problems)
        if IMAGE not in row.files:
            raise PartialSample(problems, None)
        try:
            rgb = read_picture(row.files[IMAGE])
        except UserError as error:
            raise PartialSample([*problems, Problem(row.key, "", str(error), row.image)], None) from None
        converted = self._convert(row, rgb, problems)
        mask = self._mask(row, rgb, converted, problems)
        mask_valid = None if mask is None else self._nearest(mask).astype(np.uint8) * np.uint8(255)
        labels = {
            task: label
            for task in self._spec.labels
            if (label := self._label(task, row, converted, mask, problems)) is not None
        }
        height, width = rgb.shape[:2]
        sample = Sample(
            key=row.key,
            rgb=square_mean(rgb, self._size, fit=self._spec.fit),
            labels=known_labels(labels, self.task_table, mask_valid),
            mask_valid=mask_valid,
            meta=self._meta(row, height, width),
        )
        if problems:
            raise PartialSample(problems, sample)
        return sample

    def _convert(self, row: Row, rgb: NDArray[np.uint8], problems: list[Problem]) -> dict[str, Converted]:
        """The dense labels at their files' sizes; one that knows nothing of the square is none, and masks no other."""
        converted = {}
        for task, label in self._spec.labels.items():
            if isinstance(label, FileLabel) and task in row.files:
                try:
                    found = label.convert(self.task_table[task], read_array(row.files[task], label.key))
                    check_aspect(found.codes, rgb)
                    if found.known is None or self._nearest(found.known).any():
                        converted[task] = found
                except UserError as error:
                    problems.append(Problem(row.key, task, str(error), printable(row.files[task].path)))
        return converted

    def _mask(
        self, row: Row, rgb: NDArray[np.uint8], converted: dict[str, Converted], problems: list[Problem]
    ) -> Bools | None:
        """(H, W) at some file's size; None if nothing says where the geometry is known."""
        known = [found.known for task, found in converted.items() if self.task_table[task].target == "log_depth"]
        mask = known[0] if known else None
        if self._spec.mask_valid is not None and MASK in row.files:
            try:
                given = self._spec.mask_valid.yes(read_array(row.files[MASK], self._spec.mask_valid.key))
                check_aspect(given, rgb)
                mask = given
            except UserError as error:
                problems.append(Problem(row.key, MASK, str(error), printable(row.files[MASK].path)))
        for task, found in converted.items():
            # Where an encoding has no code for unknown, the mask alone can tell.
            if found.known is not None and self.task_table[task].encoding.invalid is None and not found.known.all():
                mask = found.known if mask is None else found.known & nearest_at(mask, found.known.shape)
        return mask

    def _label(
        self, task: str, row: Row, converted: dict[str, Converted], mask: Bools | None, problems: list[Problem]
    ) -> AnyArray | None:
        spec, label = self.task_table[task], self._spec.labels[task]
        if isinstance(label, VectorLabel):
            return self._vector(task, label, row, problems)
        if task not in converted:
            return None
        codes = converted[task].codes
        if spec.interpolation == "bilinear":
            known = mask if spec.uses_mask_valid else None
            small = square_mean(codes, self._size, known, self._spec.fit)
        else:
            small = self._nearest(codes)
        return label.finish(small)

    def _vector(self, task: str, label: VectorLabel, row: Row, problems: list[Problem]) -> AnyArray | None:
        path = ""
        try:
            if label.path is None:
                return label.from_fields(self.task_table[task], row.fields)
            if task not in row.files:
                return None
            path = printable(row.files[task].path)
            return label.from_array(self.task_table[task], read_array(row.files[task], label.key))
        except UserError as error:
            problems.append(Problem(row.key, task, printable(str(error)), path))
            return None

    def _nearest(self, array: AnyArray) -> AnyArray:
        return square_nearest(array, self._size, self._spec.fit)

    def _meta(self, row: Row, height: int, width: int) -> dict[str, str | int]:
        split = {} if self._split is None else {"split": printable(self._split)}
        return {
            "name": printable(row.name),
            "image": printable(row.relative),
            "height": height,
            "width": width,
            **split,
        }
