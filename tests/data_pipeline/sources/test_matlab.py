"""MATLAB files: what is whole reads back, what is damaged is an error of one line and never the end of the process."""

import io
import struct
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat
from scipy.sparse import eye_array

from configs.errors import UserError
from data_pipeline.sources.matlab import load_variable

both_forms = pytest.mark.parametrize("compressed", [False, True])


def stored(variables: Mapping[str, Any], compressed: bool = False) -> bytes:
    file = io.BytesIO()
    savemat(file, dict(variables), do_compression=compressed)
    return file.getvalue()


NESTED = {
    "name": "a word",
    "cells": np.array([[np.arange(6.0).reshape(2, 3), "inner"]], object),
    "nothing": np.zeros((0, 0)),
    "complex": np.array([[1 + 2j, 3]]),
    "flags": np.array([[True, False]]),
}


@both_forms
def test_numbers_characters_cells_and_structs_read_back(compressed: bool) -> None:
    data = stored({"other": 1, "tree": NESTED, "map": np.arange(12, dtype=np.uint16).reshape(3, 4)}, compressed)
    label_map = load_variable(data, "map")
    assert label_map.dtype == np.uint16
    np.testing.assert_array_equal(label_map, np.arange(12).reshape(3, 4))
    tree = load_variable(data, "tree")
    assert tree.shape == (1, 1)
    assert tree[0, 0]["name"].item() == "a word"
    assert tree[0, 0]["cells"][0, 1].item() == "inner"
    np.testing.assert_array_equal(tree[0, 0]["cells"][0, 0], np.arange(6).reshape(2, 3))
    assert tree[0, 0]["nothing"].shape == (0, 0)
    np.testing.assert_array_equal(tree[0, 0]["complex"], [[1 + 2j, 3]])
    np.testing.assert_array_equal(tree[0, 0]["flags"], [[1, 0]])


def test_files_of_the_other_byte_order() -> None:
    header = b"MATLAB 5.0".ljust(124) + b"\1\0MI"
    parts = (
        struct.pack(">4I", 6, 8, 9, 0),  # flags: uint8
        struct.pack(">2I2i", 5, 8, 1, 3),  # shape
        struct.pack(">I", 1 << 16 | 1) + b"x\0\0\0",  # name, in a short element
        struct.pack(">I", 3 << 16 | 2) + b"\7\10\11\0",  # values
    )
    body = b"".join(parts)
    np.testing.assert_array_equal(load_variable(header + struct.pack(">2I", 14, len(body)) + body, "x"), [[7, 8, 9]])


def change(data: bytes, old: bytes, new: bytes) -> bytes:
    assert old in data
    return data.replace(old, new, 1)


FLAGS = struct.pack("<2I", 6, 8)
NAME_LENGTH = struct.pack("<I", 4 << 16 | 5)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: b"", "not one of MATLAB 5 to 7"),
        (lambda data: data[:124] + b"\0\2IM" + data[128:], "not one of MATLAB 5 to 7"),  # 7.3 is HDF5
        (lambda data: data[:-20], "longer than its place"),
        (lambda data: data + b"\1", "cut off"),
        (lambda data: change(data, FLAGS, struct.pack("<2I", 7, 8)), "no proper flags"),
        (lambda data: change(data, FLAGS, struct.pack("<2I", 6, 4)), "no proper flags"),
        (lambda data: change(data, struct.pack("<2I", 5, 8), struct.pack("<2I", 5, 7)), "no proper flags"),
        (lambda data: change(data, FLAGS + b"\2", FLAGS + b"\3"), "is of class 3"),
        (lambda data: change(data, FLAGS + b"\6\0", FLAGS + b"\6\10"), "values of an unknown type"),  # complex
        (lambda data: change(data, struct.pack("<3I", 5, 8, 1), struct.pack("<3i", 5, 8, -1)), "has shape"),
        (lambda data: change(data, struct.pack("<4I", 5, 8, 1, 1), struct.pack("<4I", 5, 8, 1, 2)), "instead of 2"),
        (lambda data: change(data, struct.pack("<2I", 9, 48), struct.pack("<2I", 200, 48)), "of an unknown type"),
        (lambda data: change(data, NAME_LENGTH, struct.pack("<I", 4 << 16 | 7)), "field names"),
        (lambda data: change(data, NAME_LENGTH + b"\7", NAME_LENGTH + b"\5"), "field names"),
        (lambda data: data[:128] + struct.pack("<2I", 9, 8) + data[136:144], "an array is of type 9"),
    ],
)
def test_what_loadmat_would_take_on_trust_is_refused(damage: Callable[[bytes], bytes], reason: str) -> None:
    data = stored({"tree": {"values": np.arange(6.0).reshape(2, 3)}})
    assert load_variable(data, "tree").shape == (1, 1)
    with pytest.raises(UserError, match=reason):
        load_variable(damage(data), "tree")


@both_forms
def test_a_damaged_file_never_ends_the_process(compressed: bool) -> None:
    data = stored({"tree": NESTED}, compressed)
    refused = []
    for seed in range(1500):
        generator = np.random.default_rng(seed)
        damaged = bytearray(data)
        for place in generator.integers(128, len(data), generator.integers(1, 4)):
            damaged[place] = generator.integers(256)
        try:
            load_variable(bytes(damaged), "tree")
        except UserError as error:
            refused.append(str(error))
    assert len(refused) > (1400 if compressed else 300)
    assert not any("\n" in reason for reason in refused)


def test_what_inflates_too_much_is_not_inflated(monkeypatch: pytest.MonkeyPatch) -> None:
    data = stored({"zeros": np.zeros((1000, 1000))}, compressed=True)
    assert len(data) < 20_000
    monkeypatch.setattr("data_pipeline.sources.matlab._MOST_BYTES", 1_000_000)
    with pytest.raises(UserError, match="above 1000000 bytes"):
        load_variable(data, "zeros")
    several = stored({name: np.zeros((250, 250)) for name in ("first", "second")}, compressed=True)
    with pytest.raises(UserError, match="above 1000000 bytes"):
        load_variable(several, "second")
    with pytest.raises(UserError, match="above 1000000 bytes"):
        load_variable(stored({"zeros": np.zeros((1000, 1000))}), "zeros")


def test_fields_that_were_never_set() -> None:
    """MATLAB stores them as arrays without any content."""
    data = stored({"tree": {"values": np.zeros((0, 0))}})
    empty = struct.pack("<2I", 14, 0)
    start = data.rindex(struct.pack("<2I", 14, len(data) - data.rindex(FLAGS)))
    shorter = bytearray(data[:start] + empty)
    shorter[132:136] = struct.pack("<I", len(shorter) - 136)
    assert load_variable(bytes(shorter), "tree")[0, 0]["values"].size == 0


def test_a_compressed_variable_that_is_cut_off() -> None:
    whole = zlib.compress(stored({"x": np.arange(100.0)})[128:])
    half = whole[: len(whole) // 2]
    header = stored({})[:128]
    assert load_variable(header + struct.pack("<2I", 15, len(whole)) + whole, "x").shape == (1, 100)
    with pytest.raises(UserError, match="cut off"):
        load_variable(header + struct.pack("<2I", 15, len(half)) + half, "x")


def test_what_is_not_there_or_not_read() -> None:
    with pytest.raises(UserError, match="holds no 'y'"):
        load_variable(stored({"x": 1}), "y")
    with pytest.raises(UserError, match="class 5, none of numbers"):
        load_variable(stored({"x": eye_array(3).tocsc()}), "x")
