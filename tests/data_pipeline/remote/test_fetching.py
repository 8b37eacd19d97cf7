"""Fetching from a server that fails in every way that servers do."""

import dataclasses
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from configs.errors import UserError
from data_pipeline.remote.fetching import Cancelled, Fetcher, Patience
from data_pipeline.remote.transport import TransportError, join_url, open_stream, shown_url
from data_pipeline.storage import ShardFile
from tests.data_pipeline.shard_server import (
    Fault,
    ShardServer,
    flip_byte,
    ignore_range,
    reset,
    serve,
    stall,
    status,
    stay_silent,
    trickle,
    truncate,
)

CONTENT = np.random.default_rng(0).bytes(3_000_000)
SHARD = ShardFile("a.tar", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
PATIENCE = Patience(tries=3, first_seconds=0.01, longest_seconds=0.05, stall_seconds=20)
# For servers that stall: short, but not so short that a busy machine's server seems to.
HASTE = dataclasses.replace(PATIENCE, stall_seconds=1)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ShardServer]:
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "a.tar").write_bytes(CONTENT)
    with serve(folder) as server:
        yield server


def fetch(
    server: ShardServer, tmp_path: Path, fetcher: Fetcher, shard: ShardFile = SHARD, stop: threading.Event | None = None
) -> bytes:
    path = tmp_path / "fetched"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        fetcher.fetch_shard(join_url(server.url, shard.name), shard, descriptor, stop or threading.Event())
    finally:
        os.close(descriptor)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("patience", "faults", "starts"),
    [
        (PATIENCE, [], [0]),
        (PATIENCE, [status(500), status(503)], [0, 0, 0]),
        (PATIENCE, [status(408), status(429)], [0, 0, 0]),
        (PATIENCE, [truncate(1_000_000)], [0, 1_000_000]),
        (PATIENCE, [truncate(0), truncate(5)], [0, 0, 5]),
        (HASTE, [stay_silent], [0, 0]),
        (HASTE, [stall(700_000)], [0, 700_000]),
        (PATIENCE, [truncate(2_000_000), ignore_range], [0, 2_000_000]),
        (PATIENCE, [flip_byte(2_999_999)], [0, 0]),
        (PATIENCE, [truncate(1_000_000), flip_byte(2_000_000)], [0, 1_000_000, 0]),
    ],
)
def test_what_passes_is_tried_again_from_where_it_stopped(
    server: ShardServer, tmp_path: Path, patience: Patience, faults: list[Fault], starts: list[int]
) -> None:
    server.faults["a.tar"] = list(faults)
    fetcher = Fetcher(patience)
    assert fetch(server, tmp_path, fetcher) == CONTENT
    assert server.ranges["a.tar"] == starts
    assert fetcher.counters.files == 1
    assert fetcher.counters.retries == len(starts) - 1
    assert fetcher.counters.bytes >= len(CONTENT)


# Of what was sent before a reset, any part may have come: two of them together are not to be all of the file.
@pytest.mark.parametrize(("patience", "fault"), [(PATIENCE, reset(0)), (PATIENCE, reset(1_000_000)), (HASTE, trickle)])
def test_resets_and_trickles(server: ShardServer, tmp_path: Path, patience: Patience, fault: Fault) -> None:
    server.faults["a.tar"] = [fault, fault]
    assert fetch(server, tmp_path, Fetcher(patience)) == CONTENT
    assert server.requests["a.tar"] == 3


@pytest.mark.parametrize(
    ("patience", "faults", "requests", "message"),
    [
        (
            PATIENCE,
            [status(503)] * 9,
            3,
            r"a.tar cannot be fetched: HTTP 503 .* \(3 tries in \d+ s\): see to the server",
        ),
        (HASTE, [stay_silent] * 9, 3, r"a.tar cannot be fetched: no answer for 1 s \(3 tries"),
        (PATIENCE, [truncate(10)] * 9, 3, r"broke off after 30 of 3000000 bytes \(3 tries"),
        (
            PATIENCE,
            [status(403)],
            1,
            r"a.tar cannot be fetched: HTTP 403 Forbidden \(1 try\): correct the URL or its access",
        ),
        (PATIENCE, [status(404)], 1, r"HTTP 404 Not Found \(1 try\)"),
        (
            PATIENCE,
            [flip_byte(7)] * 2,
            2,
            r"shard http://127.*a.tar has another checksum than the index.json .*fetched twice",
        ),
    ],
)
def test_what_stays_is_one_clear_line(
    server: ShardServer, tmp_path: Path, patience: Patience, faults: list[Fault], requests: int, message: str
) -> None:
    server.faults["a.tar"] = list(faults)
    with pytest.raises(UserError, match=message) as caught:
        fetch(server, tmp_path, Fetcher(patience))
    assert "\n" not in str(caught.value)
    assert server.requests["a.tar"] == requests


def test_another_file_is_refused_by_its_size_alone(server: ShardServer, tmp_path: Path) -> None:
    for size in (len(CONTENT) - 1, len(CONTENT) + 1):
        fetcher = Fetcher(PATIENCE)
        with pytest.raises(UserError, match=rf"has 3000000 bytes, but {size} in the index.json"):
            fetch(server, tmp_path, fetcher, SHARD._replace(file_bytes=size))
        assert fetcher.counters.bytes == 0


def test_progress_is_worth_another_try(server: ShardServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.remote.fetching._PROGRESS_BYTES", 200_000)
    server.faults["a.tar"] = [truncate(200_000)] * 14
    assert fetch(server, tmp_path, Fetcher(PATIENCE)) == CONTENT
    assert server.requests["a.tar"] == 15


def test_the_server_says_when_to_come_again(server: ShardServer, tmp_path: Path) -> None:
    server.faults["a.tar"] = [status(429, Retry_After="1")]
    began = time.monotonic()
    fetch(server, tmp_path, Fetcher(Patience(3, 0.01, 30, 20)))
    assert time.monotonic() - began >= 1
    server.faults["a.tar"] = [status(503, Retry_After="3600"), status(503, Retry_After="Mon, 01 Jan 2035 00:00:00 GMT")]
    fetch(server, tmp_path, Fetcher(PATIENCE))
    assert time.monotonic() - began < 30


def test_nobody_waits_for_what_is_not_wanted(server: ShardServer, tmp_path: Path) -> None:
    server.faults["a.tar"] = [status(503)] * 9
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    began = time.monotonic()
    with pytest.raises(Cancelled):
        fetch(server, tmp_path, Fetcher(Patience(9, 60, 60, 20)), stop=stop)
    assert time.monotonic() - began < 30


def test_waits_double_and_differ() -> None:
    patience = Patience(first_seconds=1, longest_seconds=10)
    for failures, longest in ((1, 1), (2, 2), (4, 8), (5, 10), (50, 10)):
        waits = {patience.wait_seconds(failures) for _ in range(20)}
        assert len(waits) == 20
        assert all(longest / 2 <= wait <= longest for wait in waits)


def test_urls_keep_their_tokens_and_messages_do_not_show_them() -> None:
    url = "https://me:secret@host/data set/?token=abc"
    assert join_url(url, "ä b.tar") == "https://me:secret@host/data%20set/%C3%A4%20b.tar?token=abc"
    assert join_url("https://host/data%20set", "a.tar") == "https://host/data%20set/a.tar"
    assert shown_url(url) == "https://host/data set/"
    assert join_url("s3://bucket/folder/", "a b.tar") == "s3://bucket/folder/a b.tar"


def test_a_password_goes_to_the_server_alone(server: ShardServer, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with serve(tmp_path / "other") as other:
        server.faults["a.tar"] = [status(302, Location=join_url(other.url, "b.tar"))]
        with pytest.raises(TransportError, match="HTTP 404"):
            open_stream(join_url(server.url.replace("://", "://me:s%20t@"), "a.tar"), stall_seconds=20)
        assert server.authorizations == ["Basic bWU6cyB0"]
        assert other.authorizations == [None]


def test_a_version_is_told_and_known(server: ShardServer) -> None:
    url = join_url(server.url, "a.tar")
    stream = open_stream(url, stall_seconds=20)
    assert stream is not None
    assert stream.version
    assert stream.total == len(CONTENT)
    assert b"".join(stream.chunks) == CONTENT
    assert open_stream(url, known=stream.version, stall_seconds=20) is None
    (server.folder / "a.tar").write_bytes(b"new")
    changed = open_stream(url, known=stream.version, stall_seconds=20)
    assert changed is not None
    assert b"".join(changed.chunks) == b"new"


def test_nobody_listens(tmp_path: Path) -> None:
    with serve(tmp_path) as server:
        url = server.url
    with pytest.raises(TransportError, match="ConnectionRefusedError") as caught:
        open_stream(url, stall_seconds=20)
    assert not caught.value.lasting


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://bucket/a.tar", r"s3:// needs another package to be read: pip install s3fs"),
        ("nonsense://bucket/a.tar", r"nothing that reads nonsense://"),
    ],
)
def test_urls_that_nothing_reads(url: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_stream(url, stall_seconds=5)


def test_other_protocols_go_through_fsspec(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    monkeypatch.setattr("data_pipeline.remote.transport._RANGE_BYTES", 700_000)
    system = fsspec.filesystem("memory")
    system.pipe_file("/fetching/a.tar", CONTENT)
    stream = open_stream("memory://fetching/a.tar", start=5, stall_seconds=5)
    assert stream is not None
    assert (stream.start, stream.total) == (5, len(CONTENT))
    assert b"".join(stream.chunks) == CONTENT[5:]
    assert open_stream("memory://fetching/a.tar", known=stream.version, stall_seconds=5) is None
    with pytest.raises(TransportError, match="does not exist") as caught:
        open_stream("memory://fetching/none", stall_seconds=5)
    assert caught.value.absent
    assert caught.value.lasting

    monkeypatch.setattr(type(system), "cat_file", lambda *args, **kwargs: time.sleep(5))
    stalled = open_stream("memory://fetching/a.tar", stall_seconds=0.2)
    assert stalled is not None
    with pytest.raises(TransportError, match=r"no answer for 0.2 s"):
        next(stalled.chunks)
