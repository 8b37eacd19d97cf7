"""PASCAL-Context in the PASCAL_MT layout as samples: its five tasks, the official splits, the benchmark's void rules.

The whole image becomes the square, each side scaled on its own, as ASTMT and M3ViT train and measure at 512 x 512.
Shards hold squares only: cropping would take a quarter of a 500 x 375 photo, people at its sides included, out of
training and measurement, and padding would need a void that saliency and edges do not have.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from configs.errors import UserError
from configs.tasks import GROUPS, TASKS, TaskSpec
from data_pipeline.codecs import decode_image, decode_label
from data_pipeline.rooms.regions import boundaries
from data_pipeline.sample import AnyArray, Sample, known_labels
from data_pipeline.source import PartialSample, Problem
from data_pipeline.sources.entries import Entries
from data_pipeline.sources.pascal_context_files import (
    IMAGES,
    LABEL_MAP,
    Entry,
    Split,
    check_shape,
    find_images,
    place_of,
    read_codes,
    read_label_map,
    read_parts,
)
from data_pipeline.sources.squares import square_mean, square_nearest

_TASKS = GROUPS["pascal_context"]
_PUBLISHED: Mapping[Split, int] = {"train": 4998, "val": 5105}
_VOID = 255
# Classes of PASCAL-Context whose normals the benchmark trusts: those that NYU depth (894 classes), on which the network
# behind the normals was trained, has under the same name, without "unknown"; and tvmonitor (427).
_CLASSES_WITH_NORMALS = np.array(
    [
        3, 4, 6, 9, 10, 11, 13, 15, 17, 18, 22, 23, 29, 30, 33, 34, 36, 37, 38, 39, 41, 43, 46, 49, 50, 51, 53, 55, 56,
        59, 61, 62, 65, 66, 68, 69, 72, 73, 78, 83, 84, 85, 87, 88, 95, 96, 101, 104, 105, 107, 111, 113, 115, 122, 124,
        135, 141, 142, 143, 146, 150, 154, 157, 158, 159, 165, 172, 174, 181, 183, 184, 191, 193, 195, 197, 199, 202,
        213, 215, 216, 219, 220, 223, 225, 228, 230, 232, 233, 238, 239, 242, 243, 246, 250, 251, 252, 255, 260, 261,
        263, 269, 272, 273, 275, 281, 283, 284, 285, 286, 287, 288, 290, 291, 292, 293, 295, 304, 307, 309, 310, 314,
        315, 319, 323, 329, 330, 331, 336, 342, 345, 349, 350, 351, 352, 355, 357, 368, 370, 371, 374, 379, 380, 383,
        384, 397, 401, 403, 405, 407, 408, 411, 412, 413, 414, 417, 419, 421, 423, 427, 429, 430, 432, 440, 441, 442,
        443, 444, 446, 454, 457,
    ]
)  # fmt: skip
# Normals that point against each other have no mean: below this length the direction would be rounding.
_SHORTEST_NORMAL = 1e-3


class PascalContextSource:
    """The images of a split, in the order of its list.

    `source[i]` raises `PartialSample` for an image with files that cannot be used: damaged, empty, given twice, of a
    wrong format or shape; the rest is in its `sample`, which is None without an image. A label without a file is no
    problem. Lines of the list that name an image again come last, as samples of which nothing can be used.

    Attributes:
        name: identifies the content: images, files, split, tasks and size.
        facts: a line on the split.
    """

    def __init__(self, root: Path, split: Split, size: int, tasks: Sequence[TaskSpec]) -> None:
        """Find the files; none is opened yet.

        Args:
            root: folder that holds JPEGImages and ImageSets.
            split: list of images to take.
            size: side of the square samples in pixels.
            tasks: labels to take.

        Raises:
            UserError: as `find_images`; no label at all, a task of another dataset, or a size below 1.
        """
        if size < 1:
            raise UserError(f"size {size}: give the side of the samples in pixels, 1 or more")
        if foreign := [spec.name for spec in tasks if spec.name not in _TASKS]:
            raise UserError(f"task '{foreign[0]}' is not of PASCAL-Context: choose from {', '.join(_TASKS)}")
        self._size = size
        self._split = split
        self._tasks = tuple(spec.name for spec in tasks)
        entries, problems = find_images(root, split)
        self._entries = Entries(entries, problems)
        here = sum(IMAGES in entry.files for entry in entries)
        self.facts = (
            f"official split {split}: {len(entries)} images listed (published: {_PUBLISHED[split]}), "
            f"{here} of them in the source folder",
        )
        if not any(name in entry.files for entry in entries for name in self._tasks):
            places = ", ".join(map(place_of, self._tasks))
            raise UserError(f"{root} has no label for split '{split}': looked for {places}")
        content = (split, size, self._tasks, [(entry.name, sorted(entry.files)) for entry in entries])
        digest = hashlib.sha256(repr(content).encode()).hexdigest()[:16]
        self.name = f"pascal-context-{split}-{size}px-{len(tasks)}tasks-{digest}"

    def __len__(self) -> int:
        return len(self._entries)

    def part(self, samples: range) -> "PascalContextSource":
        """Return the source of some samples alone; its name is that of the whole."""
        part = copy(self)
        part._entries = self._entries.part(samples)
        return part

    def __getitem__(self, index: int) -> Sample:
        entry = self._entries[index]
        rgb = _read_image(entry)
        problems = [
            Problem(entry.key, kind, f"given twice; used is {entry.files[kind].where}", extra.where)
            for kind, extra in entry.repeated
            if kind in (*self._tasks, IMAGES)
        ]
        height, width = rgb.shape[:2]
        sample = Sample(
            key=entry.key,
            rgb=square_mean(rgb, self._size, fit="stretch"),
            labels=self._labels(entry, (height, width), problems),
            meta={"image": entry.name, "split": self._split, "height": height, "width": width},
        )
        if problems:
            raise PartialSample(problems, sample)
        return sample

    def _labels(self, entry: Entry, shape: tuple[int, int], problems: list[Problem]) -> dict[str, AnyArray]:
        labels = {}
        for name in self._tasks:
            if name not in entry.files:
                continue
            try:
                labels[name] = _LABELS[name](entry, shape, self._size)
            except UserError as error:
                problems.append(Problem(entry.key, name, str(error), entry.files[name].where))
        return known_labels(labels, TASKS, mask_valid=None)


def _read_image(entry: Entry) -> NDArray[np.uint8]:
    if IMAGES not in entry.files:
        raise PartialSample([Problem(entry.key, "", f"there is no image of it in {place_of(IMAGES)}")], None)
    file = entry.files[IMAGES]
    try:
        return decode_image(file.suffix, file.read(), "the file")
    except UserError as error:
        raise PartialSample([Problem(entry.key, "", str(error), file.where)], None) from None


def _semseg(entry: Entry, shape: tuple[int, int], size: int) -> AnyArray:
    """(n, n) uint8: VOC classes, 255 void."""
    ids = read_codes(entry.files["semseg"])
    check_shape(ids, shape)
    known = [*range(TASKS["semseg"].channels), _VOID]
    if foreign := sorted(set(np.unique(ids).tolist()).difference(known)):
        raise UserError(f"the file holds {foreign[0]}, which is no class of VOC (0 to {known[-2]}, {_VOID} for void)")
    return _nearest(ids, size)


def _human_parts(entry: Entry, shape: tuple[int, int], size: int) -> AnyArray:
    """(n, n) uint8: parts of people, 0 elsewhere; all void without any part."""
    parts = _nearest(read_parts(entry.files["human_parts"], shape), size)
    return parts if parts.any() else np.full_like(parts, _VOID)


def _saliency(entry: Entry, shape: tuple[int, int], size: int) -> AnyArray:
    """(n, n) uint8: as stored; the task's row says from where on it is salient."""
    codes = read_codes(entry.files["saliency"])
    check_shape(codes, shape)
    return _nearest(codes, size)


def _normals(entry: Entry, shape: tuple[int, int], size: int) -> AnyArray:
    """(n, n, 3) uint8: the direction of the mean normal over the trusted pixels, void at the others."""
    file = entry.files["normals"]
    codes = decode_label(TASKS["normals"], file.suffix, file.read(), "the file")
    check_shape(codes[:, :, 0], shape)
    if LABEL_MAP not in entry.files:
        raise UserError(f"where the normals hold is not known without its file in {place_of(LABEL_MAP)}")
    try:
        classes = read_label_map(entry.files[LABEL_MAP])
        check_shape(classes, shape)
    except UserError as error:
        raise UserError(f"where the normals hold is not known: {entry.files[LABEL_MAP].where}: {error}") from None
    trusted = np.isin(classes, _CLASSES_WITH_NORMALS) & (codes != _VOID).any(axis=2)
    vectors = (codes.astype(np.float32) / 127.5 - 1.0) * trusted[:, :, None]
    # Weighing by `trusted` scales the mean, whose length goes anyway.
    planes = [Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(vectors, 2, 0)]
    mean = np.stack([np.asarray(plane.resize((size, size), Image.Resampling.BILINEAR)) for plane in planes], axis=2)
    length = np.linalg.norm(mean, axis=2, keepdims=True)
    known = _nearest(trusted, size)[:, :, None] & (length > _SHORTEST_NORMAL)
    encoded = np.rint((mean / length.clip(min=_SHORTEST_NORMAL) + 1.0) * 127.5)
    return np.where(known, encoded, _VOID).astype(np.uint8)


def _edges(entry: Entry, shape: tuple[int, int], size: int) -> AnyArray:
    """(n, n) uint8: 255 where the class changes.

    The benchmark draws them at the image's size. Lines one pixel wide would not survive nearest resampling, so they are
    drawn on the resampled classes.
    """
    classes = read_label_map(entry.files["edges"])
    check_shape(classes, shape)
    return boundaries(_nearest(classes, size)).astype(np.uint8) * np.uint8(255)


_LABELS: Mapping[str, Callable[[Entry, tuple[int, int], int], AnyArray]] = {
    "semseg": _semseg,
    "human_parts": _human_parts,
    "saliency": _saliency,
    "normals": _normals,
    "edges": _edges,
}


def _nearest(array: AnyArray, size: int) -> AnyArray:
    return square_nearest(array, size, "stretch")
