"""Variables of MATLAB files by `scipy.io.loadmat`, behind a check of everything that it trusts.

loadmat runs no code of a file, but takes types and counts from it unchecked: a single wrong byte can end the process.
So the elements are walked first. Format: "MAT-File Format", The MathWorks, level 5 (files of MATLAB 5 to 7).
"""

import io
import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.io import loadmat

from configs.errors import UserError

_MOST_BYTES = 2**28
_HEADER_BYTES = 128
# Version and byte order, as bytes 124 to 127 have them.
_BYTE_ORDERS = {b"\0\1IM": "<", b"\1\0MI": ">"}

_INT8, _INT32, _UINT32, _MATRIX, _COMPRESSED = 1, 5, 6, 14, 15
_NUMBERS = frozenset({1, 2, 3, 4, 5, 6, 7, 9, 12, 13})
_CHARACTERS = frozenset({1, 2, 3, 4, 16, 17, 18})

_CELL, _STRUCT, _CHAR, _FIRST_NUMERIC, _LAST_NUMERIC = 1, 2, 4, 6, 15
_COMPLEX = 0x800


def load_variable(data: bytes, name: str) -> NDArray[Any]:
    """Return a variable as loadmat gives it: structs as arrays with one field per member, all at least two-dimensional.

    Args:
        data: content of a file, at most 256 MiB when inflated.
        name: of the variable; numbers, characters, cells and structs are read, nothing else.

    Raises:
        UserError: a damaged file, one of another version or with other classes, or no such variable.
    """
    try:
        stream: Any = io.BytesIO(_checked(data))  # The type stubs know paths alone.
        contents = loadmat(stream, variable_names=[name])
    except UserError:
        raise
    except Exception as error:  # Fed with damaged bytes, loadmat raises anything.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"the file is damaged ({reason}): restore it") from None
    if not isinstance(contents.get(name), np.ndarray):
        raise UserError(f"the file holds no '{name}'")
    return np.asarray(contents[name])


@dataclass(frozen=True, slots=True)
class _Element:
    """One tagged piece of a file.

    Attributes:
        kind: data type in its tag.
        tag, start, end: where its tag begins, and its content begins and ends.
        after: where the next tag begins.
    """

    kind: int
    tag: int
    start: int
    end: int
    after: int

    @property
    def size(self) -> int:
        """Bytes of the content."""
        return self.end - self.start


def _checked(data: bytes) -> bytes:
    """Return the file with its variables inflated, by which zlib verifies their checksums, and their elements checked.

    Raises:
        UserError: another version.
        ValueError: a damaged file, or one with classes that are not read.
    """
    order = _BYTE_ORDERS.get(data[124:_HEADER_BYTES])
    if order is None:
        raise UserError("the file is not one of MATLAB 5 to 7: save it with -v7")
    plain = [data[:_HEADER_BYTES]]
    room = _MOST_BYTES
    for element in _elements(data, _HEADER_BYTES, len(data), order):
        variable = data[element.tag : element.after]
        if element.kind == _COMPRESSED:
            inflater = zlib.decompressobj()
            variable = inflater.decompress(data[element.start : element.end], room)
            if not inflater.eof:
                raise ValueError(f"a variable is cut off, or the file is above {_MOST_BYTES} bytes")
        room -= len(variable)
        if room <= 0:
            raise ValueError(f"the file is above {_MOST_BYTES} bytes")
        for inner in _elements(variable, 0, len(variable), order):
            _check_array(variable, inner, order)
        plain.append(variable)
    return b"".join(plain)


def _elements(data: bytes, start: int, end: int, order: str) -> Iterator[_Element]:
    while start < end:
        if end - start < 8:
            raise ValueError("an element is cut off")
        kind, size = struct.unpack_from(f"{order}II", data, start)
        if small := kind >> 16:  # At most four bytes, which share the tag's eight.
            element = _Element(kind & 0xFFFF, start, start + 4, start + 4 + small, start + 8)
        else:
            padding = 0 if kind == _COMPRESSED else -size % 8
            element = _Element(kind, start, start + 8, start + 8 + size, start + 8 + size + padding)
        if element.end > min(end, element.after):
            raise ValueError("an element is longer than its place")
        yield element
        start = element.after


def _check_array(data: bytes, array: _Element, order: str) -> None:
    """Raise `ValueError` unless an array's elements are of the types and numbers that its class and shape ask for."""
    if array.kind != _MATRIX:
        raise ValueError(f"an array is of type {array.kind}")
    if not array.size:  # An empty field.
        return
    parts = list(_elements(data, array.start, array.end, order))
    if [part.kind for part in parts[:3]] != [_UINT32, _INT32, _INT8] or parts[0].size != 8 or parts[1].size % 4:
        raise ValueError("an array has no proper flags, shape and name")
    flags, _ = _integers(data, parts[0], order)
    shape = _integers(data, parts[1], order)
    if len(shape) < 2 or min(shape) < 0:
        raise ValueError(f"an array has shape {shape}")
    cls, content = flags & 0xFF, parts[3:]
    if cls == _CELL:
        _check_arrays(data, content, math.prod(shape), order)
    elif cls == _STRUCT:
        _check_arrays(data, content[2:], math.prod(shape) * _count_fields(data, content[:2], order), order)
    elif cls == _CHAR:
        _check_values(content, _CHARACTERS, 1)
    elif _FIRST_NUMERIC <= cls <= _LAST_NUMERIC:
        _check_values(content, _NUMBERS, 2 if flags & _COMPLEX else 1)
    else:
        raise ValueError(f"an array is of class {cls}, none of numbers, characters, cells and structs")


def _check_arrays(data: bytes, arrays: list[_Element], count: int, order: str) -> None:
    if len(arrays) != count:
        raise ValueError(f"a cell or struct array has {len(arrays)} values instead of {count}")
    for array in arrays:
        _check_array(data, array, order)


def _check_values(parts: list[_Element], kinds: frozenset[int], count: int) -> None:
    if len(parts) != count or any(part.kind not in kinds for part in parts):
        raise ValueError("an array has values of an unknown type")


def _count_fields(data: bytes, parts: list[_Element], order: str) -> int:
    """Return the number of a struct's fields, from the length of a name and the names in places of that length."""
    if [part.kind for part in parts] != [_INT32, _INT8] or parts[0].size != 4:
        raise ValueError("a struct has no proper field names")
    (length,) = _integers(data, parts[0], order)
    if length <= 0 or parts[1].size % length:
        raise ValueError("a struct has no proper field names")
    return parts[1].size // length


def _integers(data: bytes, element: _Element, order: str) -> tuple[int, ...]:
    """Content as signed integers of four bytes."""
    return struct.unpack_from(f"{order}{element.size // 4}i", data, element.start)
