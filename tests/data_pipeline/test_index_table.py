"""The binary form of an index says what index.json says, is made once, and costs a copy nothing."""

import errno
import fcntl
import io
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from configs.task_definitions import TaskDefinition, defined_in
from configs.tasks import TASKS as ROWS
from data_pipeline import index_cache, index_file
from data_pipeline.index_cache import TABLE_FILE, MappedTable, open_table
from data_pipeline.index_file import INDEX_FILE, IndexHead, format_index, parse_index
from data_pipeline.index_table import IndexTable, Member, write_table
from data_pipeline.planning.labels import unpack_codes
from data_pipeline.sample import Sample
from data_pipeline.shards import ShardIndex, ShardWriter, write_index
from data_pipeline.tarscan import Members, ShardEntry
from tests.data_pipeline.loading import write_three_shards

NAMES = ("rgb.png", "rgb.jpg", "normal.png", "depth_zbuffer.npy", "meta.json", "other.txt")
TASKS = ("depth_zbuffer", "edge_texture", "normal")


@st.composite
def shard_entries(draw: st.DrawFn) -> list[ShardEntry]:
    """Shards of any members, some absent, and any keys."""
    entries = []
    for number in range(draw(st.integers(1, 4))):
        keys = draw(st.lists(st.text(min_size=1), min_size=1, max_size=5, unique=True))
        names = draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
        places = st.one_of(st.just((-1, 0)), st.tuples(st.integers(0, 2**40), st.integers(0, 2**31 - 1)))
        columns = {name: draw(st.lists(places, min_size=len(keys), max_size=len(keys))) for name in names}
        members = {
            name: Members(offset=[o for o, _ in cells], size=[s for _, s in cells]) for name, cells in columns.items()
        }
        entries.append(
            ShardEntry(
                file=f"{number}.tar", file_bytes=2**42, sha256=f"{number:064}", side=8, keys=keys, members=members
            )
        )
    return entries


def table_of(entries: Sequence[ShardEntry]) -> IndexTable:
    memory = io.BytesIO()
    write_table(memory, (1, 2), IndexHead(side=8, tasks=()), entries)
    return IndexTable(memory.getvalue())


def test_an_index_keeps_the_definitions_of_its_tasks_and_numbers_their_labels(tmp_path: Path, any_size: None) -> None:
    known = defined_in({"define_tasks": {"lanes": {"like": "semseg"}, "absent": {"like": "edges"}}}, "own.yaml")
    ids = [np.full((8, 8), number, np.uint8) for number in range(3)]
    with ShardWriter(tmp_path / "0.tar", task_table=known) as writer:
        for number, label in enumerate(ids):
            writer.write(
                Sample(key=f"k{number}", rgb=np.zeros((8, 8, 3), np.uint8), labels={"lanes": label} if number else {})
            )
    write_index(tmp_path, [writer.entry], known)
    index = pickle.loads(pickle.dumps(ShardIndex.load(tmp_path)))
    assert index.tasks == ("lanes",)
    assert set(index.task_table) - set(ROWS) == {"lanes"}, "what has no label needs no definition"
    assert index.available(["lanes", "semseg"]).tolist() == [[False, False], [True, False], [True, False]]
    np.testing.assert_array_equal(index.label(2, index.task_table["lanes"]), ids[2])


@given(st.lists(st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1), min_size=2, unique=True))
@example([',"shards":[', "]}", '\\"'])
def test_any_names_of_classes_leave_the_index_readable(names: list[str]) -> None:
    names = [f"c{name}" for name in names]
    definitions = {name: TaskDefinition(like="semseg", class_names=names) for name in ("lanes", "shards")}
    head = IndexHead(side=8, tasks=("lanes", "shards"), define_tasks=definitions)
    entry = ShardEntry(
        file="0.tar", file_bytes=9, sha256="0" * 64, side=8, keys=("k",),
        members={"lanes.png": Members(offset=(1,), size=(2,))},
    )  # fmt: skip
    found, entries = parse_index(io.StringIO("".join(format_index(head, [entry.model_dump_json()]))))
    assert found == head
    assert list(entries) == [entry]


@settings(deadline=None)
@given(shard_entries())
def test_a_table_says_what_the_entries_say(entries: list[ShardEntry]) -> None:
    table = pickle.loads(pickle.dumps(table_of(entries)))
    assert (table.source, table.side, len(table)) == ((1, 2), 8, sum(len(entry.keys) for entry in entries))
    assert [tuple(shard) for shard in table.shards] == [(e.file, e.file_bytes, e.sha256) for e in entries]
    assert table.keys == [key for entry in entries for key in entry.keys]
    assert table.fields == {field for entry in entries for field in entry.fields}
    labels = unpack_codes(table.labels(TASKS).codes(slice(None)), len(TASKS))
    sample = 0
    for shard, entry in enumerate(entries):
        for row, key in enumerate(entry.keys):
            assert table.keys[sample] == key
            assert table.shard_of[sample] == shard
            found = {
                field: [
                    Member(members.offset[row], members.size[row], name.rpartition(".")[2])
                    for name, members in entry.members.items()
                    if name.rpartition(".")[0] == field and members.offset[row] >= 0
                ]
                for field in ("rgb", "meta", "other", *TASKS)
            }
            for field, places in found.items():
                assert table.member(sample, field) == (places[0] if places else None)
            assert labels[sample].tolist() == [bool(found[task]) for task in TASKS]
            sample += 1


def test_keys_are_a_sequence() -> None:
    entry = ShardEntry(
        file="a.tar", file_bytes=9, sha256="0" * 64, side=8, keys=("a", "\udcff", "b/c"),
        members={"rgb.png": Members(offset=(0, 1, 2), size=(1, 1, 1))},
    )  # fmt: skip
    keys = table_of([entry]).keys
    assert list(keys) == ["a", "\udcff", "b/c"]
    assert (keys[-1], keys[1:], keys.index("b/c"), len(keys)) == ("b/c", ("\udcff", "b/c"), 2, 3)
    assert keys == ("a", "\udcff", "b/c")
    assert keys != ("a", "\udcff")
    with pytest.raises(IndexError):
        keys[3]


@pytest.mark.parametrize("cut", [1, 40, 500])
def test_a_cut_table_is_refused(cut: int) -> None:
    data = table_of([entry_of(0)])._data[:-cut]
    with pytest.raises(ValueError, match="cut"):
        IndexTable(data)


def entry_of(number: int, samples: int = 3) -> ShardEntry:
    members = {name: Members(offset=range(samples), size=[1] * samples) for name in ("rgb.png", "normal.png")}
    keys = [f"{number}-{sample}" for sample in range(samples)]
    return ShardEntry(file=f"{number}.tar", file_bytes=99, sha256=f"{number:064}", side=8, keys=keys, members=members)


def test_a_damaged_directory_is_refused() -> None:
    data = bytearray(table_of([entry_of(0)])._data[:])
    data[data.index(b"0.tar")] = ord("1")
    with pytest.raises(ValueError, match="damaged"):
        IndexTable(bytes(data))


@pytest.mark.parametrize("indent", [None, 1])
def test_an_index_is_read_in_parts_however_it_is_written(indent: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [entry_of(number, 1) for number in range(3)]
    text = "".join(format_index(IndexHead(side=8, tasks=("normal",)), [entry.model_dump_json() for entry in entries]))
    text = text if indent is None else json.dumps(json.loads(text), indent=indent)
    cut = text[: text.rindex("}", 0, text.rindex("]") + 1) + 1]
    for characters in range(1, len(text) + 1):
        monkeypatch.setattr(index_file, "_CHARACTERS", characters)
        head, found = parse_index(io.StringIO(text))
        assert head.tasks == ("normal",)
        assert list(found) == entries
        with pytest.raises(ValueError, match="breaks off"):
            list(parse_index(io.StringIO(cut))[1])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "node"))
    (tmp_path / "node").mkdir()
    (tmp_path / "shards").mkdir()
    return write_three_shards(tmp_path / "shards")


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_cache, "SMALL_BYTES", 0)


def facts(index: ShardIndex) -> list[object]:
    return [
        index.fingerprint,
        index.tasks,
        tuple(index.keys),
        index.shard_of.tolist(),
        index.meta(3),
        index.image(3).tolist(),
    ]


def test_a_small_index_leaves_no_file(folder: Path) -> None:
    before = sorted(folder.iterdir())
    index = ShardIndex.load(folder)
    assert sorted(folder.iterdir()) == before
    assert facts(pickle.loads(pickle.dumps(index))) == facts(index)


def test_a_large_index_is_made_once_and_copies_are_small(
    folder: Path, monkeypatch: pytest.MonkeyPatch, any_size: None
) -> None:
    small = pickle.dumps(ShardIndex.load(folder))
    monkeypatch.setattr(index_cache, "SMALL_BYTES", 1 << 20)
    expected = facts(ShardIndex.load(folder))
    assert len(small) < 3000
    assert b"k7" not in small, "no keys"
    made = (folder / TABLE_FILE).stat()
    monkeypatch.setattr(index_cache, "SMALL_BYTES", 0)
    monkeypatch.setattr(index_cache, "parse_index", None)
    assert facts(ShardIndex.load(folder)) == expected
    assert facts(pickle.loads(small)) == expected
    assert (folder / TABLE_FILE).stat() == made
    assert not list(folder.glob(".*")), "no locks are left"


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign", "gone"])
def test_a_damaged_table_is_made_again(folder: Path, damage: str, any_size: None) -> None:
    index = ShardIndex.load(folder)
    expected = facts(index)
    copy = pickle.dumps(index)
    path = folder / TABLE_FILE
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes({"cut": content[:-5], "empty": b"", "foreign": b"something else" * 100}[damage])
    assert facts(ShardIndex.load(folder)) == expected
    assert path.read_bytes() == content
    path.unlink()
    assert facts(pickle.loads(copy)) == expected


def test_a_table_belongs_to_one_index(folder: Path, any_size: None) -> None:
    copy = pickle.dumps(ShardIndex.load(folder))
    index = folder / INDEX_FILE
    changed = json.loads(index.read_text())
    changed["shards"][0]["sha256"] = "0" * 64
    index.write_text(json.dumps(changed))
    assert ShardIndex.load(folder).shards[0].sha256 == "0" * 64
    with pytest.raises(UserError, match="changed while it was in use"):
        pickle.loads(copy)


def test_a_table_lies_in_the_users_folder_where_the_index_cannot_be_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, any_size: None
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    before = sorted(folder.iterdir())
    table = open_table(folder / INDEX_FILE)
    assert isinstance(table, MappedTable)
    assert table.path.is_relative_to(tmp_path / "node")
    assert sorted(folder.iterdir()) == before
    monkeypatch.setattr(index_cache, "parse_index", None)
    assert open_table(folder / INDEX_FILE).keys == table.keys


CHILD = """
import sys
from pathlib import Path
from data_pipeline import index_cache

index_cache.SMALL_BYTES = 0
parse = index_cache.parse_index

def parse_and_tell(file):
    print("parsed", flush=True)
    return parse(file)

index_cache.parse_index = parse_and_tell
assert len(index_cache.open_table(Path(sys.argv[1]))) == 23
"""


def test_one_process_makes_the_table_while_others_wait(folder: Path) -> None:
    children = [
        subprocess.Popen([sys.executable, "-c", CHILD, str(folder / INDEX_FILE)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = [child.communicate()[0] for child in children]
    assert [child.returncode for child in children] == [0, 0, 0]
    assert sorted(said) == ["", "", "parsed\n"]
    assert not list(folder.glob(".*"))


def test_without_locks_two_make_the_table_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, any_size: None
) -> None:
    """Threads, whose process ids are equal, as those of two nodes may be."""
    together = threading.Barrier(2)

    def write_together(file: BinaryIO, *arguments: Any) -> None:
        together.wait(10)
        write_table(file, *arguments)
        together.wait(10)

    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    monkeypatch.setattr(index_cache, "write_table", write_together)
    with ThreadPoolExecutor(2) as pool:
        tables = list(pool.map(open_table, [folder / INDEX_FILE] * 2))
    assert [len(table) for table in tables] == [23, 23]
    assert {path.name for path in folder.glob("*index*")} == {"index.json", "index.bin", ".index.bin.lock"}


def test_the_mapped_arrays_cannot_be_changed(folder: Path, any_size: None) -> None:
    shard_of = ShardIndex.load(folder).shard_of
    assert shard_of.dtype == np.int32
    with pytest.raises(ValueError, match="read-only"):
        shard_of[0] = 1
