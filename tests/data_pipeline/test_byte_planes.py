"""Byte planes: exact for every shape, of the documented layout, and no damage yields other pixels or takes memory."""

import struct
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_pipeline.byte_planes import MOST_BYTES, decode_planes, encode_planes

HEADER = struct.Struct("<3sBBBII")
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4))


def random_array(shape: tuple[int, int, int], dtype: str, seed: int) -> NDArray[Any]:
    array = np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)
    return array[:, :, 0] if shape[2] == 1 else array


def forge(
    frame: bytes, *, version: int = 1, itemsize: int = 1, channels: int = 1, height: int = 2, width: int = 2
) -> bytes:
    return HEADER.pack(b"MPL", version, itemsize, channels, height, width) + frame


def compress(data: bytes, **options: Any) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(data)


@settings(max_examples=100, deadline=None)
@given(SHAPES, st.sampled_from(["uint8", "uint16"]), st.integers(0, 2**32), st.sampled_from("CF"))
def test_arrays_survive_exactly(shape: tuple[int, int, int], dtype: str, seed: int, order: Any) -> None:
    array = random_array(shape, dtype, seed)
    again = decode_planes(encode_planes(np.asarray(array, order=order)))
    assert again.dtype == array.dtype
    np.testing.assert_array_equal(again, array)


def test_the_layout_is_the_documented_one() -> None:
    array = np.array([[0x0102, 0x0304, 0x0506]], np.uint16)
    data = encode_planes(array)
    assert HEADER.unpack_from(data) == (b"MPL", 1, 2, 1, 1, 3)
    assert zstandard.ZstdDecompressor().decompress(data[HEADER.size :]) == bytes([2, 4, 6, 1, 3, 5])
    np.testing.assert_array_equal(decode_planes(forge(compress(bytes(range(4))))), [[0, 1], [2, 3]])


def test_smooth_depth_takes_less_room_than_its_interleaved_bytes() -> None:
    codes = (1000 + 3 * np.add.outer(np.arange(64), np.arange(64))).astype(np.uint16)
    assert len(encode_planes(codes)) < len(compress(codes.tobytes(), level=9))


@pytest.mark.parametrize(
    "array",
    [np.zeros((2, 2), np.int16), np.zeros((2, 2), np.float32), np.zeros(4, np.uint8), np.zeros((2, 2, 1), np.uint8),
     np.zeros((0, 2), np.uint8), np.zeros((1, 1, 256), np.uint8), np.zeros((2, 2, 2, 2), np.uint8),
     np.broadcast_to(np.uint16(0), (8193, 8192))],
    ids=lambda array: f"{array.dtype}{array.shape}",
)  # fmt: skip
def test_what_cannot_be_stored_is_refused(array: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match="byte planes hold"):
        encode_planes(array)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "less than a header"),
        (b"PNG" + bytes(20), "does not start"),
        (forge(compress(bytes(4)), version=2), "version 2"),
        (forge(compress(bytes(4)), itemsize=4), "values of 4 bytes"),
        (forge(compress(bytes(4)), width=0), "declares 0 bytes"),
        (forge(compress(bytes(4)), height=2**32 - 1, width=2**32 - 1), "declares 184"),
        (forge(compress(bytes(4)), width=3), "declares 4 bytes, its header 6"),
        (forge(compress(bytes(2**20))), "declares 1048576 bytes, its header 4"),
        (forge(compress(bytes(4), write_content_size=False)), "its header 4"),
        (forge(compress(bytes(4)) + b"more"), "."),
        (forge(b"not a frame"), "."),
    ],
)
def test_what_cannot_be_read_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        decode_planes(data)


def test_a_bomb_is_refused_before_it_takes_memory() -> None:
    """A frame that declares 1 TiB: a decompressor that believed it would fail, or take it."""
    declared = 2**40
    frame = struct.pack("<IBQ", 0xFD2FB528, 0xE0, declared) + bytes([1, 0, 0])  # RFC 8878, 3.1.1: single segment.
    assert zstandard.get_frame_parameters(frame).content_size == declared > MOST_BYTES
    for header in ({"height": 2, "width": 2}, {"height": 2**20, "width": 2**20}):
        with pytest.raises(ValueError, match="declares"):
            decode_planes(forge(frame, **header))


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_no_single_byte_of_damage_yields_other_pixels(dtype: str) -> None:
    array = random_array((5, 7, 2), dtype, 0)
    whole = encode_planes(array)
    for place in range(len(whole)):
        for value in (whole[place] ^ 1, whole[place] ^ 128, 0, 255):
            damaged = whole[:place] + bytes([value]) + whole[place + 1 :]
            with suppress(ValueError):
                np.testing.assert_array_equal(decode_planes(damaged), array)
    for length in range(len(whole)):
        with pytest.raises(ValueError, match=r"."):
            decode_planes(whole[:length])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_damage_escapes_as_another_error(data: st.DataObject) -> None:
    whole = bytearray(encode_planes(random_array((6, 5, 1), "uint16", 0)))
    for _ in range(data.draw(st.integers(1, 6))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with suppress(ValueError):
        assert decode_planes(bytes(whole[: data.draw(st.integers(0, len(whole)))])).nbytes <= MOST_BYTES
