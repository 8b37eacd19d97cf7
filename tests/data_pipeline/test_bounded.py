"""Nothing is allocated because a header says so, nothing is unpickled, and damage has one kind of error."""

import io
import pickle
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from configs.tasks import TASKS
from data_pipeline.bounded import image_pixels, load_npy
from data_pipeline.codecs import ImageCodec, decode_image, decode_label, decode_member, encode_label, image_shape
from data_pipeline.skips import DamagedMember, MemberError

HUGE = 60_000
PICTURE = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bomb(depth: int, colour: int) -> bytes:
    """A PNG of gigabytes of zeros, in some kilobytes."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", HUGE, HUGE, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(2**22), 9)) + chunk(b"IEND", b"")


def jpeg_bomb() -> bytes:
    """A JPEG whose frame header declares 60,000 x 60,000 pixels."""
    buffer = io.BytesIO()
    Image.fromarray(PICTURE).save(buffer, "JPEG")
    data = bytearray(buffer.getvalue())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", HUGE, HUGE)
    return bytes(data)


def webp(**options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PICTURE).save(buffer, "WEBP", **options)
    return buffer.getvalue()


def webp_bomb(kind: str) -> bytes:
    if kind == "extended":
        canvas = bytes([0] * 4) + (HUGE - 1).to_bytes(3, "little") * 2
        inner = webp()[12:]
        body = b"WEBPVP8X" + struct.pack("<I", 10) + canvas + inner
        return b"RIFF" + struct.pack("<I", len(body)) + body
    data = bytearray(webp(lossless=kind == "lossless"))
    if kind == "lossless":
        data[21:25] = struct.pack("<I", 0x3FFF | 0x3FFF << 14)
    else:
        data[26:30] = struct.pack("<HH", 0x3FFF, 0x3FFF)
    return bytes(data)


def npy_of(descr: str, shape: str, content: bytes = b"", version: bytes = b"\1\0") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}".encode()
    return b"\x93NUMPY" + version + struct.pack("<H", len(header) + 1) + header + b"\n" + content


BOMBS = [
    ("png", lambda: png_bomb(8, 2), r"60000 x 60000 pixels"),
    ("png", lambda: png_bomb(16, 0), r"60000 x 60000 pixels"),
    ("jpg", jpeg_bomb, r"60000 x 60000 pixels"),
    ("webp", lambda: webp_bomb("extended"), r"60000 x 60000 pixels"),
    ("webp", lambda: webp_bomb("lossless"), r"16384 x 16384 pixels"),
    ("webp", lambda: webp_bomb("lossy"), r"16383 x 16383 pixels"),
    ("npy", lambda: npy_of("'<f4'", "(1099511627776,)"), r"declares 4398046511104 bytes, but holds 0"),
    ("npy", lambda: npy_of("'<f4'", "(-1, -4)", b"x" * 16), r"declares 16 bytes, but holds 16|negative"),
    ("npy", lambda: npy_of("'<V0'", "(1099511627776,)"), r"only numbers are read"),
    ("npy", lambda: npy_of("'<U0'", "(1099511627776,)"), r"only numbers are read"),
    ("npy", lambda: npy_of("'(100000,100000)f4'", "(0,)"), r"C int"),
    ("npy", lambda: npy_of("'<f4'", "(" * 3000), r"."),
    ("npy", lambda: npy_of("'<f4'", "(1,)" + " " * 20000, b"1234"), r"."),
    ("npy", lambda: npy_of("'<f4'", "(1,)", b"1234", version=b"\3\0"), r"npy version 3.0"),
    ("npy", lambda: npy_of("'<f4'", "(1,)", b"12345"), r"declares 4 bytes, but holds 5"),
]


@pytest.mark.parametrize(("suffix", "bomb", "message"), BOMBS)
def test_a_bomb_takes_no_memory(suffix: str, bomb: Callable[[], bytes], message: str) -> None:
    data = bomb()
    assert len(data) < 50_000
    tracemalloc.start()
    started = time.process_time()
    try:
        with pytest.raises(DamagedMember, match=message) as caught:
            decode_member(suffix, data, "shard a.tar, sample k, member rgb")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**22
    assert time.process_time() - started < 2
    assert "\n" not in str(caught.value)
    if suffix != "npy":
        with pytest.raises(DamagedMember, match=message):
            image_shape(suffix, data, "here")


class Bad:
    """Calls a function when it is unpickled."""

    called: ClassVar[list[str]] = []

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return Bad.called.append, ("unpickled",)


@pytest.mark.parametrize("suffix", ["npy", "png", "jpg", "webp", "plz"])
def test_no_pickle_is_loaded(suffix: str) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Bad()], dtype=object), allow_pickle=True)
    for data in (buffer.getvalue(), pickle.dumps(Bad()), npy_of("'|O'", "(1,)", pickle.dumps(Bad()))):
        with pytest.raises(MemberError):
            decode_member(suffix, data, "here")
    assert not Bad.called


@given(
    shape=st.lists(st.integers(0, 4), max_size=4).map(tuple),
    dtype=st.sampled_from(["u1", "<u2", ">u2", "<i8", "f2", "<f4", ">f8", "?"]),
    order=st.sampled_from(["C", "F"]),
    version=st.sampled_from([(1, 0), (2, 0)]),
)
@settings(deadline=None)
def test_arrays_are_those_of_numpy(shape: tuple[int, ...], dtype: str, order: Any, version: tuple[int, int]) -> None:
    array = np.asarray(np.random.default_rng(0).integers(0, 2, shape)).astype(dtype, order=order)
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version, allow_pickle=False)
    found = load_npy(buffer.getvalue())
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("size", [(1, 1), (12, 20), (300, 1)])
@pytest.mark.parametrize(
    ("suffix", "kind", "options"),
    [
        ("png", "PNG", {}),
        ("jpg", "JPEG", {}),
        ("jpg", "JPEG", {"progressive": True}),
        ("webp", "WEBP", {}),
        ("webp", "WEBP", {"lossless": True}),
        ("webp", "WEBP", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"}),
    ],
)
def test_sizes_are_those_of_the_picture(suffix: str, kind: str, options: dict[str, Any], size: tuple[int, int]) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((*size, 3), np.uint8)).save(buffer, kind, **options)
    assert image_pixels(suffix, buffer.getvalue()) == size
    assert decode_image(suffix, buffer.getvalue(), "here").shape == (*size, 3)


DEPTH = np.arange(240, dtype=np.uint16).reshape(12, 20)
MEMBERS: dict[str, tuple[bytes, NDArray[Any]]] = {
    "png": (ImageCodec("png").encode(PICTURE)[1], PICTURE),
    "png16": (encode_label(TASKS["depth_zbuffer"], DEPTH)[1], DEPTH),
    "jpg": (ImageCodec("jpeg", 90).encode(PICTURE)[1], PICTURE),
    "webp": (ImageCodec("webp", 100).encode(PICTURE)[1], PICTURE),
    "plz": (encode_label(TASKS["depth_zbuffer"], DEPTH, "zstd")[1], DEPTH),
    "npy": (encode_label(TASKS["class_scene"], np.ones(365, np.float32))[1], np.ones(365, np.float32)),
}
# Formats with a checksum over the pixels: damage never yields other ones.
CHECKED = ("png", "png16", "plz")


@pytest.mark.parametrize("name", list(MEMBERS))
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_damage_has_one_kind_of_error_and_little_cost(name: str, data: st.DataObject) -> None:
    good, array = MEMBERS[name]
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(damaged)))
        what = data.draw(st.sampled_from(["flip", "cut", "insert", "delete", "huge"]))
        if what == "flip" and place < len(damaged):
            damaged[place] ^= 1 << data.draw(st.integers(0, 7))
        elif what == "cut":
            del damaged[place:]
        elif what == "insert":
            damaged[place:place] = data.draw(st.binary(min_size=1, max_size=8))
        elif what == "delete":
            del damaged[place : place + data.draw(st.integers(1, 8))]
        else:
            damaged[place : place + 4] = b"\xff\xff\xff\xff"
    found = decode_or_refuse(name.removesuffix("16"), bytes(damaged))
    if found is None:
        return
    assert found.nbytes <= 2**27
    if name in CHECKED:
        np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("name", CHECKED)
def test_no_flipped_bit_changes_a_pixel(name: str) -> None:
    good, array = MEMBERS[name]
    for bit in range(8 * len(good)):
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << bit % 8
        found = decode_or_refuse(name.removesuffix("16"), bytes(damaged))
        assert found is None or np.array_equal(found, array), bit


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "npy", "plz"])
@given(tail=st.binary(max_size=300), start=st.sampled_from([0, 8, 16, 26, 60]))
@settings(max_examples=100, deadline=None)
def test_random_bytes_have_one_kind_of_error(suffix: str, tail: bytes, start: int) -> None:
    assert decode_or_refuse(suffix, MEMBERS[suffix][0][:start] + tail) is None or start


def decode_or_refuse(suffix: str, data: bytes) -> NDArray[Any] | None:
    """None where it is refused; any other exception fails the test."""
    started = time.process_time()
    try:
        return decode_member(suffix, data, "here")
    except MemberError as error:
        message = str(error)
    assert time.process_time() - started < 2
    assert message.startswith("here ")
    assert "\n" not in message
    return None


def test_damaged_labels_are_told_from_unfit_ones() -> None:
    data, _ = MEMBERS["png16"]
    with pytest.raises(MemberError) as damaged:
        decode_label(TASKS["depth_zbuffer"], "png", data[:60], "here")
    with pytest.raises(MemberError) as unfit:
        decode_label(TASKS["segment_unsup2d"], "png", data, "here")
    assert (damaged.value.reason, unfit.value.reason) == ("damaged", "unfit")
