"""Folders of shards after accidents: replaced, oddly named, damaged. Nothing is lost without a word."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from configs.tasks import TASKS
from data_pipeline.check import check_shards
from data_pipeline.codecs import encode_label
from data_pipeline.index import ShardIndex
from data_pipeline.sample import Sample
from data_pipeline.shards import INDEX_FILE, ShardEntry, ShardWriter, build_index, write_index
from data_pipeline.tarscan import scan_shard
from tests.data_pipeline.random_source import random_sample
from tests.data_pipeline.tars import BLOCK, forge_header, member, png, tar_of

SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write_shard(path: Path, numbers: range, prefix: str = "") -> ShardEntry:
    with ShardWriter(path, "zstd") as writer:
        for number in numbers:
            sample = random_sample(number)
            writer.write(Sample(key=prefix + sample.key, rgb=sample.rgb, labels=sample.labels, meta=sample.meta))
    return writer.entry


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    write_index(folder, [write_shard(folder / f"{name}.tar", range(4)) for name in ("a",)])
    return folder


def read_all(index: ShardIndex) -> list[Any]:
    return [
        (index.image(sample).tolist(), index.label(sample, TASKS[task]).tolist(), index.meta(sample))
        for sample in range(len(index))
        for task in index.tasks
    ]


def same_size(path: Path, size: int) -> None:
    """Pad a tar with zeros, or cut zeros off its end, which keeps it a good tar."""
    data = path.read_bytes().rstrip(b"\0")
    path.write_bytes(data.ljust(size, b"\0"))


@pytest.mark.parametrize("numbers", [range(10, 14), range(4, 8), range(3)])
@pytest.mark.parametrize("when", ["before", "opened"])
def test_a_shard_replaced_by_one_of_its_name_and_size(folder: Path, numbers: range, when: str) -> None:
    index = ShardIndex.load(folder)
    size = (folder / "a.tar").stat().st_size
    if when == "opened":
        read_all(index)
    other = folder.parent / "other.tar"
    write_shard(other, numbers)
    same_size(other, size + 0)
    assert other.stat().st_size == size
    if when == "opened":  # Written over in place, so that the open file changes.
        (folder / "a.tar").write_bytes(other.read_bytes())
    else:
        os.replace(other, folder / "a.tar")
    with pytest.raises(UserError, match=r"a\.tar, sample view_000\d, member \w+ is not where the index says.*replaced"):
        read_all(index)
    with pytest.raises(UserError, match=r"a\.tar does not match its checksum"):
        check_shards(folder)


def test_a_shard_whose_open_file_was_unlinked_reads_on(folder: Path) -> None:
    index = ShardIndex.load(folder)
    before = read_all(index)
    write_shard(folder / "a.tar", range(10, 14))  # By a rename, as every writer of ours does.
    assert read_all(index) == before


def test_other_pixels_under_the_same_names_and_sizes_are_found_by_checksum(folder: Path) -> None:
    entry = write_shard(folder / "b.tar", range(4))
    other = write_shard(folder / "c.tar", range(4))
    assert entry.sha256 == other.sha256
    index = ShardIndex.load(folder)
    place = index._place(0, "class_scene")
    data = bytearray((folder / "a.tar").read_bytes())
    data[place.offset + place.size - 3] ^= 1  # One bit of a float: still a good file.
    (folder / "a.tar").write_bytes(data)
    index.label(0, TASKS["class_scene"])
    with pytest.raises(UserError, match=r"a\.tar does not match its checksum"):
        check_shards(folder)


@pytest.mark.parametrize("name", ["part 1.tar", "données é.tar", "部.tar", "a'b\"c$(x);.tar", "-rf.tar", "[bold].tar"])
def test_odd_names_of_shards_and_folders(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "mes données [1]" / "ü b"
    folder.mkdir(parents=True)
    key = "a b/é 1"
    label = encode_label(TASKS["depth_zbuffer"], np.full((4, 4), 700, np.uint16))[1]
    (folder / name).write_bytes(tar_of([(f"{key}.rgb.png", png()), (f"{key}.depth_zbuffer.png", label)]))
    build_index(folder)
    index = ShardIndex.load(folder)
    assert list(index.keys) == [key]
    assert (index.label(0, TASKS["depth_zbuffer"]) == 700).all()
    assert check_shards(folder).samples == 1
    assert name in index.where(0, "rgb")


def test_a_shard_whose_name_is_not_utf_8(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/a\xff.tar"
    with open(path, "wb") as file:
        file.write(tar_of([("k.rgb.png", png())]))
    with pytest.raises(UserError, match="UTF-8"):
        build_index(tmp_path)
    assert not (tmp_path / INDEX_FILE).exists()


def test_members_of_formats_that_are_not_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of([("k.rgb.gif", png())]))
    with pytest.raises(UserError, match=r"sample k, member rgb.gif has format 'gif'"):
        build_index(tmp_path)


def test_a_member_that_is_too_large_to_be_one(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    size = 2**28 + 1
    header = member("k.rgb.png", size=size).tobuf()
    with path.open("wb") as file:
        file.write(header)
        file.truncate(BLOCK + size + -size % BLOCK + 2 * BLOCK)  # A sparse file on the disk: no bytes are written.
    with pytest.raises(UserError, match=rf"k.rgb.png has {size} bytes, more than"):
        scan_shard(path)


def foreign_tar() -> bytes:
    members = []
    for number in range(3):
        label = encode_label(TASKS["depth_zbuffer"], np.full((4, 4), number, np.uint16))[1]
        members += [(f"k{number}.rgb.png", png(value=number)), (f"k{number}.depth_zbuffer.png", label)]
    return tar_of(members)


FOREIGN = foreign_tar()


@SETTINGS
@given(data=st.data())
def test_the_index_of_a_damaged_tar_is_that_of_the_whole_one_or_an_error(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(FOREIGN)
    whole = scan_shard(path)
    damaged = bytearray(FOREIGN)
    end = len(FOREIGN.rstrip(b"\0"))
    for _ in range(data.draw(st.integers(1, 3))):
        what = data.draw(st.sampled_from(["flip", "cut", "zero"]))
        place = data.draw(st.integers(0, end))
        if what == "flip":
            damaged[min(place, len(damaged) - 1)] ^= 1 << data.draw(st.integers(0, 7))
            break  # Two flips in one header may cancel in its sum.
        if what == "cut":
            del damaged[place:]
        else:
            damaged[place : place + 64] = bytes(len(damaged[place : place + 64]))
        if not damaged:
            break
    path.write_bytes(damaged)
    try:
        found = scan_shard(path)
    except UserError:
        return
    assert found.model_copy(update={"sha256": whole.sha256}) == whole


@pytest.mark.parametrize(
    ("block", "start", "value"),
    [(0, 156, b"1"), (0, 156, b"2"), (0, 156, b"V"), (2, 156, b"6"), (0, 0, b"\0"), (0, 124, b"%011o\0" % 5)],
)
def test_a_forged_header_never_drops_a_sample(tmp_path: Path, block: int, start: int, value: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(forge_header(FOREIGN, start, value, block))
    with pytest.raises(UserError):
        build_index(tmp_path)


@pytest.mark.parametrize("file", ["../a.tar", "/etc/passwd", "", "..", ".", "x/a.tar", "a\0.tar"])
def test_an_entry_names_files_beside_it_alone(folder: Path, file: str) -> None:
    entry = json.loads(scan_shard(folder / "a.tar").model_dump_json())
    with pytest.raises(ValueError, match="no name of a file"):
        ShardEntry.model_validate({**entry, "file": file})


@pytest.mark.parametrize(("offset", "size"), [(-2, 5), (0, -1), (2**62, 5), (512, 2**31 - 1), (10**30, 1)])
def test_an_entry_places_members_inside_its_shard(folder: Path, offset: int, size: int) -> None:
    entry = json.loads(scan_shard(folder / "a.tar").model_dump_json())
    column = entry["members"]["rgb.png"]
    column["offset"][0], column["size"][0] = offset, size
    with pytest.raises(ValueError, match="lies outside"):
        ShardEntry.model_validate(entry)


@settings(SETTINGS, max_examples=60)
@given(data=st.data())
def test_a_damaged_index_is_an_error_or_the_same_samples(tmp_path: Path, folder: Path, data: st.DataObject) -> None:
    index = ShardIndex.load(folder)
    keys, expected = list(index.keys), read_all(index)
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    shutil.copy(folder / "a.tar", copy)
    text = bytearray((folder / INDEX_FILE).read_bytes())
    place = data.draw(st.integers(0, len(text) - 1))
    what = data.draw(st.sampled_from(["flip", "cut", "insert", "delete"]))
    if what == "flip":
        text[place] ^= 1 << data.draw(st.integers(0, 7))
    elif what == "cut":
        del text[place:]
    elif what == "insert":
        text[place:place] = data.draw(st.sampled_from([b"\xff", b"[" * 5000, b"9" * 5000, b"-", b"\0", b'"', b"1e999"]))
    else:
        del text[place : place + data.draw(st.integers(1, 40))]
    (copy / INDEX_FILE).write_bytes(text)
    try:
        damaged = ShardIndex.load(copy)
        found = read_all(damaged)
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017  # Any other exception fails the test.
        return
    # JSON has no checksum: a damaged letter in a key or in a member's name is another name.
    assert len(damaged) == len(keys)
    same = [row[:2] for row in found] == [row[:2] for row in expected]
    assert same or len(damaged.tasks) != 3 or list(damaged.keys) != keys


def test_the_check_names_all_damaged_shards(folder: Path) -> None:
    names = ("a", "b", "c")
    write_index(folder, [write_shard(folder / f"{name}.tar", range(2), name) for name in names])
    for name in ("a", "c"):
        data = bytearray((folder / f"{name}.tar").read_bytes())
        data[700] ^= 1
        (folder / f"{name}.tar").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.tar does not match its checksum.*; so it is with 1 more: c\.tar$"):
        check_shards(folder)
