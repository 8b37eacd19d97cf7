"""Taskonomy and omnidata folders, in any of their published layouts, as samples.

Three layouts exist, and may be mixed under one root: `<domain>/<component>/<building>/`, `<domain>/<building>/`, and
tars `<building>_<domain>.tar` (read in place, or extracted into a folder of that name). Files are called
`point_<P>_view_<V>_domain_<D>`; D is not always the domain (scene classes say class_places, masks depth_zbuffer), so
the folder or tar decides, and the files of all domains are joined on (building, point, view). A view may lack any
label.

Stored values stay in the official encodings (`configs.tasks`). Views become square: the largest centred square,
resampled to one size.
"""

import hashlib
from collections.abc import Sequence
from copy import copy
from pathlib import Path, PurePath
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from configs.tasks import GROUPS, TASKS, TaskSpec
from data_pipeline.codecs import decode_image, decode_label, decode_member
from data_pipeline.sample import AnyArray, Sample, known_labels
from data_pipeline.source import PartialSample, Problem
from data_pipeline.sources.entries import Entries
from data_pipeline.sources.raw_file import RawFile
from data_pipeline.sources.squares import check_aspect, square_mean, square_nearest
from data_pipeline.sources.taskonomy_classes import SELECTED, select_classes
from data_pipeline.sources.taskonomy_files import find_views
from data_pipeline.sources.taskonomy_splits import Split
from data_pipeline.sources.taskonomy_views import View

_TASKS = GROUPS["taskonomy"]
_DEPTHS = ("depth_zbuffer", "depth_euclidean")


class TaskonomySource:
    """The views under a folder, in the order of building, point and view.

    `source[i]` raises `PartialSample` for a view with files that cannot be used: damaged, empty, given twice, or of a
    wrong bit depth or shape; the rest is in its `sample`, which is None for a view without an image. Files that belong
    to no view come last, and then the split's buildings that are not there, as samples of which nothing can be used.

    `mask_valid` is the domain of that name where a view has it, else the pixels to which a depth label gives a depth
    (code 65535 means none), else there is no mask.

    Attributes:
        name: identifies the content: views, domains, tasks, size and split.
        facts: lines on what of the dataset is taken: the split, the classes; none where it is all.
    """

    def __init__(
        self,
        root: Path,
        size: int,
        tasks: Sequence[TaskSpec],
        split: Split | None = None,
        classes: Literal["all", "selected"] = "all",
    ) -> None:
        """Find the views; no image is opened yet.

        Args:
            root: folder that holds the domains' folders or tars.
            size: side of the square samples in pixels.
            tasks: labels to take.
            split: take the buildings of its part only; None: all that are there.
            classes: whether labels of classes keep those that Taskonomy selects only (`taskonomy_classes`).

        Raises:
            UserError: no such folder, nothing of a known layout in it, no building of the split, no image, a damaged
                tar, a task of another dataset, or a size below 1.
        """
        if size < 1:
            raise UserError(f"size {size}: give the side of the samples in pixels, 1 or more")
        if foreign := [spec.name for spec in tasks if spec.name not in _TASKS]:
            raise UserError(f"task '{foreign[0]}' is not of Taskonomy: choose from {', '.join(_TASKS)}")
        self._size = size
        self._tasks = {spec.name: spec for spec in tasks}
        found = find_views(root, ("rgb", "mask_valid", *_TASKS), None if split is None else frozenset(split.buildings))
        missing = () if split is None else split.missing(found.buildings)
        self._entries = Entries(found.views, [*map(_stray, found.strays), *map(_missing, missing)])
        self._selected = [name for name in SELECTED if name in self._tasks and classes == "selected"]
        self.facts = () if split is None else split.facts(found.buildings)
        self.facts += tuple(
            f"{name}: {len(SELECTED[name])} of {self._tasks[name].channels} classes" for name in self._selected
        )
        digest = hashlib.sha256(repr((size, list(self._tasks), missing, self._selected)).encode())
        for number in range(len(found.views)):
            digest.update(repr(found.views.summary(number)).encode())
        part = "" if split is None else f"{split.name}-{split.part}-"
        self.name = f"taskonomy-{part}{size}px-{len(tasks)}tasks-{digest.hexdigest()[:16]}"

    def __len__(self) -> int:
        return len(self._entries)

    def part(self, samples: range) -> "TaskonomySource":
        """Return the source of some samples alone; its name is that of the whole."""
        part = copy(self)
        part._entries = self._entries.part(samples)
        return part

    def __getitem__(self, index: int) -> Sample:
        view = self._entries[index]
        problems: list[Problem] = []
        reason = f"the view has no rgb image, but {', '.join(sorted(view.files))}"
        rgb = None
        if "rgb" in view.files:
            try:
                rgb = _read_image(view.files["rgb"])
            except UserError as error:
                reason = str(error)
        if rgb is None:
            path = view.files["rgb"].where if "rgb" in view.files else ""
            raise PartialSample([Problem(view.key, "", reason, path)], None)
        mask = _read_mask(view, rgb, problems)
        mask_valid = None if mask is None else square_nearest(mask, self._size).astype(np.uint8) * np.uint8(255)
        sample = Sample(
            key=view.key,
            rgb=square_mean(rgb, self._size),
            labels=known_labels(self._labels(view, rgb, mask, problems), self._tasks, mask_valid),
            mask_valid=mask_valid,
            meta={"building": view.building, "point": view.point, "view": view.view},
        )
        problems += [
            Problem(view.key, domain, f"given twice; used is {view.files[domain].where}", extra.where)
            for domain, extra in view.repeated
            if domain in (*self._tasks, "rgb", "mask_valid")
        ]
        if problems:
            raise PartialSample(problems, sample)
        return sample

    def _labels(
        self, view: View, rgb: NDArray[np.uint8], mask: NDArray[np.bool_] | None, problems: list[Problem]
    ) -> dict[str, AnyArray]:
        labels = {}
        for name, spec in self._tasks.items():
            if name in view.files:
                try:
                    labels[name] = self._label(spec, view.files[name], rgb, mask)
                except UserError as error:
                    problems.append(Problem(view.key, name, str(error), view.files[name].where))
        return labels

    def _label(self, spec: TaskSpec, file: RawFile, rgb: NDArray[np.uint8], mask: NDArray[np.bool_] | None) -> AnyArray:
        if not spec.dense:
            vector = _read_vector(spec, file)
            return select_classes(spec, vector) if spec.name in self._selected else vector
        label = decode_label(spec, file.suffix, file.read(), "the file")
        check_aspect(label, rgb)
        if spec.interpolation == "bilinear":
            return square_mean(label, self._size, mask if spec.uses_mask_valid else None)
        return square_nearest(label, self._size)


def _stray(file: RawFile) -> Problem:
    reason = "belongs to no view, as it is not named point_P_view_V_domain_D"
    return Problem(PurePath(file.where).name, "", reason, file.where)


def _missing(building: str) -> Problem:
    return Problem(building, "", "the split lists this building, but the source folder has no file of it")


def _read_image(file: RawFile) -> NDArray[np.uint8]:
    return decode_image(file.suffix, file.read(), "the file")


def _read_mask(view: View, rgb: NDArray[np.uint8], problems: list[Problem]) -> NDArray[np.bool_] | None:
    """(H, W) bool at the resolution of the file that says it; None if no file does.

    A depth that cannot be used is no problem here: it is one where it is a label.
    """
    if "mask_valid" in view.files:
        file = view.files["mask_valid"]
        try:
            mask = decode_member(file.suffix, file.read(), "the file")
            if mask.ndim != 2 or mask.dtype != np.uint8:
                raise UserError(f"the mask is {mask.dtype} of shape {mask.shape}, but must be 8-bit grey")
            check_aspect(mask, rgb)
            return mask > 0
        except UserError as error:
            problems.append(Problem(view.key, "mask_valid", str(error), file.where))
    known = None
    for name in _DEPTHS:
        if name in view.files:
            spec = TASKS[name]
            try:
                depth = decode_label(spec, view.files[name].suffix, view.files[name].read(), "the file")
                check_aspect(depth, rgb)
            except UserError:
                continue
            known = np.asarray(depth != spec.encoding.invalid)
            if known.any():  # Else the other depth may know more.
                break
    return known


def _read_vector(spec: TaskSpec, file: RawFile) -> NDArray[np.float32]:
    """(C,) float32; files hold (C,) or (1, C) of any float type."""
    vector = decode_member(file.suffix, file.read(), "the file")
    if vector.dtype.kind != "f" or vector.size != spec.encoding.channels:
        raise UserError(
            f"the file holds {vector.dtype} of shape {vector.shape}, but {spec.name} is {spec.encoding.channels} floats"
        )
    if not np.isfinite(vector).all():
        raise UserError("the file holds values that are not finite")
    if spec.target == "class_probabilities" and not (vector.min() >= 0.0 and vector.sum() > 0.0):
        raise UserError("the file holds no probabilities: some are negative, or all are 0")
    return vector.reshape(-1).astype(np.float32)
