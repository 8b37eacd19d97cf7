"""Tars as foreign programs, accidents and attackers make them."""

import io
import tarfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

BLOCK = 512


def png(side: int = 4, value: int = 7) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, **attributes: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in attributes.items():
        setattr(info, key, value)
    return info


def tar_of(
    members: Sequence[tuple[tarfile.TarInfo | str, bytes]], kind: int = tarfile.GNU_FORMAT, **options: Any
) -> bytes:
    """The bytes of a tar that Python's own module writes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind, **options) as tar:
        for named, data in members:
            info = member(named) if isinstance(named, str) else named
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def forge_header(tar: bytes, start: int, value: bytes, block: int = 0) -> bytes:
    """Write into a header and give it the checksum that it then needs."""
    place = block * BLOCK
    header = bytearray(tar[place : place + BLOCK])
    header[start : start + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return tar[:place] + bytes(header) + tar[place + BLOCK :]
