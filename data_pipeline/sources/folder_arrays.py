"""Images and arrays from files of common formats, with every value as it was stored.

Pictures are read by Pillow, but for its silent losses: PNGs of 16 bits per colour, which it cuts to 8, are refused, and
of files with several pictures the first one does not stand for all. No pickle is loaded.
"""

import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from configs.errors import UserError
from data_pipeline.codecs import decode_member
from data_pipeline.sample import AnyArray
from data_pipeline.sources.matlab import load_variable
from data_pipeline.sources.raw_file import RawFile

PICTURE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "ppm", "pgm", "pfm")
"""Formats of images."""
ARRAY_SUFFIXES = ("png", "bmp", "tif", "tiff", "pgm", "pfm", "npy", "npz", "mat")
"""Formats of labels: those without loss."""

_PILLOW_NAMES = {"jpg": "JPEG", "tif": "TIFF", "ppm": "PPM", "pgm": "PPM", "pfm": "PPM"}
_MOST_BYTES = 2**28


def read_picture(file: RawFile) -> NDArray[np.uint8]:
    """Return (H, W, 3) uint8 of an image as it is meant to be seen: turned as its EXIF orientation says.

    Grey and palettes become RGB; transparency is dropped.

    Raises:
        UserError: no such file, an unknown format, a damaged file, or one of more than 8 bits.
    """
    data = _read(file, PICTURE_SUFFIXES)
    with _damage_named():
        image = _open(file.suffix, data)
        if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"):
            raise UserError(f"the file is of mode {image.mode}, which is no 8-bit image: convert it")
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def read_array(file: RawFile, key: str | None = None) -> AnyArray:
    """Return the values of a label file as stored: (H, W) or (H, W, C) of a picture, any shape of an array file.

    A palette's indices are its values; transparency is dropped.

    Args:
        file: of one of `ARRAY_SUFFIXES`.
        key: name of the array in an npz or mat file; an npz that holds a single array needs none.

    Raises:
        UserError: no such file, an unknown or lossy format, a damaged file, no such array, or values that would not
            survive: 16-bit colours, several pictures in one file.
    """
    data = _read(file, ARRAY_SUFFIXES)
    match file.suffix:
        case "npy":
            return decode_member("npy", data, "the file")
        case "npz":
            return _read_npz(data, key)
        case "mat":
            if key is None:
                raise UserError("a mat file holds variables by name: give the name as `key`")
            return load_variable(data, key)
    with _damage_named():
        return _values(_open(file.suffix, data))


def _read(file: RawFile, suffixes: tuple[str, ...]) -> bytes:
    if file.suffix not in suffixes:
        raise UserError(f"the file has format '{file.suffix}', but must be {', '.join(suffixes)}")
    try:
        exists = Path(file.path).is_file()
    except ValueError:  # A path with a null character.
        exists = False
    if not exists:
        raise UserError("there is no such file")
    return file.read()


def _open(suffix: str, data: bytes) -> Image.Image:
    if suffix == "png" and len(data) > 25 and data[24] == 16 and data[25] != 0:
        raise UserError("the file is a PNG of 16 bits per colour, of which only 8 would be read: convert it")
    image = Image.open(io.BytesIO(data), formats=[_PILLOW_NAMES.get(suffix, suffix.upper())])
    image.load()
    return image


def _values(image: Image.Image) -> AnyArray:
    if getattr(image, "n_frames", 1) > 1:
        raise UserError("the file holds several pictures: give each sample a file of its own")
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "F") and not image.mode.startswith("I"):
        raise UserError(f"the file is of mode {image.mode}, which holds no plain values: convert it")
    array = np.asarray(image)
    if image.mode in ("LA", "RGBA"):
        return array[:, :, 0] if image.mode == "LA" else array[:, :, :3]
    return array.astype(array.dtype.newbyteorder("="))


def _read_npz(data: bytes, key: str | None) -> AnyArray:
    with _damage_named(), zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        if key is None and len(names) != 1:
            raise UserError(f"the file holds {', '.join(sorted(names)) or 'nothing'}: say which as `key`")
        wanted = names[0] if key is None else key
        if wanted not in names:
            raise UserError(f"the file holds no '{wanted}', but {', '.join(sorted(names)) or 'nothing'}")
        info = archive.infolist()[names.index(wanted)]
        if info.file_size > _MOST_BYTES:
            raise UserError(f"'{wanted}' is of {info.file_size} bytes, which no label is")
        return decode_member("npy", archive.read(info), "the file")


@contextmanager
def _damage_named() -> Iterator[None]:
    """Turn whatever decoders raise when they are fed with damaged bytes, which is anything, into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"the file is damaged ({reason}): restore it") from None
