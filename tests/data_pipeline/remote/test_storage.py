"""Training from a URL: the batches of the local folder, from a cache that is always small enough."""

import os
import pickle
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from configs.errors import UserError
from configs.schema import DataConfig
from configs.tasks import resolve_tasks
from data_pipeline.batch import Batch
from data_pipeline.check import check_shards
from data_pipeline.cursor import Cursor
from data_pipeline.loader import EvaluationLoader, TrainLoader
from data_pipeline.node_files import private_folder
from data_pipeline.pack import pack
from data_pipeline.places import default_cache_folder, open_storage
from data_pipeline.remote.read_ahead import ReadAhead
from data_pipeline.remote.storage import RemoteStorage
from data_pipeline.shards import INDEX_FILE, ShardIndex
from tests.data_pipeline.open_files import open_files
from tests.data_pipeline.random_source import RandomSource
from tests.data_pipeline.shard_server import ShardServer, flip_byte, serve, stall, status, truncate

SHARDS = 24
SAMPLES = 24 * 10
WINDOW = 3
TASKS = resolve_tasks(["depth_zbuffer", "normal", "class_scene"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    pack(RandomSource(SAMPLES), folder, samples_per_shard=SAMPLES // SHARDS)
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[ShardServer]:
    with serve(folder) as server:
        yield server


def config(cache: Path, shards: float, folder: Path, workers: int = 0) -> DataConfig:
    """A cache with room for so many shards."""
    gib = shards * max(path.stat().st_size for path in folder.glob("*.tar")) / 2**30
    return DataConfig(
        cache_dir=str(cache), cache_gib=gib, workers=workers, shuffle_window_shards=WINDOW, tasks_per_image=1
    )


def train_loader(
    place: Path | str, data: DataConfig, *, steps: int = 8, rank: int = 0, world: int = 1, cursor: Cursor | None = None
) -> TrainLoader:
    index = ShardIndex.load(place, data)
    return TrainLoader(
        index,
        data,
        TASKS,
        images_per_step=8,
        micro_batch=4,
        rank=rank,
        world=world,
        seed=3,
        cursor=cursor or Cursor.start(index, 3),
        steps=steps,
    )


def assert_equal(found: Batch, expected: Batch) -> None:
    assert found.keys == expected.keys
    assert found.images.equal(expected.images)
    assert found.labels.keys() == expected.labels.keys()
    assert all(torch.equal(found.labels[name], label) for name, label in expected.labels.items())


def shards_in(cache: Path) -> int:
    return len(list((cache / "shards").glob("*.tar")))


@contextmanager
def watched(folder: Path, most: list[int]) -> Iterator[None]:
    """Measure the folder all the time."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            sizes = 0
            for path in list(folder.glob("*")):
                try:
                    sizes += path.stat().st_size
                except FileNotFoundError:
                    continue
            most.append(sizes)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_folder_and_the_cache_stays_small(
    server: ShardServer, folder: Path, tmp_path: Path, workers: int
) -> None:
    data = config(tmp_path, 11, folder, workers)
    steps = 2 * SAMPLES // 8
    most: list[int] = []
    with watched(tmp_path / "shards", most):
        remote = list(train_loader(server.url, data, steps=steps))
    local = list(train_loader(folder, data, steps=steps))
    assert len(remote) == len(local) == 2 * steps
    for found, expected in zip(remote, local, strict=True):
        assert_equal(found, expected)
    assert max(most) <= data.cache_gib * 2**30
    assert max(most) > 6 * data.cache_gib * 2**30 / 11
    # Two epochs: no shard twice in one of them.
    counts = [server.requests[path.name] for path in folder.glob("*.tar")]
    assert len(counts) == SHARDS
    assert all(1 <= count <= 2 for count in counts)
    assert sum(counts) < 2 * SHARDS, "what is still there at the end of an epoch is not fetched again"


def test_a_large_cache_fetches_once(server: ShardServer, folder: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert len(list(train_loader(server.url, config(tmp_path, 100, folder), steps=60))) == 120
    assert set(server.requests.values()) == {1, 2}
    assert server.requests.pop(INDEX_FILE) == 2
    assert set(server.requests.values()) == {1}


def test_shards_come_before_they_are_needed(server: ShardServer, folder: Path, tmp_path: Path) -> None:
    server.delay_seconds = 0.02
    loader = train_loader(server.url, config(tmp_path, 12, folder), steps=30)
    storage = loader._index.storage
    assert isinstance(storage, RemoteStorage)
    batches = iter(loader)
    next(batches)
    misses = storage.counters.misses
    # Room for 12 is 7 ahead of what has been read; the last of 4 samples per batch come when all is fetched.
    for read in range(4, 160, 4):
        deadline = time.monotonic() + 10
        while storage.counters.files < read * SHARDS // SAMPLES + 7:
            assert time.monotonic() < deadline, "nothing is fetched ahead"
            time.sleep(0.001)
        next(batches)
    assert storage.counters.misses == misses
    loader.close()
    assert next(batches, None) is None


def test_what_is_in_use_is_never_removed(server: ShardServer, folder: Path, tmp_path: Path) -> None:
    data = config(tmp_path, 9, folder)
    loader = train_loader(server.url, data, steps=60)
    storage = loader._index.storage
    assert isinstance(storage, RemoteStorage)
    files = [tmp_path / "shards" / f"{shard.sha256}.tar" for shard in loader._index.shards]
    plan, shard_of = loader.plan, loader._index.shard_of
    before: set[int] = set()
    for number, _ in enumerate(loader):
        coming = set(shard_of[plan.samples(number * 4, 16)].tolist())
        present = {shard for shard in coming if files[shard].exists()}
        assert before & coming <= present
        before = present
    assert storage.cache.evictions > 0


def test_a_cache_smaller_than_the_window_is_refused(server: ShardServer, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"data.cache_gib .* is too small: shuffling .* takes \d.\d\d at a time"
    ) as caught:
        train_loader(server.url, config(tmp_path, 5, folder))
    assert "\n" not in str(caught.value)
    assert train_loader(folder, config(tmp_path, 5, folder))


def test_ranks_share_the_cache(server: ShardServer, folder: Path, tmp_path: Path) -> None:
    data = config(tmp_path, 12, folder)
    loaders = [iter(train_loader(server.url, data, rank=rank, world=2, steps=30)) for rank in range(2)]
    local = [iter(train_loader(folder, data, rank=rank, world=2, steps=30)) for rank in range(2)]
    for _ in range(30):
        for found, expected in zip(loaders, local, strict=True):
            assert_equal(next(found), next(expected))
    tars = {path.name for path in folder.glob("*.tar")}
    assert {server.requests[name] for name in tars} == {1}


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_from_a_url(server: ShardServer, folder: Path, tmp_path: Path, workers: int) -> None:
    def batches(place: Path | str) -> list[Batch]:
        index = ShardIndex.load(place, config(tmp_path, 3, folder))
        return list(EvaluationLoader(index, TASKS, batch_size=7, rank=0, world=1, limit=100, workers=workers))

    for found, expected in zip(batches(server.url), batches(folder), strict=True):
        assert_equal(found, expected)
    assert shards_in(tmp_path) <= 3


def test_a_run_goes_on_from_another_place(server: ShardServer, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    data = config(tmp_path / "cache", 20, folder)
    whole = [batch.keys for batch in train_loader(folder, data, steps=10)]
    cursor = Cursor.start(ShardIndex.load(folder), 3)
    assert cursor == Cursor.start(ShardIndex.load(server.url, data), 3)
    parts = []
    for number, place in enumerate((server.url, tmp_path / "copy", server.url, folder, server.url)):
        parts += train_loader(place, data, steps=2, cursor=cursor.advanced(16 * number))
    assert [batch.keys for batch in parts] == whole


def test_a_flaky_server_changes_nothing(server: ShardServer, folder: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in folder.glob("*.tar"))
    faults = [status(500), truncate(100), flip_byte(1000), status(503, Retry_After="0")]
    server.faults = {name: [faults[number % 4]] for number, name in enumerate(names)}
    server.faults[INDEX_FILE] = [truncate(50), status(502)]
    data = config(tmp_path, 100, folder)
    for found, expected in zip(train_loader(server.url, data), train_loader(folder, data), strict=True):
        assert_equal(found, expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_cannot_be_had_is_one_clear_line(
    server: ShardServer, folder: Path, tmp_path: Path, workers: int
) -> None:
    server.faults = {path.name: [status(403)] * 99 for path in folder.glob("*.tar")}
    with pytest.raises(UserError, match=r"http://.*shard-\d+.tar cannot be fetched: HTTP 403") as caught:
        list(train_loader(server.url, config(tmp_path, 100, folder, workers)))
    assert "\n" not in str(caught.value)


def test_index_and_shards_that_do_not_belong_together(server: ShardServer, folder: Path, tmp_path: Path) -> None:
    name = sorted(path.name for path in folder.glob("*.tar"))[0]
    server.faults[name] = [flip_byte(5)] * 99
    index = ShardIndex.load(server.url, config(tmp_path, 9, folder))
    with pytest.raises(UserError, match=rf"shard .*{name} has another checksum than the index.json beside it"):
        index.read(0, "rgb")
    assert shards_in(tmp_path) == 0


def test_the_index_is_fetched_again_when_it_changed(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "served")
    data = config(tmp_path / "cache", 9, folder)
    with serve(tmp_path / "served") as server:
        first = ShardIndex.load(server.url, data)
        received = first.storage.counters.bytes  # type: ignore[attr-defined]
        assert received > 0
        again = ShardIndex.load(server.url, data)
        assert again.storage.counters.bytes == 0  # type: ignore[attr-defined]
        assert again.fingerprint == first.fingerprint

        shutil.rmtree(tmp_path / "served")
        pack(RandomSource(5), tmp_path / "served")
        assert len(ShardIndex.load(server.url, data)) == 5
        server.validators = False
        assert len(ShardIndex.load(server.url, data)) == 5
        (tmp_path / "served" / INDEX_FILE).unlink()
        with pytest.raises(UserError, match=r"http://.*/index.json does not exist: give the URL of a folder of shards"):
            ShardIndex.load(server.url, data)


def test_any_protocol_of_fsspec(folder: Path, tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    system.put(str(folder), "/anywhere/train", recursive=True)
    index = ShardIndex.load("memory://anywhere/train", config(tmp_path, 9, folder))
    local = ShardIndex.load(f"file://{folder}")
    assert index.fingerprint == local.fingerprint
    assert index.where(0, "rgb").startswith("shard memory://anywhere/train/shard-")
    for sample in (0, SAMPLES - 1):
        assert index.read(sample, "rgb") == local.read(sample, "rgb")
    with pytest.raises(UserError, match=r"memory://nowhere/index.json does not exist"):
        ShardIndex.load("memory://nowhere", config(tmp_path, 9, folder))


def test_check_of_a_url_compares_what_is_cached_too(
    server: ShardServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    report = check_shards(server.url)
    expected = check_shards(folder)
    assert report.place == server.url
    assert (report.samples, report.tasks, report.problems) == (SAMPLES, expected.tasks, expected.problems)
    cached = next((default_cache_folder() / "shards").glob("*.tar"))
    data = bytearray(cached.read_bytes())
    data[700] ^= 1
    cached.write_bytes(data)
    assert check_shards(server.url).tasks == expected.tasks
    assert Counter(server.requests[path.name] for path in folder.glob("*.tar")) == {1: SHARDS - 1, 2: 1}


def test_copies_of_the_storage_work_and_count_for_themselves(server: ShardServer, folder: Path, tmp_path: Path) -> None:
    index = ShardIndex.load(server.url, config(tmp_path, 9, folder))
    first = index.read(0, "rgb")
    copy = pickle.loads(pickle.dumps(index))
    assert copy.read(0, "rgb") == first
    assert (index.storage.counters.misses, copy.storage.counters.hits) == (1, 1)  # type: ignore[attr-defined]


def test_evicted_shards_give_their_room_back(server: ShardServer, folder: Path, tmp_path: Path) -> None:
    index = ShardIndex.load(server.url, config(tmp_path, 2, folder))
    for sample in range(0, SAMPLES, SAMPLES // SHARDS):
        index.read(sample, "rgb")
        assert 1 <= len(open_files(tmp_path / "shards")) <= 3
    index.close()
    assert not open_files(tmp_path / "shards")


def test_reading_ahead_ends_with_the_loader(server: ShardServer, folder: Path, tmp_path: Path) -> None:
    server.faults = {path.name: [stall(100)] * 9 for path in folder.glob("*.tar")}
    index = ShardIndex.load(server.url, config(tmp_path, 9, folder))
    before = set(threading.enumerate())

    def readers() -> list[threading.Thread]:
        return [thread for thread in set(threading.enumerate()) - before if thread.name == "read-ahead"]

    with ReadAhead(index, lambda first, count: np.arange(first, first + count), start=0, end=99, cycle=99) as ahead:
        ahead.advance(0, 8)
        time.sleep(0.1)
        assert readers()
    server.release.set()
    deadline = time.monotonic() + 10
    while readers():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not list((tmp_path / "shards").glob("*.partial"))


def test_the_cache_in_tmpdir_keeps_it_a_folder_of_this_user_alone(
    server: ShardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    before = os.umask(0o002)
    try:
        assert open_storage(server.url, DataConfig()).find(INDEX_FILE) is not None
    finally:
        os.umask(before)
    assert default_cache_folder().stat().st_mode & 0o777 == 0o700
    assert private_folder() == default_cache_folder(), "the ranks of the node share arrays in it"


def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/scratch")
    assert default_cache_folder() == Path(f"/scratch/modsquad-{os.getuid()}")
    monkeypatch.delenv("TMPDIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert default_cache_folder() == Path("/caches/modsquad")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_folder() == Path.home() / ".cache" / "modsquad"
    assert open_storage("file:///a%20b", DataConfig()).place == "/a b"
    assert open_storage("s3://bucket/a", DataConfig()).place == "s3://bucket/a"
    with pytest.raises(UserError, match=r"http://\[bad is not a URL"):
        open_storage("http://[bad", DataConfig())
