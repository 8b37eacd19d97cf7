"""Members survive a round trip exactly, and a label that is not what its task stores is refused by name."""

import io
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from configs.errors import UserError
from configs.tasks import TASKS, TaskSpec
from data_pipeline.codecs import (
    PNG,
    ImageCodec,
    ImageFormat,
    LabelCodec,
    decode_image,
    decode_label,
    decode_member,
    encode_label,
    encode_mask,
    image_shape,
)

CODECS: tuple[LabelCodec, ...] = ("png", "zstd")
WHERE = "shard s.tar, sample k, member x"


def random_label(spec: TaskSpec, height: int, width: int, seed: int) -> NDArray[Any]:
    rng = np.random.default_rng(seed)
    if not spec.dense:
        return rng.standard_normal(spec.encoding.channels).astype(np.float32)
    dtype = np.dtype(spec.encoding.dtype)
    shape = (height, width) if spec.encoding.channels == 1 else (height, width, spec.encoding.channels)
    return rng.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(TASKS)),
    st.sampled_from(CODECS),
    st.integers(1, 17),
    st.integers(1, 17),
    st.integers(0, 2**32),
)
def test_labels_survive_exactly(task: str, codec: LabelCodec, height: int, width: int, seed: int) -> None:
    spec = TASKS[task]
    label = random_label(spec, height, width, seed)
    suffix, data = encode_label(spec, label, codec)
    assert suffix == ({"png": "png", "zstd": "plz"}[codec] if spec.dense else "npy")
    again = decode_label(spec, suffix, data, WHERE)
    assert again.dtype == label.dtype
    np.testing.assert_array_equal(again, label)


def test_image_and_mask_survive_exactly() -> None:
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)
    suffix, data = PNG.encode(rgb)
    np.testing.assert_array_equal(decode_image(suffix, data, WHERE), rgb)
    assert image_shape(suffix, data, WHERE) == (9, 7)
    mask = np.array([[0, 255], [255, 0]], np.uint8)
    for codec in CODECS:
        np.testing.assert_array_equal(decode_member(*encode_mask(mask, codec), WHERE), mask)


def photograph() -> NDArray[np.uint8]:
    """Smooth in brightness, with coloured stripes one pixel wide, which halved chroma would blend."""
    rows, columns = np.mgrid[:48, :64]
    red, blue = np.where(columns % 2, 200, 60), np.where(columns % 2, 60, 200)
    return np.stack([red, 60 + 2 * rows, blue], axis=2).astype(np.uint8)


@pytest.mark.parametrize(
    ("image_format", "quality", "suffix", "furthest"),
    [("png", 1, "png", 0), ("webp", 100, "webp", 0), ("jpeg", 95, "jpg", 12), ("jpeg", 30, "jpg", 90)],
)
def test_images_are_as_good_as_their_codec(image_format: ImageFormat, quality: int, suffix: str, furthest: int) -> None:
    rgb = photograph()
    found, data = ImageCodec(image_format, quality).encode(rgb[:, ::-1][:, ::-1])
    assert found == suffix
    assert image_shape(suffix, data, WHERE) == rgb.shape[:2]
    difference = np.abs(decode_image(suffix, data, WHERE).astype(int) - rgb).max()
    assert furthest / 4 <= difference <= furthest


def test_quality_costs_bytes_and_names_tell_equal_bytes() -> None:
    rgb = photograph()
    for image_format in ("jpeg", "webp"):
        sizes = [len(ImageCodec(image_format, quality).encode(rgb)[1]) for quality in (20, 60, 95)]
        assert sizes == sorted(set(sizes))
    assert len({ImageCodec("png", quality).name for quality in (5, 95)}) == 1
    assert [ImageCodec("jpeg", 100).name, ImageCodec("webp", 100).name] == ["jpeg-100", "webp-lossless"]
    assert [ImageCodec("jpeg").name, ImageCodec("webp").name] == ["jpeg-95", "webp-95"]
    with pytest.raises(UserError, match="image quality 101: give 1 to 100"):
        ImageCodec("jpeg", 101)


def test_an_image_too_large_for_webp_is_refused() -> None:
    with pytest.raises(UserError, match=r"\(1, 16384\) pixels cannot be stored as webp-95"):
        ImageCodec("webp").encode(np.zeros((1, 16384, 3), np.uint8))


@pytest.mark.parametrize(("suffix", "kind"), [("jpg", "JPEG"), ("webp", "WEBP")])
def test_photographs_are_read(suffix: str, kind: str) -> None:
    rgb = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, kind, quality=95)
    decoded = decode_image(suffix, buffer.getvalue(), WHERE)
    assert np.abs(decoded.astype(int) - rgb).max() <= 4


def test_a_grey_photograph_becomes_rgb() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), 9, np.uint8)).save(buffer, "PNG")
    assert decode_image("png", buffer.getvalue(), WHERE).shape == (4, 4, 3)


def test_float16_vectors_are_read_as_float32() -> None:
    spec = TASKS["class_scene"]
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(365, np.float16))
    assert decode_label(spec, "npy", buffer.getvalue(), WHERE).dtype == np.float32


@pytest.mark.parametrize(
    ("task", "array"),
    [
        ("depth_zbuffer", np.zeros((4, 4), np.uint8)),
        ("segment_unsup2d", np.zeros((4, 4), np.uint16)),
        ("normal", np.zeros((4, 4), np.uint8)),
        ("semseg", np.zeros((4, 4, 3), np.uint8)),
    ],
)
def test_a_wrong_depth_or_channel_count_is_refused(task: str, array: NDArray[Any]) -> None:
    with pytest.raises(UserError, match=f"label '{task}' is .* stores"):
        encode_label(TASKS[task], array)
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    with pytest.raises(UserError, match=f"{WHERE} is .* task '{task}' stores"):
        decode_label(TASKS[task], "png", buffer.getvalue(), WHERE)


def test_sixteen_bit_colour_is_refused_rather_than_cut_to_eight() -> None:
    _, data = PNG.encode(np.zeros((2, 2, 3), np.uint8))
    forged = data[:24] + b"\x10" + data[25:]
    with pytest.raises(UserError, match="PNG of 16 bits and 3 channels"):
        decode_label(TASKS["normal"], "png", forged, WHERE)


def test_vectors_of_another_length_are_refused() -> None:
    with pytest.raises(UserError, match=r"shape \(365,\)"):
        encode_label(TASKS["class_scene"], np.zeros((1, 365), np.float32))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "npy", "plz"])
def test_damaged_bytes_name_the_place(suffix: str) -> None:
    with pytest.raises(UserError, match=WHERE):
        decode_member(suffix, b"not what it says it is at all....", WHERE)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_cut_image_is_damaged(kind: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, kind)
    with pytest.raises(UserError, match="damaged"):
        decode_member("png" if kind == "PNG" else "jpg", buffer.getvalue()[: len(buffer.getvalue()) // 2], WHERE)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["depth_zbuffer", "normal", "class_scene"]), st.sampled_from(CODECS), st.data())
def test_no_damage_escapes_as_another_error(task: str, codec: LabelCodec, data: st.DataObject) -> None:
    suffix, whole = encode_label(TASKS[task], random_label(TASKS[task], 6, 5, 0), codec)
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 3))):
        if damaged:
            damaged[data.draw(st.integers(0, min(len(damaged), 120) - 1))] = data.draw(st.integers(0, 255))
    with suppress(UserError):
        assert decode_label(TASKS[task], suffix, bytes(damaged), WHERE).dtype == TASKS[task].encoding.dtype


def test_lossy_labels_and_unknown_formats_are_refused() -> None:
    with pytest.raises(UserError, match="labels must be png, npy, plz"):
        decode_label(TASKS["normal"], "jpg", b"", WHERE)
    with pytest.raises(UserError, match="unknown format 'gif'"):
        decode_member("gif", b"", WHERE)
    with pytest.raises(UserError, match="images must be"):
        image_shape("npy", b"", WHERE)


def test_wrong_images_are_refused() -> None:
    with pytest.raises(UserError, match=r"\(H, W, 3\) uint8"):
        PNG.encode(np.zeros((4, 4), np.uint8))
    with pytest.raises(UserError, match=r"\(H, W\) uint8"):
        encode_mask(np.zeros((4, 4, 3), np.uint8))


def test_an_array_too_large_for_byte_planes_is_refused() -> None:
    with pytest.raises(UserError, match=r"byte planes hold 1 to 134217728 bytes.*store it as png"):
        encode_label(TASKS["semseg"], np.broadcast_to(np.uint8(0), (16385, 8192)), "zstd")
