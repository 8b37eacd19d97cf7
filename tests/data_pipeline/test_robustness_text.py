"""Text files with binary damage: one line that names the file, or the same content; never a traceback."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from configs.load import load_config
from data_pipeline.index import ShardIndex
from data_pipeline.pack import pack
from data_pipeline.source import JOB_FILE, PROBLEMS_FILE, Problem, format_problems, read_facts, read_problems
from data_pipeline.sources.matlab import load_variable
from data_pipeline.sources.taskonomy_splits import read_split
from tests.data_pipeline.random_source import RandomSource

SETTINGS = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

PROBLEMS = (Problem("a", "normal", "it is grey", "a.png"), Problem("é b", "", "no image"))
FACTS = json.dumps({"source": "x", "samples": 4, "facts": ["split tiny", "é"]}).encode()
SPLIT = b"id,train,val,test\rhouse,1,0,0\rcabin,0,1,0\rbarn,0,0,1\r"
RECIPE = b"tasks: [normal]\ntrain: {steps: 50}\n"

READERS: list[tuple[str, bytes, Callable[[Path], Any]]] = [
    (PROBLEMS_FILE, format_problems(PROBLEMS).encode(), lambda path: read_problems(path.parent)),
    (JOB_FILE, FACTS, lambda path: read_facts(path.parent)),
    ("train_val_test_tiny.csv", SPLIT, lambda path: read_split(path, "tiny", "train")),
    ("recipe.yaml", RECIPE, load_config),
]
DAMAGE = [
    b"\xff",
    b"\xff\xfe\0",
    b"\0" * 40,
    b"[" * 3000,
    b"9" * 5000,
    b"{}",
    b"\xed\xa0\x80",
    b'"',
    b"\n",
    b"- &a [*a]",
]
every_reader = pytest.mark.parametrize(("name", "good", "read"), READERS, ids=[name for name, *_ in READERS])


def read_or_refuse(read: Callable[[Path], Any], path: Path) -> Any:
    """None for one clear line; any other exception fails the test."""
    try:
        return read(path)
    except UserError as error:
        message = str(error)
    assert "\n" not in message
    assert path.name in message
    return None


@every_reader
def test_good_files_are_read(tmp_path: Path, name: str, good: bytes, read: Callable[[Path], Any]) -> None:
    (tmp_path / name).write_bytes(good)
    assert read_or_refuse(read, tmp_path / name)


@every_reader
@pytest.mark.parametrize("damage", DAMAGE)
def test_files_of_something_else_are_named(
    tmp_path: Path, name: str, good: bytes, read: Callable[[Path], Any], damage: bytes
) -> None:
    for content in (damage, damage + good, good + damage, b""):
        (tmp_path / name).write_bytes(content)
        read_or_refuse(read, tmp_path / name)


@every_reader
@SETTINGS
@given(data=st.data())
def test_damaged_files_are_named(
    tmp_path: Path, name: str, good: bytes, read: Callable[[Path], Any], data: st.DataObject
) -> None:
    damaged = bytearray(good)
    place = data.draw(st.integers(0, len(good) - 1))
    if data.draw(st.booleans()):
        damaged[place] ^= 1 << data.draw(st.integers(0, 7))
    else:
        damaged[place : place + data.draw(st.integers(0, 20))] = data.draw(st.binary(max_size=20))
    (tmp_path / name).write_bytes(damaged)
    read_or_refuse(read, tmp_path / name)


@pytest.mark.parametrize("damage", [b"\xff", b"[" * 3000, b"9" * 5000])
@pytest.mark.parametrize("start", [0, 1])
def test_a_damaged_index_is_named(tmp_path: Path, damage: bytes, start: int) -> None:
    pack(RandomSource(2), tmp_path)
    path = tmp_path / "index.json"
    good = path.read_bytes()
    opening = good.index(b'"shards":[') + 10
    for place in (start, opening + start, opening + 60 + start):
        path.write_bytes(good[:place] + damage + good[place:])
        with pytest.raises(UserError, match=r"index.json") as caught:
            ShardIndex.load(tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", [b"", b"\xff", b"[" * 3000, b"{}", b"7", b'{"entry": 7, "problems": []}'])
def test_a_damaged_note_of_a_packing_is_made_anew(tmp_path: Path, damage: bytes) -> None:
    out = tmp_path / "out"
    with mock.patch("data_pipeline.pack._finish", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        pack(RandomSource(4), out, samples_per_shard=2)
    note = out / "shard-000001.tar.entry.json"
    assert note.is_file()
    note.write_bytes(damage)
    assert pack(RandomSource(4), out, samples_per_shard=2).samples == 4
    pack(RandomSource(4), tmp_path / "whole", samples_per_shard=2)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes()


@SETTINGS
@given(content=st.binary(max_size=300), head=st.sampled_from([b"", b"MATLAB 5.0".ljust(124) + b"\0\1IM"]))
def test_random_matlab_files_are_refused(content: bytes, head: bytes) -> None:
    with pytest.raises(UserError) as caught:
        load_variable(head + content, "x")
    assert "\n" not in str(caught.value)
