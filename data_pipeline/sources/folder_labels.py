"""How labels of a folder or table become the stored encodings of their tasks: one typed description per kind.

A description is a part of the YAML file (`sources.folder_spec`); `convert` maps what a file holds, at the file's size.
What cannot be meant is refused rather than guessed: ids that no map names, vectors of another length.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from configs.errors import UserError
from configs.section import Section
from configs.tasks import TaskSpec
from data_pipeline.rooms.regions import boundaries
from data_pipeline.sample import AnyArray
from data_pipeline.sources.class_map import (
    VOID,
    Key,
    check_numbers,
    check_once,
    has_colours,
    mapped,
    numbers_of,
    whole_numbers,
)

Axis = Literal["x", "y", "z", "-x", "-y", "-z"]
_FARTHEST_CODE = 65534
# Lengths between which a decoded vector is taken for a normal; a corner of the colour cube is 1.73 long, its centre 0.
_LENGTHS = (0.5, 1.5)
# The median of a file of normals; of floats in [0, 1], a common mistake, it is 1.2 and more.
_TYPICAL_LENGTHS = (0.9, 1.1)


@dataclass(frozen=True)
class Converted:
    """A label at its file's size.

    Attributes:
        codes: in the task's stored encoding.
        known: (H, W), where the file tells the geometry; None for labels that say nothing of it.
    """

    codes: AnyArray
    known: NDArray[np.bool_] | None = None


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


class FileLabel(Section, ABC):
    """A label that lies in a file of its own."""

    path: str
    """Pattern of the files, below the root."""
    key: str | None = None
    """Name of the array inside an npz or mat file."""

    def check_task(self, spec: TaskSpec) -> None:
        """Check the description against its task.

        Raises:
            ValueError: it does not fit the task's row.
        """

    @abstractmethod
    def convert(self, spec: TaskSpec, array: AnyArray) -> Converted:
        """Return the label in the encoding of `spec`.

        Raises:
            UserError: the file holds something else.
        """

    def finish(self, codes: AnyArray) -> AnyArray:
        """Return the label at the packed size, from the resampled `codes`."""
        return codes


class DepthLabel(FileLabel):
    """metres = unit_metres * (value + offset), or unit_metres / (value + offset) if inverse.

    Unknown are values that are not finite or in `invalid`, and depths that are not positive or beyond the farthest that
    the encoding holds, 128 m unless the task says otherwise.
    """

    unit_metres: float = Field(1.0, gt=0)
    """Metres of one stored unit; for disparities focal length in pixels times baseline in metres."""
    offset: float = 0.0
    """Added to the stored value first."""
    inverse: bool = False
    """Stored are inverse depths or disparities."""
    invalid: tuple[float, ...] = ()
    """Stored values that mean unknown."""

    _as_list = field_validator("invalid", mode="before")(_as_list)

    def convert(self, spec: TaskSpec, array: AnyArray) -> Converted:
        """Return codes of 1/512 m, or of what the task counts in."""
        values = _plane(array).astype(np.float64)
        known = np.isfinite(values) & ~np.isin(values, self.invalid)
        shifted = np.where(known, values, 0.0) + self.offset
        with np.errstate(divide="ignore", over="ignore"):
            metres = self.unit_metres / shifted if self.inverse else self.unit_metres * shifted
            codes = np.rint(metres * spec.codes_per_metre)
        known &= (metres > 0.0) & (codes <= _FARTHEST_CODE)
        unknown = class_code(spec, VOID)
        return Converted(np.where(known, codes, unknown).astype(np.uint16), known)


class NormalLabel(FileLabel):
    """Vectors as floats in [-1, 1], or as 8-bit colours 2 v / 255 - 1.

    Unknown are vectors whose length is not near 1: black, white and mid grey as colours, zeros and NaN as floats.
    """

    axes: tuple[Axis, Axis, Axis] = ("x", "y", "z")
    """Which axis of the file, and with which sign, each stored axis is."""

    @field_validator("axes")
    @classmethod
    def _each_once(cls, value: tuple[Axis, ...]) -> tuple[Axis, ...]:
        if {axis[-1] for axis in value} != {"x", "y", "z"}:
            raise ValueError("name each of x, y and z once, with '-' to turn it round")
        return value

    def convert(self, spec: TaskSpec, array: AnyArray) -> Converted:
        """Return codes of vectors of length 1."""
        if array.ndim == 3 and array.shape[0] == 3 and array.shape[2] != 3:
            array = np.moveaxis(array, 0, 2)
        if array.ndim != 3 or array.shape[2] != 3 or not (array.dtype == np.uint8 or array.dtype.kind == "f"):
            raise UserError(
                f"the file holds {array.dtype} of shape {array.shape}, but normals are 8-bit RGB or floats (H, W, 3)"
            )
        vectors = array.astype(np.float32) / np.float32(127.5) - 1 if array.dtype == np.uint8 else array
        vectors = np.where(np.isfinite(vectors), vectors, 0.0).astype(np.float32)
        length = np.linalg.norm(vectors, axis=2)
        known = (length > _LENGTHS[0]) & (length < _LENGTHS[1])
        # Grey and zeros are what files say where they know nothing.
        told = np.isfinite(array).all(axis=2) & (array != array[:, :, :1]).any(axis=2)
        if told.any() and not _TYPICAL_LENGTHS[0] < (typical := float(np.median(length[told]))) < _TYPICAL_LENGTHS[1]:
            raise UserError(
                f"the vectors are {typical:.3g} long, not 1: floats must lie in [-1, 1], 8-bit is 2 v / 255 - 1"
            )
        signs = np.array([-1.0 if axis.startswith("-") else 1.0 for axis in self.axes], np.float32)
        turned = vectors[:, :, ["xyz".index(axis[-1]) for axis in self.axes]] * signs
        codes = np.rint((turned / length.clip(min=_LENGTHS[0])[:, :, None] + 1.0) * 127.5)
        unknown = 127 if spec.encoding.invalid is None else spec.encoding.invalid
        return Converted(np.where(known[:, :, None], codes, unknown).astype(np.uint8), known)


class ClassesLabel(FileLabel):
    """Class ids, palette indices or colours of every pixel."""

    map: dict[Key, Key] | None = None
    """Id, range of ids or colour -> class of the task, by number or name, or `void`; without it ids are kept."""
    void: tuple[Key, ...] = ()
    """Ids, ranges and colours that mean unknown."""
    others: Key | None = None
    """Class, or `void`, of everything that `map` and `void` do not name; without it that is an error."""

    @model_validator(mode="after")
    def _check(self) -> "ClassesLabel":
        check_numbers([*(self.map or ()), *self.void])
        check_once(list(self.map or ()))
        if self.map is None and self.others is not None:
            raise ValueError("`others` says what `map` leaves out: give a `map` too")
        return self

    def check_task(self, spec: TaskSpec) -> None:
        """Check the classes that ids become."""
        for target in (*(self.map or {}).values(), *(() if self.others is None else (self.others,))):
            class_code(spec, target)

    def convert(self, spec: TaskSpec, array: AnyArray) -> Converted:
        """Return codes of the task's classes."""
        coloured = has_colours([*(self.map or ()), *self.void])
        void = class_code(spec, VOID)
        if self.map is None:
            table = {code: code for code in (*range(spec.channels), void)}
        else:
            table = {
                number: class_code(spec, target)
                for source, target in self.map.items()
                for number in numbers_of([source])
            }
        table |= dict.fromkeys(numbers_of(self.void), void)
        others = None if self.others is None else class_code(spec, self.others)
        return Converted(mapped(whole_numbers(array, coloured), table, others, coloured))


class BinaryLabel(FileLabel):
    """Yes or no for every pixel: above a threshold, one of some ids or colours, or on a border between ids."""

    threshold: float | None = None
    """Yes is above this value. Without any rule it is 0, so that masks of 0 and 1, or 0 and 255, need none."""
    positive: tuple[Key, ...] = ()
    """Ids, ranges and colours that are yes."""
    boundaries: bool = False
    """Yes is where neighbouring ids differ, drawn at the packed size, as lines do not survive resampling."""

    @model_validator(mode="after")
    def _check(self) -> "BinaryLabel":
        check_numbers(self.positive)
        if (self.threshold is not None) + bool(self.positive) + self.boundaries > 1:
            raise ValueError("give one of `threshold`, `positive` and `boundaries`")
        return self

    def convert(self, spec: TaskSpec, array: AnyArray) -> Converted:
        """Return 255 for yes; for boundaries, numbers of the regions."""
        if self.boundaries:
            coloured = array.ndim == 3 and array.shape[2] == 3
            return Converted(_numbered(whole_numbers(array, coloured)))
        return Converted(self.yes(array).astype(np.uint8) * np.uint8(255))

    def yes(self, array: AnyArray) -> NDArray[np.bool_]:
        """(H, W): where a threshold or ids say yes."""
        if self.positive:
            ids = whole_numbers(array, has_colours(self.positive))
            return np.isin(ids, numbers_of(self.positive))
        return np.asarray(_plane(array) > (self.threshold or 0.0))

    def finish(self, codes: AnyArray) -> AnyArray:
        """Draw borders."""
        return boundaries(codes).astype(np.uint8) * np.uint8(255) if self.boundaries else codes


class RegionsLabel(FileLabel):
    """Regions by ids or colours, of which only the borders count; at most 256 of them."""

    def convert(self, spec: TaskSpec, array: AnyArray) -> Converted:
        """Return the regions' numbers, in the order of their ids."""
        numbers = _numbered(whole_numbers(array, array.ndim == 3 and array.shape[2] == 3))
        if (count := int(numbers.max()) + 1) > 256:
            raise UserError(f"the file holds {count} regions, but the encoding at most 256: merge small ones")
        return Converted(numbers.astype(np.uint8))


class CodesLabel(FileLabel):
    """Values that are the stored codes, or a multiple of them."""

    times: Annotated[float, Field(gt=0)] = 1.0
    """Codes per stored unit."""
    invalid: tuple[float, ...] = ()
    """Stored values that mean unknown, as NaN does; only for tasks with a code for that."""

    _as_list = field_validator("invalid", mode="before")(_as_list)

    def check_task(self, spec: TaskSpec) -> None:
        """Check that unknown values have a code."""
        if self.invalid and spec.encoding.invalid is None:
            raise ValueError(
                f"invalid: task '{spec.name}' has no code for unknown: define a task like it with `invalid`"
            )

    def convert(self, spec: TaskSpec, array: AnyArray) -> Converted:
        """Return codes, at most the largest that there is."""
        encoding = spec.encoding
        if encoding.channels > 1 and spec.channels == 1 and array.ndim == 2:
            array = np.repeat(array[:, :, None], encoding.channels, axis=2)
        expected = (encoding.channels,) if encoding.channels > 1 else ()
        if array.shape[2:] != expected or array.ndim != 2 + len(expected) or array.dtype.kind not in "buif":
            shape = ", ".join(map(str, ("H", "W", *expected)))
            raise UserError(f"the file holds {array.dtype} of shape {array.shape}, but must hold numbers ({shape})")
        codes, most = array.astype(np.float64) * self.times, np.iinfo(encoding.dtype).max
        unknown = np.isnan(codes) | np.isin(array, self.invalid)
        if encoding.invalid is not None:
            most -= encoding.invalid == most
            codes = np.where(unknown, 0.0, codes)
        if not np.isfinite(codes).all() or codes.min() < 0:
            raise UserError("the file holds values that are negative or not finite, which have no code")
        codes = np.rint(codes).clip(max=most)
        return Converted(np.where(unknown, encoding.invalid or 0, codes).astype(encoding.dtype))


def class_code(spec: TaskSpec, target: Key) -> int:
    """Return the code of a class of a task, given by number or name, or as `void`.

    Raises:
        ValueError: the task has no such class, or no void.
    """
    if target == VOID:
        if spec.encoding.invalid is None:
            raise ValueError(f"task '{spec.name}' has no void")
        return spec.encoding.invalid
    if isinstance(target, str) and target in spec.class_names:
        return spec.class_names.index(target)
    if isinstance(target, bool) or not isinstance(target, int) or not 0 <= target < spec.channels:
        known = f" or one of {', '.join(spec.class_names)}" if spec.class_names else ""
        raise ValueError(f"{target!r} is no class of '{spec.name}': give 0 to {spec.channels - 1}{known}, or {VOID}")
    return target


def _plane(array: AnyArray) -> AnyArray:
    """(H, W) numbers of an array; equal channels are one."""
    if array.ndim == 3 and array.shape[2] in (1, 3) and (array == array[:, :, :1]).all():
        array = array[:, :, 0]
    if array.ndim != 2 or array.dtype.kind not in "biuf":
        raise UserError(f"the file holds {array.dtype} of shape {array.shape}, but must hold numbers of shape (H, W)")
    return array


def _numbered(ids: NDArray[np.int64]) -> NDArray[np.int32]:
    return np.unique(ids, return_inverse=True)[1].reshape(ids.shape).astype(np.int32)
