"""Values of label files arrive as stored, or the file is refused; images arrive as they are meant to be seen."""

import io
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from scipy.io import savemat

from configs.errors import UserError
from data_pipeline.sources.folder_arrays import read_array, read_picture
from data_pipeline.sources.raw_file import RawFile
from tests.data_pipeline.pascal_tree import write_palette


def read(path: Path, key: str | None = None) -> NDArray[Any]:
    return read_array(RawFile(str(path)), key)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("a.png", np.uint8),
        ("a.png", np.uint16),
        ("a.PNG", np.bool_),
        ("a.tif", np.uint16),
        ("a.tiff", np.float32),
        ("a.pfm", np.float32),
        ("a.pgm", np.uint8),
        ("a.bmp", np.uint8),
        ("a.npy", np.float64),
        ("a.npy", np.int64),
    ],
)
def test_values_are_as_stored(tmp_path: Path, name: str, dtype: type) -> None:
    array = (np.arange(12).reshape(3, 4) * 5000 % 256 / (1 if np.dtype(dtype).kind in "ub" else 7)).astype(dtype)
    if dtype is np.uint16:
        array = array * dtype(257)
    if name.endswith("npy"):
        np.save(tmp_path / name, array)
    else:
        Image.fromarray(array).save(tmp_path / name)
    found = read(tmp_path / name)
    assert found.dtype == dtype
    assert found.dtype.isnative
    np.testing.assert_array_equal(found, array)


def test_files_of_the_other_byte_order_are_turned(tmp_path: Path) -> None:
    codes = np.array([[1, 2, 65535]], np.uint16)
    Image.frombytes("I;16B", (3, 1), codes.astype(">u2").tobytes()).save(tmp_path / "a.tif")
    found = read(tmp_path / "a.tif")
    assert found.dtype == np.uint16
    assert found.dtype.isnative
    np.testing.assert_array_equal(found, codes)


def test_palettes_are_read_as_indices_and_transparency_is_dropped(tmp_path: Path) -> None:
    ids = np.array([[0, 15], [255, 20]], np.uint8)
    np.testing.assert_array_equal(read(write_palette(tmp_path / "p.png", ids)), ids)
    rgba = np.random.default_rng(0).integers(0, 255, (4, 4, 4)).astype(np.uint8)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    np.testing.assert_array_equal(read(tmp_path / "rgba.png"), rgba[:, :, :3])


def test_archives_say_what_they_hold(tmp_path: Path) -> None:
    one, two = np.zeros((2, 2)), np.ones((2, 2))
    np.savez_compressed(tmp_path / "one.npz", depth=one)
    np.savez(tmp_path / "two.npz", depth=one, mask=two)
    savemat(tmp_path / "m.mat", {"depth": two})
    np.testing.assert_array_equal(read(tmp_path / "one.npz"), one)
    np.testing.assert_array_equal(read(tmp_path / "two.npz", "mask"), two)
    np.testing.assert_array_equal(read(tmp_path / "m.mat", "depth"), two)
    with pytest.raises(UserError, match="holds depth, mask: say which as `key`"):
        read(tmp_path / "two.npz")
    with pytest.raises(UserError, match="holds no 'normal', but depth, mask"):
        read(tmp_path / "two.npz", "normal")
    with pytest.raises(UserError, match="give the name as `key`"):
        read(tmp_path / "m.mat")


def test_what_would_not_survive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(16) + b"\x10\x02" + bytes(9))
    with pytest.raises(UserError, match="16 bits per colour"):
        read(tmp_path / "deep.png")
    frames = [Image.fromarray(np.full((2, 2), value, np.uint8)) for value in (0, 9)]
    frames[0].save(tmp_path / "two.tif", save_all=True, append_images=frames[1:])
    with pytest.raises(UserError, match="several pictures"):
        read(tmp_path / "two.tif")
    frames[0].save(tmp_path / "a.jpg")
    with pytest.raises(UserError, match="format 'jpg', but must be png"):
        read(tmp_path / "a.jpg")
    frames[0].convert("CMYK").save(tmp_path / "cmyk.tif")
    with pytest.raises(UserError, match="mode CMYK"):
        read(tmp_path / "cmyk.tif")


def test_no_pickle_is_loaded_and_no_archive_explodes(tmp_path: Path) -> None:
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "o.npz", o=np.array([{}], dtype=object))
    for name in ("o.npy", "o.npz"):
        with pytest.raises(UserError, match="damaged"):
            read(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("depth.npy", bytes(2**28 + 1))
    assert (tmp_path / "bomb.npz").stat().st_size < 2**20
    with pytest.raises(UserError, match="which no label is"):
        read(tmp_path / "bomb.npz")


@pytest.mark.parametrize("name", ["absent.png", "folder.png", "null\0.png"])
def test_what_is_no_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match="there is no such file"):
        read_array(RawFile(f"{tmp_path}/{name}"))
    with pytest.raises(UserError, match="there is no such file"):
        read_picture(RawFile(f"{tmp_path}/{name}"))


def whole_files() -> dict[str, bytes]:
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    files = {name: io.BytesIO() for name in ("a.npy", "a.npz", "a.png", "a.tif", "a.pfm", "a.mat", "a.bmp")}
    np.save(files["a.npy"], array)
    np.savez_compressed(files["a.npz"], x=array)
    savemat(files["a.mat"], {"x": array})
    for name, kind in (("a.tif", "TIFF"), ("a.pfm", "PPM")):
        Image.fromarray(array).save(files[name], kind)
    for name, kind in (("a.png", "PNG"), ("a.bmp", "BMP")):
        Image.fromarray(array.astype(np.uint8)).save(files[name], kind)
    return {name: buffer.getvalue() for name, buffer in files.items()}


WHOLE = whole_files()


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow, about damaged TIFF files
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(WHOLE)), st.data())
def test_no_damage_escapes_as_another_error(tmp_path: Path, name: str, data: st.DataObject) -> None:
    damaged = bytearray(WHOLE[name][: data.draw(st.integers(0, len(WHOLE[name])))])
    for _ in range(data.draw(st.integers(0, 3))):
        if damaged:
            damaged[data.draw(st.integers(0, min(len(damaged), 200) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / name).write_bytes(damaged)
    with suppress(UserError):
        assert isinstance(read(tmp_path / name, "x"), np.ndarray)
    with suppress(UserError):
        assert read_picture(RawFile(str(tmp_path / name))).dtype == np.uint8


def test_images_of_any_kind_become_rgb(tmp_path: Path) -> None:
    rgb = np.full((4, 6, 3), (204, 102, 51), np.uint8)
    picture = Image.fromarray(rgb)
    for name, mode in (("a.png", "RGB"), ("b.png", "RGBA"), ("c.png", "P"), ("d.webp", "RGB"), ("e.bmp", "RGB")):
        picture.convert(mode).save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
        np.testing.assert_array_equal(read_picture(RawFile(str(tmp_path / name))), rgb)
    for name, mode in (("f.jpg", "CMYK"), ("g.jpeg", "RGB"), ("h.tif", "RGB")):
        picture.convert(mode).save(tmp_path / name)
        assert np.abs(read_picture(RawFile(str(tmp_path / name))).astype(int) - rgb).max() < 6
    picture.convert("L").save(tmp_path / "grey.png")
    assert read_picture(RawFile(str(tmp_path / "grey.png"))).shape == (4, 6, 3)
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(UserError, match="no 8-bit image"):
        read_picture(RawFile(str(tmp_path / "deep.png")))


def test_photos_are_turned_as_their_camera_says(tmp_path: Path) -> None:
    rgb = np.zeros((4, 6, 3), np.uint8)
    rgb[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter to the right
    Image.fromarray(rgb).save(tmp_path / "a.png", exif=exif)
    found = read_picture(RawFile(str(tmp_path / "a.png")))
    np.testing.assert_array_equal(found, np.rot90(rgb, -1))
