"""A file from a URL, as often tried as it makes sense, and checked against what the index says of it.

What failed on the way is tried again from the byte it had come to, after a wait that doubles each time and is drawn at
random, so that many machines do not come back together. What cannot get better by waiting is not tried again.
"""

import hashlib
import os
import random
import threading
import time
from dataclasses import dataclass, field, fields
from typing import Any

from configs.errors import UserError
from data_pipeline.remote.transport import Stream, TransportError, open_stream, shown_url
from data_pipeline.storage import ShardFile

# An attempt that brought at least so much is worth another one, however many went before.
_PROGRESS_BYTES = 8 << 20


@dataclass(frozen=True)
class Patience:
    """How long a fetch goes on.

    Attributes:
        tries: attempts in a row that brought next to nothing.
        first_seconds, longest_seconds: the wait after the first of them, and its upper limit.
        stall_seconds: silence after which an attempt has failed.
    """

    tries: int = 8
    first_seconds: float = 0.5
    longest_seconds: float = 30.0
    stall_seconds: float = 30.0

    def wait_seconds(self, failures: int) -> float:
        """Return how long to wait after so many failures in a row: between half and all of the doubled time."""
        longest = min(self.longest_seconds, self.first_seconds * 2.0 ** (failures - 1))
        return longest * random.uniform(0.5, 1.0)


@dataclass
class FetchCounters:
    """What this process did to get at remote shards; safe to count from several threads.

    Attributes:
        bytes: received.
        files: fetched whole.
        retries: attempts after a failed one.
        hits, misses: shards that were in the cache when they were opened for reading, or were not.
        wait_seconds: time that reading waited for shards.
    """

    bytes: int = 0
    files: int = 0
    retries: int = 0
    hits: int = 0
    misses: int = 0
    wait_seconds: float = 0.0
    _lock: Any = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, **amounts: float) -> None:
        """Add to the attributes named."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)

    def to_dict(self) -> dict[str, float]:
        """Return the counts by name."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self) if not entry.name.startswith("_")}

    def __reduce__(self) -> tuple[type["FetchCounters"], tuple[()]]:
        """A copy in another process counts from zero."""
        return FetchCounters, ()


class Cancelled(Exception):
    """Nobody wants the file any more."""


class Absent(Exception):
    """There is no such file."""


@dataclass(frozen=True)
class Fetcher:
    """Fetches files.

    Attributes:
        patience: with failing servers.
        counters: of this process.
    """

    patience: Patience = Patience()
    counters: FetchCounters = field(default_factory=FetchCounters)

    def fetch_shard(self, url: str, shard: ShardFile, file: int, stop: threading.Event) -> None:
        """Write a shard to the descriptor `file`, from its first byte on.

        Raises:
            UserError: it cannot be had, or does not belong to the index.
            Cancelled: `stop` was set.
        """
        download = _Download(url, file, self, stop, shard.file_bytes)
        for last in (False, True):
            download.run()
            if download.written == shard.file_bytes and download.digest.hexdigest() == shard.sha256:
                self.counters.add(files=1)
                return
            if not last:
                self.counters.add(retries=1)
                download.restart()
        what = (
            "has another checksum than"
            if download.written == shard.file_bytes
            else f"has {download.total or download.written} bytes, but {shard.file_bytes} in"
        )
        raise UserError(
            f"shard {shown_url(url)} {what} the index.json beside it (fetched twice): shard and index do not belong "
            "together, publish both again"
        )

    def fetch_file(self, url: str, file: int, known: str) -> str | None:
        """Write a small file to the descriptor `file`, and return its version; None if that is still `known`.

        Raises:
            UserError: it cannot be had.
            Absent: there is none.
        """
        download = _Download(url, file, self, threading.Event(), None, known)
        download.run()
        if download.version is not None:
            self.counters.add(files=1)
        return download.version


class _Download:
    """One file on its way: what came so far stays when an attempt fails."""

    def __init__(
        self, url: str, file: int, fetcher: Fetcher, stop: threading.Event, size: int | None, known: str = ""
    ) -> None:
        self._url = url
        self._file = file
        self._patience = fetcher.patience
        self._counters = fetcher.counters
        self._stop = stop
        self._size = size
        self._known = known
        self.version: str | None = None
        self.total: int | None = None
        self.restart()

    def restart(self) -> None:
        """Forget what came."""
        self.written = 0
        self.digest = hashlib.sha256()

    def run(self) -> None:
        """Try until all is there, or until it makes no sense any more."""
        failures, tries, began = 0, 0, time.monotonic()
        while True:
            before, tries = self.written, tries + 1
            try:
                return self._attempt()
            except TransportError as error:
                if error.absent and self._size is None:
                    raise Absent from None
                failures = 1 if self.written - before >= _PROGRESS_BYTES else failures + 1
                if error.lasting or failures >= self._patience.tries:
                    raise UserError(self._gave_up(error, tries, time.monotonic() - began)) from None
                wait = self._patience.wait_seconds(failures)
                if error.after_seconds is not None:
                    wait = min(max(wait, error.after_seconds), self._patience.longest_seconds)
                if self._stop.wait(wait):
                    raise Cancelled from None
                self._counters.add(retries=1)

    def _attempt(self) -> None:
        stream = open_stream(
            self._url, start=self.written, known=self._known, stall_seconds=self._patience.stall_seconds
        )
        if stream is None:
            return
        if stream.start != self.written or (self.version and stream.version != self.version):
            # The server cannot go on in the middle, or the file is another by now.
            self.restart()
            if stream.start:
                raise TransportError("the file changed meanwhile")
        self.version, self.total = stream.version, stream.total
        if self._size is not None and stream.total not in (None, self._size):
            return  # Another file: its bytes are of no use.
        self._write(stream)
        missing = (stream.total if self._size is None else self._size) or self.written
        if self.written < missing:
            raise TransportError(f"the connection broke off after {self.written} of {missing} bytes")

    def _write(self, stream: Stream) -> None:
        for chunk in stream.chunks:
            if self._stop.is_set():
                raise Cancelled
            if self._size is not None and self.written + len(chunk) > self._size:
                self.written += len(chunk)  # More than the index says: the caller refuses it.
                return
            os.pwrite(self._file, chunk, self.written)
            self.digest.update(chunk)
            self.written += len(chunk)
            self._counters.add(bytes=len(chunk))

    def _gave_up(self, error: TransportError, tries: int, seconds: float) -> str:
        often = "1 try" if tries == 1 else f"{tries} tries in {seconds:.0f} s"
        advice = "correct the URL or its access rights" if error.lasting else "see to the server or the network"
        return (
            f"{shown_url(self._url)} cannot be fetched: {error.reason} ({often}): {advice}, or copy the shards to a "
            "local folder"
        )
