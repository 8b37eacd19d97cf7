"""From the ids, colours or names of one dataset's classes to those of the task table."""

import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import StrictInt, StrictStr

from configs.errors import UserError
from data_pipeline.sample import AnyArray

VOID = "void"
"""Stands for the code that marks a pixel as unknown."""

Key = StrictInt | StrictStr
_RANGE = re.compile(r"(\d+)-(\d+)")
_COLOUR = re.compile(r"#([0-9a-fA-F]{6})")
_WIDEST_RANGE = 65536


def check_ranges(keys: Sequence[Key]) -> None:
    """Check the ranges among keys of a class map.

    Raises:
        ValueError: one that goes down or is absurdly wide.
    """
    for key in keys:
        if isinstance(key, str) and (match := _RANGE.fullmatch(key)):
            low, high = int(match[1]), int(match[2])
            if not low <= high < low + _WIDEST_RANGE:
                raise ValueError(f"range '{key}' must go up, by less than {_WIDEST_RANGE}")


def check_numbers(keys: Sequence[Key]) -> None:
    """Check keys that pixels can have.

    Raises:
        ValueError: a name, or as `check_ranges`.
    """
    check_ranges(keys)
    if names := [key for key in keys if not numbers_of([key])]:
        raise ValueError(f"'{names[0]}' is a name, but pixels hold numbers, ranges '1-5' of them or colours '#ff8000'")


def check_once(keys: Sequence[Key]) -> None:
    """Check that no number stands in two keys of a class map, whose ranges `check_ranges` has seen.

    Raises:
        ValueError: one does.
    """
    owner: dict[int, Key] = {}
    for key in keys:
        for number in numbers_of([key]):
            if (other := owner.setdefault(number, key)) != key:
                raise ValueError(f"{other!r} and {key!r} both name {number}: give it one class")


def numbers_of(keys: Sequence[Key]) -> list[int]:
    """Return the ids that keys stand for: numbers, ranges of them, and colours as 65536 r + 256 g + b; names: none."""
    numbers: list[int] = []
    for key in keys:
        if isinstance(key, int) or key.isdecimal():
            numbers.append(int(key))
        elif match := _RANGE.fullmatch(key):
            numbers.extend(range(int(match[1]), int(match[2]) + 1))
        elif match := _COLOUR.fullmatch(key):
            numbers.append(int(match[1], 16))
    return numbers


def has_colours(keys: Sequence[Key]) -> bool:
    """Whether any key is a colour."""
    return any(isinstance(key, str) and _COLOUR.fullmatch(key) for key in keys)


def whole_numbers(array: AnyArray, coloured: bool) -> NDArray[np.int64]:
    """Return (H, W) ids of a stored array: its whole numbers, or its colours as 65536 r + 256 g + b.

    Args:
        array: (H, W) of any type, or (H, W, 3) uint8; three equal channels without `coloured` are one.
        coloured: whether classes are told by colours.

    Raises:
        UserError: another shape, or values that are no whole numbers.
    """
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim == 3 and array.shape[2] == 3 and array.dtype == np.uint8:
        if coloured:
            wide = array.astype(np.int64)
            return wide[:, :, 0] * 65536 + wide[:, :, 1] * 256 + wide[:, :, 2]
        if not (array == array[:, :, :1]).all():
            raise UserError("the file holds colours: say which class each one is, with keys such as '#ff8000' in `map`")
        array = array[:, :, 0]
    elif coloured:
        raise UserError(f"classes are told by colours, but the file holds {array.dtype} of shape {array.shape}")
    if array.ndim != 2 or array.dtype.kind not in "biuf":
        raise UserError(f"the file holds {array.dtype} of shape {array.shape}, but must hold numbers of shape (H, W)")
    if array.dtype.kind == "f" and not (np.isfinite(array).all() and (array == np.rint(array)).all()):
        raise UserError("the file holds values that are no whole numbers, so no classes")
    return array.astype(np.int64)


def mapped(ids: NDArray[np.int64], table: Mapping[int, int], others: int | None, coloured: bool) -> NDArray[np.uint8]:
    """Return the codes of ids.

    Args:
        ids: of any shape.
        table: id -> code.
        others: code of every other id.
        coloured: whether ids are colours, for the message.

    Raises:
        UserError: an id that is not in the table, without `others`.
    """
    values, places = np.unique(ids, return_inverse=True)
    codes = [table.get(value, others) for value in values.tolist()]
    if None in codes:
        foreign = values[codes.index(None)]
        shown = f"#{foreign:06x}" if coloured else str(foreign)
        raise UserError(f"the file holds {shown}, which is in neither `map` nor `void`: add it, or give `others`")
    return np.array(codes, np.uint8)[places].reshape(ids.shape)
