"""An array is made once per node, whatever happens to its file, and nothing stays behind."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from numpy.typing import NDArray

from data_pipeline import node_files
from data_pipeline.node_files import SharedArray, shared_array, user_folder

VALUES = np.arange(1000, dtype=np.int32)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(node_files, "SMALL_BYTES", 0)
    return user_folder()


class Maker:
    """Counts how often the array is made."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> NDArray[np.int32]:
        self.calls += 1
        return VALUES


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def open_array(make: Maker) -> SharedArray:
    shared = shared_array("values", VALUES.nbytes, make)
    np.testing.assert_array_equal(shared.array, VALUES)
    return shared


def test_an_array_is_made_once_and_goes_with_its_last_user(folder: Path) -> None:
    make = Maker()
    one, two = open_array(make), open_array(make)
    assert make.calls == 1
    assert isinstance(one.array, np.memmap)
    assert not one.array.flags.writeable
    assert folder.stat().st_mode & 0o777 == 0o700
    assert names(folder) == ["values.npy"]
    one.close()
    one.close()
    assert names(folder) == ["values.npy"]
    two.close()
    assert names(folder) == []


def test_small_arrays_touch_no_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_files, "SMALL_BYTES", VALUES.nbytes)
    open_array(Maker()).close()
    assert not folder.exists()


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone"])
def test_a_damaged_or_missing_file_is_made_again(folder: Path, damage: str) -> None:
    make = Maker()
    one = open_array(make)
    path = folder / "values.npy"
    if damage == "gone":
        path.unlink()
    elif damage == "flip":
        content = path.read_bytes()
        with path.open("r+b") as file:
            file.seek(500)
            file.write(bytes([content[500] ^ 1]))
    else:
        os.truncate(path, {"cut": 700, "empty": 0}[damage])
    two = open_array(make)
    assert make.calls == 2
    one.close()
    assert names(folder) == ["values.npy"], "the other's file"
    two.close()
    assert names(folder) == []


def test_what_nobody_uses_is_removed(folder: Path) -> None:
    used = open_array(Maker())
    for name in ("old.npy", "old.12.partial", "old.lock"):
        (folder / name).write_bytes(b"left by a process that was killed")
    other = shared_array("other", 1, Maker())
    assert names(folder) == ["other.npy", "values.npy"]
    used.close()
    other.close()


def test_without_a_folder_of_ones_own_the_array_stays_in_memory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.mkdir()
    folder.chmod(0o775)
    assert open_array(Maker()).path is None, "others may write what would be trusted"
    folder.rmdir()
    folder.symlink_to(tmp_path)
    assert open_array(Maker()).path is None, "a link"
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    assert open_array(Maker()).path is None, "no place"


def test_a_folder_of_ones_own_that_others_may_read_is_closed_to_them(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o755)
    open_array(Maker()).close()
    assert folder.stat().st_mode & 0o777 == 0o700


def test_without_space_the_array_stays_in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", fail)
    make = Maker()
    assert open_array(make).path is None
    assert make.calls == 1
    assert names(folder) == []


def test_where_exclusive_locks_need_writable_files_nothing_stays_either(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = fcntl.flock

    def lock_as_nfs_does(file: IO[bytes], operation: int) -> None:
        access = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE
        if (operation & fcntl.LOCK_EX and access == os.O_RDONLY) or (
            operation & fcntl.LOCK_SH and access == os.O_WRONLY
        ):
            raise OSError(errno.EBADF, "Bad file descriptor")
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", lock_as_nfs_does)
    one = open_array(Maker())
    assert not one.array.flags.writeable
    (folder / "old.npy").write_bytes(b"left by a process that was killed")
    two = shared_array("other", 1, Maker())
    assert names(folder) == ["other.npy", "values.npy"]
    one.close()
    two.close()
    assert names(folder) == []


CHILD = """
import sys, time
import numpy as np
from data_pipeline import node_files

node_files.SMALL_BYTES = 0

def make():
    print("made", flush=True)
    time.sleep(0.2)
    return np.arange(1000, dtype=np.int32)

shared = node_files.shared_array("values", 4000, make)
assert (shared.array == np.arange(1000)).all()
print("open", flush=True)
sys.stdin.read()
"""


def start_child() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
    )


def read_until_open(child: subprocess.Popen[str]) -> list[str]:
    assert child.stdout is not None
    lines = []
    while not lines or lines[-1] != "open":
        lines.append(child.stdout.readline().strip())
        assert lines[-1], "the child failed"
    return lines


def test_processes_share_one_array_and_a_killed_one_holds_nothing(folder: Path) -> None:
    children = [start_child() for _ in range(3)]
    try:
        said = [line for child in children for line in read_until_open(child)]
        assert sorted(said) == ["made", "open", "open", "open"]
        children[0].send_signal(signal.SIGKILL)
        children[0].wait()
        children[1].communicate()
        assert names(folder) == ["values.npy"], "one still uses it"
        children[2].send_signal(signal.SIGKILL)
        children[2].wait()
        shared_array("other", 1, Maker()).close()
        assert names(folder) == []
    finally:
        for child in children:
            child.kill()
            child.communicate()
