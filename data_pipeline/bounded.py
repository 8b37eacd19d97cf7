"""What an encoded file declares about its size, read before anything is allocated for it.

A few hundred bytes can declare terabytes of pixels. So sizes come from the headers first and must stay below one limit,
and arrays must be as long as the bytes that are there. npy files are read without `numpy.load`: no pickle, ever.
"""

import io
import math
import zlib
from typing import Any

import numpy as np
import simplejpeg
from numpy.lib import format as npy
from numpy.typing import NDArray

from data_pipeline.byte_planes import MOST_BYTES

_PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"


def image_pixels(suffix: str, data: bytes) -> tuple[int, int]:
    """Return (height, width) that an image's header declares.

    Args:
        suffix: png, jpg, jpeg or webp; the content must be of that format.
        data: the file.

    Raises:
        ValueError: another format, a damaged header, or more than `MOST_BYTES` when decoded to RGB of 8 bits.
    """
    match suffix:
        case "png":
            height, width = _png_pixels(data)
        case "jpg" | "jpeg":
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
        case "webp":
            height, width = _webp_pixels(data)
        case _:
            raise ValueError(f"format '{suffix}' is no image")
    check_pixels(height, width, 3)
    return height, width


def check_pixels(height: int, width: int, pixel_bytes: int) -> None:
    """Raise `ValueError` unless a picture has pixels, and at most `MOST_BYTES`."""
    if not 0 < height * width * pixel_bytes <= MOST_BYTES:
        raise ValueError(f"it declares {height} x {width} pixels; 1 to {MOST_BYTES // pixel_bytes} are read")


def check_png_sums(data: bytes) -> None:
    """Raise `ValueError` unless a PNG is whole and every chunk has its checksum.

    PNG specification (ISO/IEC 15948), 5.3: chunks are a length, a kind, the data, and a CRC of the latter two. Pillow
    passes over that of pixels, and over the sum at the end of their zlib stream, too: it stops at the last pixel.
    """
    view, place, kind = memoryview(data), 8, b""
    while kind != b"IEND":
        length, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        end = place + 8 + length
        if end + 4 > len(data):
            raise ValueError("it breaks off")
        if zlib.crc32(view[place + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise ValueError(f"the checksum of its chunk {kind!r} is another")
        place = end + 4


def load_npy(data: bytes) -> NDArray[Any]:
    """Return the array of numbers that an npy file holds; it shares the memory of `data`.

    Raises:
        Exception: a damaged header, in whichever way NumPy and Python's tokenizer say so.
        ValueError: not numbers, such as pickled objects, or more or fewer bytes than the header declares.
    """
    stream = io.BytesIO(data)
    version = npy.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"it is of npy version {version[0]}.{version[1]}; 1.0 and 2.0 are read")
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, columns_first, dtype = read_header(stream)
    if dtype.kind not in "biuf":
        raise ValueError(f"it holds '{dtype}', but only numbers are read")
    declared, found = math.prod(shape) * dtype.itemsize, len(data) - stream.tell()
    if min(shape, default=0) < 0 or declared != found:
        raise ValueError(f"it declares {declared} bytes, but holds {found}")
    values = np.frombuffer(data, dtype, offset=stream.tell())
    return values.reshape(shape[::-1]).T if columns_first else values.reshape(shape)


def _png_pixels(data: bytes) -> tuple[int, int]:
    """PNG specification (ISO/IEC 15948), 11.2.2: the header is the first chunk."""
    if len(data) < 24 or not data.startswith(_PNG_START):
        raise ValueError("it is not a PNG file")
    return int.from_bytes(data[20:24], "big"), int.from_bytes(data[16:20], "big")


def _webp_pixels(data: bytes) -> tuple[int, int]:
    """RFC 9649, sections 2.5 (lossy), 2.6 (lossless) and 2.7 (extended): the first chunk tells the size."""
    if len(data) < 25 or data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        raise ValueError("it is not a WebP file")
    match data[12:16]:
        case b"VP8 ":
            bits = int.from_bytes(data[26:30], "little")
            return bits >> 16 & 0x3FFF, bits & 0x3FFF
        case b"VP8L":
            bits = int.from_bytes(data[21:25], "little")
            return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
        case b"VP8X":
            return int.from_bytes(data[27:30], "little") + 1, int.from_bytes(data[24:27], "little") + 1
    raise ValueError("it is not a WebP file")
