"""The cache of remote shards: its bound, its locks, and what killed processes leave."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.errors import UserError
from data_pipeline.remote.shard_cache import Busy, Full, ShardCache
from data_pipeline.storage import ShardFile
from tests.data_pipeline.shard_server import serve, stall

SIZE = 1000


def content(number: int) -> bytes:
    return number.to_bytes(4, "big") * (SIZE // 4)


def shard(number: int) -> ShardFile:
    return ShardFile(f"{number}.tar", SIZE, hashlib.sha256(content(number)).hexdigest())


def filling(number: int, calls: list[int] | None = None) -> Callable[[int], None]:
    def fill(descriptor: int) -> None:
        if calls is not None:
            calls.append(number)
        assert os.fstat(descriptor).st_size == SIZE, "room is claimed before the first byte"
        os.pwrite(descriptor, content(number), 0)

    return fill


def refuse(descriptor: int) -> None:
    raise UserError("no answer")


def read(cache: ShardCache, number: int, calls: list[int] | None = None) -> bytes:
    descriptor = cache.open(shard(number), filling(number, calls))
    try:
        return os.pread(descriptor, SIZE + 1, 0)
    finally:
        os.close(descriptor)


def used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"lock"}


def test_the_least_recently_used_makes_room(tmp_path: Path) -> None:
    cache, calls = ShardCache(tmp_path / "c", 3 * SIZE + 10), list[int]()
    for number in (0, 1, 2, 0, 3, 0, 1):
        assert read(cache, number, calls) == content(number)
        assert used(tmp_path / "c") <= 3 * SIZE
    assert calls == [0, 1, 2, 3, 1]
    assert cache.evictions == 2
    assert names(tmp_path / "c") == {f"{shard(number).sha256}.tar" for number in (0, 1, 3)}


def test_what_is_held_stays_and_what_is_open_keeps_its_bytes(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 3 * SIZE)
    held = cache.hold(shard(0), filling(0), SIZE)
    opened = cache.open(shard(1), filling(1))
    for number in (2, 3, 4):
        read(cache, number)
    assert cache.holds(shard(0))
    assert not cache.holds(shard(1))
    assert os.pread(opened, SIZE, 0) == content(1)
    assert os.fstat(opened).st_nlink == 0
    os.close(opened)

    second = cache.hold(shard(5), filling(5), SIZE)
    with pytest.raises(Full):
        cache.hold(shard(6), filling(6), SIZE)  # Only the last shard's room is left, which is for others.
    assert read(cache, 6) == content(6)
    os.close(held)
    os.close(cache.hold(shard(7), filling(7), SIZE))
    assert not cache.holds(shard(0))
    os.close(second)


def test_a_shard_must_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"shard 0.tar \(9.31e-07 GiB\) is larger than data.cache_gib 9.3e-07: raise"):
        read(ShardCache(tmp_path, SIZE - 1), 0)
    cache = ShardCache(tmp_path, SIZE)
    held = cache.hold(shard(0), filling(0), 0)
    monkeypatch.setattr("data_pipeline.remote.shard_cache._ROOM_PATIENCE_SECONDS", 0.5)
    with pytest.raises(UserError, match=r"had no room for shard 1.tar .*raise data.cache_gib"):
        read(cache, 1)
    threading.Timer(0.2, os.close, (held,)).start()
    assert read(cache, 1) == content(1)


def test_failures_leave_nothing(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 2 * SIZE)
    for _ in range(3):
        with pytest.raises(UserError, match="no answer"):
            cache.open(shard(0), refuse)
    assert names(tmp_path) == set()
    assert read(cache, 0) == content(0)


def test_one_fetches_and_the_others_wait(tmp_path: Path) -> None:
    cache, calls, going = ShardCache(tmp_path, 2 * SIZE), list[int](), threading.Event()

    def slowly(descriptor: int) -> None:
        calls.append(0)
        going.set()
        time.sleep(0.3)
        os.pwrite(descriptor, content(0), 0)

    found: list[bytes] = []

    def look() -> None:
        descriptor = cache.open(shard(0), slowly)
        found.append(os.pread(descriptor, SIZE, 0))
        os.close(descriptor)

    holder: list[int] = []
    first = threading.Thread(target=lambda: holder.append(cache.hold(shard(0), slowly, 0)))
    first.start()
    going.wait()
    with pytest.raises(Busy):
        cache.hold(shard(0), slowly, 0)
    others = [threading.Thread(target=look) for _ in range(4)]
    for thread in others:
        thread.start()
    for thread in (first, *others):
        thread.join(10)
        assert not thread.is_alive(), "readers do not wait for who holds the shard"
    assert found == [content(0)] * 4
    assert calls == [0]
    os.close(holder[0])


def test_after_a_failure_the_next_in_line_tries(tmp_path: Path) -> None:
    cache, going = ShardCache(tmp_path, 2 * SIZE), threading.Event()

    def fail(descriptor: int) -> None:
        going.set()
        time.sleep(0.2)
        raise UserError("no answer")

    def try_first() -> None:
        with pytest.raises(UserError):
            cache.open(shard(0), fail)

    first = threading.Thread(target=try_first)
    first.start()
    going.wait()
    assert read(cache, 0) == content(0)
    first.join()


def test_a_cut_file_is_fetched_again(tmp_path: Path) -> None:
    cache, calls = ShardCache(tmp_path, 2 * SIZE), list[int]()
    read(cache, 0, calls)
    os.truncate(tmp_path / f"{shard(0).sha256}.tar", 10)
    assert read(cache, 0, calls) == content(0)
    assert calls == [0, 0]


CHILD = """
import os, sys, threading
from pathlib import Path
from data_pipeline.remote.fetching import Fetcher, Patience
from data_pipeline.remote.storage import RemoteStorage
from data_pipeline.storage import ShardFile

url, folder, limit = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
storage = RemoteStorage(url, folder, limit, Fetcher(Patience(stall_seconds=60)))
for text in sys.argv[4:]:
    name, size, sha256 = text.split(":")
    descriptor = storage.open(ShardFile(name, int(size), sha256))
    assert os.fstat(descriptor).st_size == int(size)
    os.close(descriptor)
print(storage.counters.files, flush=True)
"""


def start_child(url: str, folder: Path, limit: int, shards: list[ShardFile]) -> subprocess.Popen[str]:
    texts = [f"{name}:{size}:{sha256}" for name, size, sha256 in shards]
    arguments = [sys.executable, "-c", CHILD, url, str(folder), str(limit), *texts]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)


def serve_shards(folder: Path, count: int) -> list[ShardFile]:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number}.tar").write_bytes(content(number))
    return [shard(number) for number in range(count)]


def test_processes_share_what_each_fetched(tmp_path: Path) -> None:
    shards = serve_shards(tmp_path / "served", 8)
    with serve(tmp_path / "served") as server:
        server.delay_seconds = 0.1
        children = [start_child(server.url, tmp_path / "cache", 8 * SIZE, order) for order in (shards, shards[::-1])]
        fetched = [int(child.communicate(timeout=60)[0]) for child in children]
        assert [child.returncode for child in children] == [0, 0]
        assert sum(fetched) == 8
        assert all(server.requests[f"{number}.tar"] == 1 for number in range(8))
    assert names(tmp_path / "cache" / "shards") == {f"{one.sha256}.tar" for one in shards}


def test_a_killed_process_leaves_no_lock_and_what_it_began_makes_room(tmp_path: Path) -> None:
    shards = serve_shards(tmp_path / "served", 2)
    folder = tmp_path / "cache" / "shards"
    with serve(tmp_path / "served") as server:
        server.faults["0.tar"] = [stall(500)]
        child = start_child(server.url, tmp_path / "cache", SIZE, [shards[0]])
        deadline = time.monotonic() + 60
        while not server.requests["0.tar"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert names(folder) == {f"{shards[0].sha256}.partial"}
        assert used(folder) == SIZE
        # The other shard has room only once the partial file is gone.
        for one in (shards[1], shards[0]):
            after = start_child(server.url, tmp_path / "cache", SIZE, [one])
            assert after.communicate(timeout=60)[0] == "1\n"
            assert names(folder) == {f"{one.sha256}.tar"}
