"""Byte ranges over http(s): kept-alive connections, a bound on every whole read, and strict checks of what the server
answers.

A socket's time-out starts again with each packet, so a server that sends one byte per minute could hold a loader worker
for days. Here every receive gets only the remaining time of the whole read. Redirects are followed to http(s) only,
never from https down to http.
"""

from __future__ import annotations

import http.client
import io
import os
import re
import socket
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jp_train.data.hub import WHO_READS, hub_request, is_hub
from jp_train.errors import DataError

HTTP_TIMEOUT_S = 60.0
"""Longest silence of a server."""
SLOWEST_BYTES_PER_S = 256 << 10
"""A read may take HTTP_TIMEOUT_S plus its size at this rate; then it is tried again."""
MAX_REDIRECTS = 5

_CHUNK = 1 << 20
_UNESCAPED = "/%:@!$&'()*+,;=~"
_EXPIRED = (401, 403, 404, 410)
_REDIRECTS = (301, 302, 303, 307, 308)
_LENGTH = re.compile(r"[0-9]{1,18}")
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)")


class HttpStatusError(OSError):
    """The server answered with an unexpected status."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"HTTP status {code} {reason}")
        self.code = code


@dataclass(frozen=True, slots=True)
class Answered:
    """What is known of a file: `size` in bytes and a `stamp` that changes with it (ETag, else Last-Modified, else
    empty)."""

    size: int
    stamp: str


class HttpRanges:
    """Ranges of http(s) files, one kept-alive connection per thread and server. Safe to use from threads and after a
    fork.

    Every method raises OSError or http.client.HTTPException for errors worth a retry, and DataError for lasting ones.
    """

    def __init__(self) -> None:
        self._local = threading.local()
        self._sent_to: dict[str, str] = {}
        """Where the hub has sent the reads of a file: it counts the requests of each user, the servers behind it do
        not."""

    def stat(self, url: str) -> Answered:
        """Size and stamp, by a HEAD request; of the hub, whose links are signed for GET, by reading a byte."""
        hub = is_hub(url)
        method, headers, good = ("GET", {"Range": "bytes=0-0"}, 206) if hub else ("HEAD", {}, 200)
        with self._answer(method, url, headers, HTTP_TIMEOUT_S) as answer:
            if answer.status != good:
                raise _refusal(url, answer)
            answer.read()  # at most a byte, but http.client keeps the connection only after it
            length = answer.headers.get("Content-Length")
            if hub:
                length = answer.headers.get("Content-Range", "").rpartition("/")[2]
            if length is None or not _LENGTH.fullmatch(length.strip()):
                raise DataError(
                    f"shard {url}: the server sends no usable Content-Length; jp_train needs a server that answers "
                    "byte-range requests"
                )
            return Answered(size=int(length), stamp=_stamp(answer))

    def read(self, url: str, offset: int, size: int, *, file_size: int, stamp: str) -> bytes:
        """Exactly `size` bytes from `offset` of a file that is known by its size and stamp."""
        if size == 0:
            return b""
        limit = HTTP_TIMEOUT_S + size / SLOWEST_BYTES_PER_S
        with self._answer("GET", url, {"Range": f"bytes={offset}-{offset + size - 1}"}, limit) as answer:
            if answer.status == 200:
                raise DataError(
                    f"shard {url}: the server answered a byte-range request with status 200 instead of 206; serve the "
                    "shards from a server with range support, or copy them to a local disk"
                )
            if answer.status != 206:
                raise _refusal(url, answer)
            now = _stamp(answer)
            if now != stamp:
                raise DataError(
                    f"shard {url} changed since it was indexed ({stamp!r} became {now!r}); start again to index it anew"
                )
            _check_range(url, answer, offset, size, file_size)
            data = bytearray()
            while len(data) < size:
                chunk = answer.read1(min(_CHUNK, size - len(data)))
                if not chunk:
                    raise OSError(f"the server sent {len(data)} bytes of {size}")
                data += chunk
            if answer.read(1):  # also lets http.client see the end, so that the connection can be used again
                raise OSError(f"the server sent more than the {size} bytes of the range")
            return bytes(data)

    def close(self) -> None:
        """Close this thread's connections."""
        for connection in self._connections().values():
            connection.close()
        self._connections().clear()

    def __reduce__(self) -> tuple[Any, ...]:
        return (HttpRanges, ())

    def _connections(self) -> dict[tuple[str, str], _Connection]:
        """This thread's connections by scheme and server; those inherited through a fork are forgotten."""
        if getattr(self._local, "pid", None) != os.getpid():
            self._local.pid, self._local.open = os.getpid(), {}
        return self._local.open

    @contextmanager
    def _answer(
        self, method: str, url: str, headers: dict[str, str], limit_s: float
    ) -> Iterator[http.client.HTTPResponse]:
        """The final answer, after redirects. A connection is kept only when its answer was read to the end."""
        deadline = time.monotonic() + limit_s
        hub = is_hub(url)
        first, who = hub_request(url) if hub else (url, {})
        at = self._sent_to.get(url, first)
        for _ in range(MAX_REDIRECTS + 1):
            server = _server(at)
            shown = who if server == _server(first) else {}  # a token is for the hub alone
            connection, answer = self._ask(method, at, {**headers, **shown}, deadline)
            try:
                target = answer.headers.get("Location") if answer.status in _REDIRECTS else None
                if target is None and answer.status in _EXPIRED and self._sent_to.pop(url, ""):
                    at = first
                    continue
                if target is None:
                    if hub and at != first:
                        self._sent_to[url] = at
                    yield answer
                    return
                at = _redirected(url, at, target)
            finally:
                if not answer.isclosed():
                    connection.close()
                    self._connections().pop(server, None)
        raise DataError(f"shard {url}: more than {MAX_REDIRECTS} redirects, the last to {at}")

    def _ask(
        self, method: str, url: str, headers: dict[str, str], deadline: float
    ) -> tuple[_Connection, http.client.HTTPResponse]:
        open_here, server = self._connections(), _server(url)
        connection = open_here.get(server)
        reused = connection is not None and connection.sock is not None
        if connection is None:
            connection = open_here[server] = _connect(url)
        connection.deadline = deadline
        target = _target(url, connection.absolute)
        headers = {"User-Agent": "jp_train", **headers}
        try:
            try:
                connection.request(method, target, headers=headers)
                return connection, connection.getresponse()
            except (http.client.RemoteDisconnected, http.client.CannotSendRequest, ConnectionError, BrokenPipeError):
                connection.close()
                if not reused:
                    raise
                # the server had closed the idle connection: not a fault
                connection.request(method, target, headers=headers)
                return connection, connection.getresponse()
        except BaseException as error:
            connection.close()
            open_here.pop(server, None)
            if isinstance(error, UnicodeError):  # a host that has no DNS name
                raise DataError(f"shard {url}: this URL cannot be asked for: {error}") from None
            raise


class _Connection(http.client.HTTPConnection):
    """A connection whose every receive is bounded by `deadline` (time.monotonic seconds)."""

    deadline = 0.0
    absolute = False
    """Whether requests name the whole URL, as a proxy wants it."""

    def connect(self) -> None:
        self.timeout = _left(self.deadline)
        super().connect()
        self.sock = _BoundedSocket(self.sock, self)


class _SecureConnection(_Connection, http.client.HTTPSConnection):
    pass


class _BoundedSocket:
    """What http.client needs of a socket; receives go through `_BoundedReader`."""

    def __init__(self, plain: socket.socket, connection: _Connection) -> None:
        self._plain, self._connection = plain, connection

    def sendall(self, data: bytes) -> None:
        self._plain.settimeout(_left(self._connection.deadline))
        self._plain.sendall(data)

    def makefile(self, *_: object) -> io.BufferedReader:
        return io.BufferedReader(_BoundedReader(self._plain, self._connection), 1 << 16)

    def close(self) -> None:
        self._plain.close()


class _BoundedReader(io.RawIOBase):
    """The receiving side; it keeps the socket open until it is closed itself, as http.client expects of `makefile`."""

    def __init__(self, plain: socket.socket, connection: _Connection) -> None:
        self._plain, self._connection = plain, connection
        self._raw = plain.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:  # any writable buffer, which has no public type before 3.12
        self._plain.settimeout(_left(self._connection.deadline))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the server is too slow: the time of one whole read is over")
    return min(left, HTTP_TIMEOUT_S)


def _connect(url: str) -> _Connection:
    """A connection for `url`, through the proxy of the environment (http_proxy, https_proxy, no_proxy) where there
    is one."""
    parts = urllib.parse.urlsplit(url)
    try:
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise DataError(f"shard {url}: {error}") from None
    secure = parts.scheme == "https"
    proxy = urllib.request.getproxies().get(parts.scheme)
    kind = _SecureConnection if secure else _Connection
    if not proxy or urllib.request.proxy_bypass(parts.netloc):
        return kind(host, port)
    via = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    connection = kind(via.hostname or "", via.port)
    if secure:
        connection.set_tunnel(host, port)
    connection.absolute = not secure
    return connection


def _server(url: str) -> tuple[str, str]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.netloc


def _target(url: str, absolute: bool) -> str:
    """What the request line names: path and query, or the whole URL for a proxy; spaces and the like are escaped."""
    parts = urllib.parse.urlsplit(url)
    path = urllib.parse.quote(parts.path or "/", safe=_UNESCAPED)
    path += f"?{urllib.parse.quote(parts.query, safe=_UNESCAPED + '?[]')}" if parts.query else ""
    return f"{parts.scheme}://{parts.netloc}{path}" if absolute else path


def _redirected(url: str, here: str, target: str) -> str:
    try:
        location = urllib.parse.urljoin(here, target)
        scheme = urllib.parse.urlsplit(location).scheme
    except ValueError as error:
        raise DataError(f"shard {url}: the server redirects to {target[:200]!r}, which is no URL: {error}") from None
    if scheme not in ("http", "https") or (scheme == "http" and here.startswith("https:")):
        raise DataError(
            f"shard {url}: the server redirects to {location[:200]!r}; only http and https are followed, and never "
            "from https to http"
        )
    return location


def _refusal(url: str, answer: http.client.HTTPResponse) -> HttpStatusError:
    hint = f" ({WHO_READS})" if is_hub(url) and answer.status in _EXPIRED else ""
    return HttpStatusError(answer.status, f"{answer.reason}{hint}")


def _stamp(answer: http.client.HTTPResponse) -> str:
    return answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""


def _check_range(url: str, answer: http.client.HTTPResponse, offset: int, size: int, file_size: int) -> None:
    if (coding := answer.headers.get("Content-Encoding", "identity")) != "identity":
        raise DataError(
            f"shard {url}: the server sends the range with Content-Encoding {coding!r}; serve tars as they are"
        )
    given = answer.headers.get("Content-Range", "")
    match = _CONTENT_RANGE.fullmatch(given.strip())
    if match is None or (int(match[1]), int(match[2])) != (offset, offset + size - 1):
        raise OSError(f"the server answered bytes {offset}-{offset + size - 1} with Content-Range {given!r}")
    if match[3] not in ("*", str(file_size)):
        raise DataError(
            f"shard {url} changed since it was indexed (it had {file_size} bytes, now {match[3]}); start again to "
            "index it anew"
        )
