"""Failures of the file system while an index reads its shards."""

import errno
import os
from pathlib import Path
from unittest.mock import Mock

import pytest

from data_pipeline.index import ShardIndex
from data_pipeline.pack import pack
from data_pipeline.skips import MemberError
from tests.data_pipeline.open_files import open_descriptors
from tests.data_pipeline.random_source import RandomSource


@pytest.fixture
def index(tmp_path: Path) -> ShardIndex:
    pack(RandomSource(1), tmp_path)
    return ShardIndex.load(tmp_path)


def test_a_descriptor_that_fails_is_opened_anew(index: ShardIndex, tmp_path: Path) -> None:
    expected = index.read(0, "rgb")
    (descriptor,) = open_descriptors(tmp_path)
    broken = os.open(tmp_path, os.O_RDONLY)  # It fails whenever it is read, like one that a server has forgotten.
    os.dup2(broken, descriptor)
    os.close(broken)
    assert index.read(0, "rgb") == expected
    assert len(open_descriptors(tmp_path)) == 1


def test_a_failure_that_stays_is_a_member_that_cannot_be_read(
    index: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.read(0, "rgb")
    with monkeypatch.context() as patched:
        patched.setattr(os, "pread", Mock(side_effect=OSError(errno.EIO, "Input/output error")))
        with pytest.raises(MemberError, match=r"sample view_0000, member rgb cannot be read: Input/output error"):
            index.read(0, "rgb")
    assert not open_descriptors(tmp_path)
    index.read(0, "rgb")
