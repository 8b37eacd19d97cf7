"""A packer that dies at any system call that changes the folder goes on to the same bytes when it is started again."""

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from configs.errors import UserError
from data_pipeline.index import ShardIndex
from data_pipeline.pack import pack
from data_pipeline.shards import build_index
from tests.data_pipeline.random_source import FaultySource

KILLED = 77
# What changes the disk, or makes a change last.
CALLS = ("replace", "rename", "unlink", "fsync", "mkdir")


def pack_until(out: Path, fatal: int) -> int:
    """Pack in a forked process that ends at once before its call number `fatal`; return its exit status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            calls = itertools.count()
            replaced: dict[str, Any] = {name: dying(getattr(os, name), calls, fatal) for name in CALLS}
            with mock.patch.multiple("os", **replaced):
                pack(FaultySource(6), out, samples_per_shard=2)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def dying(call: Callable[..., Any], calls: "itertools.count[int]", fatal: int) -> Callable[..., Any]:
    def wrapper(*args: Any, **options: Any) -> Any:
        if next(calls) == fatal:
            os._exit(KILLED)  # No block ends, nothing is cleaned up: as SIGKILL or a loss of power does.
        return call(*args, **options)

    return wrapper


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_packer_killed_at_any_moment_goes_on(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    pack(FaultySource(6), whole, samples_per_shard=2)
    expected = {path.name: path.read_bytes() for path in whole.iterdir()}
    statuses = []
    for fatal in itertools.count():
        out = tmp_path / f"out{fatal}"
        statuses.append(pack_until(out, fatal))
        if (out / "index.json").exists():
            ShardIndex.load(out)  # An index stands for a whole folder.
            assert (out / "problems.jsonl").read_bytes() == expected["problems.jsonl"]
        elif out.exists():
            with pytest.raises(UserError):
                ShardIndex.load(out)
            with pytest.raises(UserError):
                build_index(out)
        assert pack(FaultySource(6), out, samples_per_shard=2).samples == 4
        assert {path.name: path.read_bytes() for path in out.iterdir()} == expected
        if statuses[-1] == 0:
            break
    assert set(statuses[:-1]) == {KILLED}
    assert len(statuses) > 20, "three shards, three notes, problems, index: each with several calls"
