"""A web server for a folder of shards, which fails where a test asks it to."""

import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

# What goes wrong with one answer: gets the handler, the body and the first byte asked for; True: it has answered.
Fault = Callable[["_Handler", bytes, int], bool]


class ShardServer(ThreadingHTTPServer):
    """Serves `folder`; answers are counted, and faults strike once each, in order.

    Attributes:
        folder: what is served.
        faults: file name -> faults of the next answers.
        requests: file name -> answers begun.
        ranges: file name -> first bytes asked for.
        authorizations: of the requests.
        delay_seconds: before each answer.
        validators: whether answers have ETags.
        release: ends answers that stall.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.faults: dict[str, list[Fault]] = {}
        self.requests: Counter[str] = Counter()
        self.ranges: dict[str, list[int]] = {}
        self.authorizations: list[str | None] = []
        self.delay_seconds = 0.0
        self.validators = True
        self.release = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serve(folder: Path) -> Iterator[ShardServer]:
    with ShardServer(folder) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.release.set()
            server.shutdown()
            thread.join()


def status(code: int, **headers: str) -> Fault:
    """Answer with an error."""

    def answer(handler: "_Handler", body: bytes, start: int) -> bool:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return True

    return answer


def truncate(count: int) -> Fault:
    """End the connection after `count` bytes of the body."""

    def answer(handler: "_Handler", body: bytes, start: int) -> bool:
        handler.begin(body, start)
        handler.wfile.write(body[start:][:count])
        return True

    return answer


def stall(count: int) -> Fault:
    """Send `count` bytes of the body, then nothing, and keep the connection."""

    def answer(handler: "_Handler", body: bytes, start: int) -> bool:
        truncate(count)(handler, body, start)
        handler.wfile.flush()
        handler.server.release.wait(60)
        return True

    return answer


def stay_silent(handler: "_Handler", body: bytes, start: int) -> bool:
    """Never answer."""
    handler.server.release.wait(60)
    return True


def trickle(handler: "_Handler", body: bytes, start: int) -> bool:
    """Send a byte now and then."""
    handler.begin(body, start)
    for place in range(start, len(body)):
        handler.wfile.write(body[place : place + 1])
        handler.wfile.flush()
        if handler.server.release.wait(0.05):
            break
    return True


def reset(count: int) -> Fault:
    """Reset the connection after `count` bytes."""

    def answer(handler: "_Handler", body: bytes, start: int) -> bool:
        truncate(count)(handler, body, start)
        handler.wfile.flush()
        # Closing with this option sends RST.
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()
        return True

    return answer


def ignore_range(handler: "_Handler", body: bytes, start: int) -> bool:
    """Send all, whatever part was asked for."""
    handler.begin(body, 0)
    handler.wfile.write(body)
    return True


def flip_byte(place: int) -> Fault:
    """Send another byte than the file has."""

    def answer(handler: "_Handler", body: bytes, start: int) -> bool:
        changed = bytearray(body)
        changed[place] ^= 1
        handler.begin(body, start)
        handler.wfile.write(changed[start:])
        return True

    return answer


class _Handler(BaseHTTPRequestHandler):
    server: ShardServer

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].lstrip("/")
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.server.requests[name] += 1
        self.server.authorizations.append(self.headers.get("Authorization"))
        self.server.ranges.setdefault(name, []).append(start)
        if self.server.delay_seconds:
            self.server.release.wait(self.server.delay_seconds)
        path = self.server.folder / name
        if not path.is_file():
            status(404)(self, b"", 0)
            return
        body = path.read_bytes()
        faults = self.server.faults.get(name, [])
        try:
            if faults and faults.pop(0)(self, body, start):
                self.close_connection = True
            elif self.server.validators and self.headers.get("If-None-Match") == self.etag(path):
                status(304)(self, b"", 0)
            else:
                self.begin(body, start)
                self.wfile.write(body[start:])
        except (ConnectionError, ValueError):
            self.close_connection = True  # The client, or a fault, has closed it.

    def begin(self, body: bytes, start: int) -> None:
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        if self.server.validators:
            self.send_header("ETag", self.etag(self.server.folder / self.path.partition("?")[0].lstrip("/")))
        self.end_headers()

    def etag(self, path: Path) -> str:
        return f'"{path.stat().st_mtime_ns}-{path.stat().st_size}"'

    def log_message(self, *args: object) -> None:
        pass
