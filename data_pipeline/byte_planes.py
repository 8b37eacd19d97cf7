"""Label images as byte planes compressed by Zstandard: suffix `plz`, exact, and read several times faster than PNG.

A file is a header of 14 bytes and one Zstandard frame. The header, little-endian: the magic `MPL`, the version 1, the
bytes per value (1: uint8, 2: uint16), the channels (1: an (H, W) array), the height and the width (4 bytes each, but
the channels 1). The frame holds one plane of H x W bytes per channel and byte of a value, channels first, low byte
first, with a checksum: high bytes of neighbours are nearly equal and compress to almost nothing. There is no predictor;
differences of neighbours cost more time than the bytes they save are worth.

Nothing of a file is trusted: the sizes that header and frame declare must agree and stay below a limit before any
memory is taken.
"""

import struct
import threading
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from data_pipeline.sample import AnyArray

SUFFIX = "plz"

MOST_BYTES = 2**27
"""Largest decoded array: 8192 x 8192 pixels of 16 bits."""

_HEADER = struct.Struct("<3sBBBII")
_MAGIC = b"MPL"
_VERSION = 1
_DTYPES: dict[int, np.dtype[Any]] = {1: np.dtype("<u1"), 2: np.dtype("<u2")}
# Level 3 packs four times faster, but its files are a tenth larger and take no less time to read.
_LEVEL = 9

# A decompressor costs as much to make as a small label to decode, and two threads must not share one.
_of_thread = threading.local()


def encode_planes(array: NDArray[Any]) -> bytes:
    """Encode (H, W) or (H, W, C) uint8 or uint16, C in 2..255, none of them empty.

    Raises:
        ValueError: another dtype or shape, or more than `MOST_BYTES`.
    """
    height, width, channels = _check_array(array)
    stored = array.astype(_DTYPES[array.dtype.itemsize], copy=False).reshape(height, width, channels)
    values = np.ascontiguousarray(stored).view(np.uint8)
    planes = np.ascontiguousarray(values.transpose(2, 0, 1))
    header = _HEADER.pack(_MAGIC, _VERSION, array.dtype.itemsize, channels, height, width)
    return header + zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).compress(planes.data)


def decode_planes(data: bytes) -> AnyArray:
    """Return the array that `encode_planes` was given.

    Raises:
        ValueError: the bytes are no such file, of another version, cut off, damaged, or declare more than `MOST_BYTES`.
    """
    height, width, channels, dtype = _read_header(data)
    size = height * width * channels * dtype.itemsize
    frame = memoryview(data)[_HEADER.size :]
    try:
        declared = zstandard.get_frame_parameters(frame).content_size
        # A decompressor takes the memory that the frame declares, whatever limit it is given.
        if declared != size:
            raise ValueError(f"its frame declares {declared} bytes, its header {size}")
        planes = _decompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from None
    return _join(np.frombuffer(planes, np.uint8).reshape(-1, height, width), channels, dtype)


def _check_array(array: AnyArray) -> tuple[int, int, int]:
    """Return height, width and channels of an array that can be stored."""
    if array.dtype not in (np.uint8, np.uint16) or array.ndim not in (2, 3):
        raise ValueError(f"byte planes hold (H, W) or (H, W, C) of uint8 or uint16, not {array.shape} {array.dtype}")
    height, width, channels = array.shape if array.ndim == 3 else (*array.shape, 1)
    if not array.size or array.nbytes > MOST_BYTES or (array.ndim == 3 and not 2 <= channels <= 255):
        raise ValueError(f"byte planes hold 1 to {MOST_BYTES} bytes, in 2 to 255 channels if any, not {array.shape}")
    return height, width, channels


def _read_header(data: bytes) -> tuple[int, int, int, np.dtype[Any]]:
    if len(data) < _HEADER.size:
        raise ValueError(f"{len(data)} bytes are less than a header")
    magic, version, itemsize, channels, height, width = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise ValueError("it does not start as a byte-plane file does")
    if version != _VERSION:
        raise ValueError(f"it is of version {version}, but this program reads version {_VERSION}")
    if itemsize not in _DTYPES:
        raise ValueError(f"it declares values of {itemsize} bytes")
    size = height * width * channels * itemsize
    if not 0 < size <= MOST_BYTES:
        raise ValueError(f"it declares {size} bytes; 1 to {MOST_BYTES} are read")
    return height, width, channels, _DTYPES[itemsize]


def _decompressor() -> zstandard.ZstdDecompressor:
    """Return this thread's own."""
    if not hasattr(_of_thread, "decompressor"):
        _of_thread.decompressor = zstandard.ZstdDecompressor()
    own: zstandard.ZstdDecompressor = _of_thread.decompressor
    return own


def _join(planes: NDArray[np.uint8], channels: int, dtype: np.dtype[Any]) -> AnyArray:
    """(C * itemsize, H, W) bytes to (H, W) or (H, W, C) values; the channels of the result stay apart in memory."""
    values: AnyArray = planes
    if dtype.itemsize == 2:
        values = planes[1::2].astype(np.uint16)
        values <<= 8
        values |= planes[::2]
    return values[0] if channels == 1 else values.transpose(1, 2, 0)
