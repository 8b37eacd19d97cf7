"""One block of memory for all pixels of a batch, so that a worker hands the trainer one piece of shared memory.

Every tensor that travels by itself costs both processes a file descriptor, a connection and a mapping; twenty of them
cost more time than their labels take to decode. And what is decoded into shared memory need not be copied to it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.batch import Batch

# Arrays start at multiples of this many bytes, a cache line.
_ALIGNMENT = 64

Shape = tuple[int, ...]


def allocate(arrays: Mapping[str, tuple[Shape, torch.dtype]], *, shared: bool) -> dict[str, Tensor]:
    """Return tensors of the given shapes and dtypes, side by side in one block; their values are arbitrary.

    Args:
        arrays: name -> shape and dtype.
        shared: whether the block is to be shared with other processes.

    Raises:
        RuntimeError: `shared`, and there is not so much shared memory.
    """
    starts, end = {}, 0
    for name, (shape, dtype) in arrays.items():
        starts[name] = end
        size = math.prod(shape) * dtype.itemsize
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    storage = _new_storage(end, shared=shared)
    return {name: _view(storage, starts[name], shape, dtype) for name, (shape, dtype) in arrays.items()}


@dataclass(frozen=True)
class Parcel:
    """A batch on its way between processes: its block, and all else as pickle carries it without shared memory.

    Attributes:
        block: the storage of the batch's pixels.
        parts: field of the batch -> a tensor of the block as a place in it, another tensor as an array, dictionaries of
            these, or any other value.
    """

    block: torch.UntypedStorage
    parts: dict[str, Any]

    @classmethod
    def of(cls, batch: Batch) -> "Parcel":
        """Pack a batch whose pixels lie in the block of its images; other tensors should be small."""
        block = batch.images.untyped_storage()
        parts = {field.name: _packed(getattr(batch, field.name), block) for field in fields(batch)}
        return cls(block, parts)

    def unpack(self) -> Batch:
        """Return the batch; nothing is copied."""
        return Batch(**{name: _unpacked(part, self.block) for name, part in self.parts.items()})


@dataclass(frozen=True)
class _Place:
    """Where a contiguous tensor lies in a block: its first byte, shape and dtype."""

    start: int
    shape: Shape
    dtype: torch.dtype


def _new_storage(size: int, *, shared: bool) -> torch.UntypedStorage:
    # The one way to shared memory that makes no copy of memory that is not shared; torch's own collation takes it.
    make: Any = torch.UntypedStorage._new_shared if shared and size else torch.UntypedStorage
    storage: torch.UntypedStorage = make(size)
    return storage


def _view(storage: torch.UntypedStorage, start: int, shape: Shape, dtype: torch.dtype) -> Tensor:
    empty = torch.empty(0, dtype=dtype)
    return empty.set_(storage, start // dtype.itemsize, shape)  # type: ignore[call-overload, no-any-return]


def _packed(value: Any, block: torch.UntypedStorage) -> Any:
    if isinstance(value, dict):
        return {name: _packed(part, block) for name, part in value.items()}
    if not torch.is_tensor(value):
        return value
    if value.untyped_storage().data_ptr() == block.data_ptr() and value.is_contiguous():
        return _Place(int(value.storage_offset()) * value.itemsize, tuple(value.shape), value.dtype)
    return value.numpy()


def _unpacked(part: Any, block: torch.UntypedStorage) -> Any:
    if isinstance(part, dict):
        return {name: _unpacked(value, block) for name, value in part.items()}
    if isinstance(part, _Place):
        return _view(block, part.start, part.shape, part.dtype)
    if isinstance(part, np.ndarray):
        array: NDArray[Any] = part
        return torch.from_numpy(array)
    return part
