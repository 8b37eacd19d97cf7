"""Bytes behind a URL: one attempt to read them, from a given byte on, which fails or goes on but never hangs.

http and https go through the standard library, whose time-outs act on every wait for the network. Any other protocol
(s3, gs, memory, ...) goes through fsspec, in ranges, each watched by a clock of its own.
"""

import base64
import http.client
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import fsspec

from configs.errors import UserError

CHUNK_BYTES = 1 << 20

T = TypeVar("T")

# fsspec's ranges: long enough for a fast line, short enough for a slow one to get through before it counts as stalled.
_RANGE_BYTES = 8 << 20
# A connection that trickles less than this in the time of a stall has stalled.
_TRICKLE_BYTES = 1 << 16

# In the path of a URL that is quoted already, or needs it (RFC 3986, 3.3).
_UNQUOTED = "/%:@!$&'()*+,;=~"

_BUSY = {408, 425, 429}
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}


class TransportError(Exception):
    """An attempt failed.

    Attributes:
        reason: for the user, without the URL.
        lasting: whether another attempt would fail as well.
        absent: whether there is nothing behind the URL.
        after_seconds: the server's wish when to come again.
    """

    def __init__(
        self, reason: str, *, lasting: bool = False, absent: bool = False, after_seconds: float | None = None
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.lasting = lasting
        self.absent = absent
        self.after_seconds = after_seconds


@dataclass(frozen=True)
class Stream:
    """What comes from a URL.

    Attributes:
        start: first byte that comes: the one asked for, or 0 where the server cannot start elsewhere.
        total: bytes of the whole, None where the server does not say.
        version: changes with the content; empty where the server does not say.
        chunks: the bytes; raises TransportError.
    """

    start: int
    total: int | None
    version: str
    chunks: Iterator[bytes]


def join_url(url: str, name: str) -> str:
    """Return the URL of a file in the folder `url`, whose query (a token, say) is kept."""
    parts = urlsplit(url)
    if parts.scheme in ("http", "https"):
        folder = quote(parts.path.rstrip("/"), safe=_UNQUOTED)
        return urlunsplit(parts._replace(path=f"{folder}/{quote(name)}"))
    return f"{url.rstrip('/')}/{name}"


def shown_url(url: str) -> str:
    """Return a URL as messages may show it: without password and query, which may be secret."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def open_stream(url: str, *, start: int = 0, known: str = "", stall_seconds: float) -> Stream | None:
    """Begin to read from byte `start` on; None if the version is still `known`.

    Raises:
        TransportError: no connection, an error status, or no answer for `stall_seconds`.
        UserError: no library for such URLs.
    """
    if urlsplit(url).scheme in ("http", "https"):
        return _open_http(url, start, known, stall_seconds)
    return _open_fsspec(url, start, known, stall_seconds)


def _open_http(url: str, start: int, known: str, stall_seconds: float) -> Stream | None:
    headers = {"User-Agent": "modsquad", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    if known:
        headers["If-None-Match" if '"' in known else "If-Modified-Since"] = known
    try:
        response = urllib.request.urlopen(_request(url, headers), timeout=stall_seconds)
    except urllib.error.HTTPError as error:
        with closing(error):
            if error.code == http.client.NOT_MODIFIED:
                return None
            raise _refusal(error) from None
    except (OSError, http.client.HTTPException) as error:
        raise _fault(error, stall_seconds) from None
    begins = start if response.status == http.client.PARTIAL_CONTENT else 0
    length = response.headers.get("Content-Length")
    return Stream(
        start=begins,
        total=begins + int(length) if length and length.isdecimal() else None,
        version=response.headers.get("ETag") or response.headers.get("Last-Modified") or "",
        chunks=_http_chunks(response, stall_seconds),
    )


def _request(url: str, headers: dict[str, str]) -> urllib.request.Request:
    parts = urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(urlunsplit(parts._replace(netloc=host)), headers=headers)
    if user:
        # Not for whomever the server may send this request on to.
        token = base64.b64encode(unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    return request


def _http_chunks(response: http.client.HTTPResponse, stall_seconds: float) -> Iterator[bytes]:
    with closing(response):
        mark, since = time.monotonic(), 0
        while True:
            try:
                chunk = response.read1(CHUNK_BYTES)
            except (OSError, http.client.HTTPException) as error:
                raise _fault(error, stall_seconds) from None
            if not chunk:
                return
            yield chunk
            since += len(chunk)
            now = time.monotonic()
            if since >= _TRICKLE_BYTES:
                mark, since = now, 0
            elif now - mark > stall_seconds:
                raise TransportError(f"only {since} bytes in {now - mark:.0f} s")


def _refusal(error: urllib.error.HTTPError) -> TransportError:
    """Client errors stay, but for those that say `later`."""
    lasting = error.code < 500 and error.code not in _BUSY
    return TransportError(
        f"HTTP {error.code} {error.reason}".strip(),
        lasting=lasting and error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE,
        absent=error.code in (http.client.NOT_FOUND, http.client.GONE),
        after_seconds=_retry_after(error.headers.get("Retry-After")),
    )


def _retry_after(value: str | None) -> float | None:
    """Read seconds or a date (RFC 9110, 10.2.3)."""
    if not value:
        return None
    try:
        return float(value) if value.strip().isdecimal() else parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, TypeError):
        return None


def _fault(error: Exception, stall_seconds: float) -> TransportError:
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, TimeoutError):
        return TransportError(f"no answer for {stall_seconds:g} s")
    return TransportError(_name(cause), lasting=isinstance(cause, ssl.SSLCertVerificationError))


def _open_fsspec(url: str, start: int, known: str, stall_seconds: float) -> Stream | None:
    def look() -> tuple[Any, str, int, str]:
        system, path = fsspec.core.url_to_fs(url)
        facts = system.info(path)
        return system, path, int(facts["size"]), str(system.ukey(path))

    system, path, total, version = _watched(look, url, stall_seconds)
    if version == known:
        return None

    def chunks() -> Iterator[bytes]:
        for first in range(start, total, _RANGE_BYTES):
            end = min(first + _RANGE_BYTES, total)
            yield _watched(partial(system.cat_file, path, start=first, end=end), url, stall_seconds)

    return Stream(start, total, version, chunks())


def _watched(work: Callable[[], T], url: str, seconds: float) -> T:
    """Return what `work` returns; one that takes longer than `seconds` is left to itself."""
    outcome: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="fetch", daemon=True)
    thread.start()
    thread.join(seconds)
    if outcome:
        return outcome[0]
    if not errors:
        raise TransportError(f"no answer for {seconds:g} s")
    raise _explain(errors[0], url)


def _explain(error: BaseException, url: str) -> Exception:
    scheme = urlsplit(url).scheme
    match error:
        case ImportError():
            package = _PACKAGES.get(scheme)
            advice = f"pip install {package}" if package else str(error)
            return UserError(f"{scheme}:// needs another package to be read: {advice}")
        case ValueError() if "rotocol" in str(error):
            return UserError(f"{shown_url(url)}: there is nothing that reads {scheme}://; give a folder or another URL")
        case FileNotFoundError():
            return TransportError("it does not exist", lasting=True, absent=True)
        case PermissionError():
            return TransportError(f"access denied ({error})", lasting=True)
        case Exception():
            return TransportError(_name(error))
    raise error


def _name(error: object) -> str:
    """Say what an exception of any library says, in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
