"""A real HTTP server with byte ranges, that can be told to misbehave."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.data.local_server import Handler, serving


class RangeServer:
    """`content` by path; `faults`: names taken one per GET, in order; `length`: what Content-Length says instead;
    counts of requests and connections."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}
        self.faults: list[str] = []
        self.etag = '"v1"'
        self.location = ""
        self.length: str | None = None
        self.requests = 0
        self.connections = 0
        self.headers: list[dict[str, str]] = []
        self.url = ""


class _Handler(Handler):
    state: RangeServer

    def setup(self) -> None:
        super().setup()
        self.state.connections += 1

    def do_HEAD(self) -> None:  # noqa: N802 - the name that http.server calls
        data = self.state.content.get(self.path)
        if data is None:
            self._send(404, b"", body=False)
        else:
            self._send(200, data, body=False)

    def do_GET(self) -> None:  # noqa: N802 - the name that http.server calls
        state = self.state
        state.requests += 1
        state.headers.append(dict(self.headers))
        fault = state.faults.pop(0) if state.faults else ""
        data = state.content[self.path]
        first, last = (int(part) for part in self.headers["Range"].removeprefix("bytes=").split("-"))
        part, span = data[first : last + 1], f"bytes {first}-{last}/{len(data)}"
        match fault:
            case "":
                self._send(206, part, span)
            case "503" | "429" | "403" | "404" | "416":
                self._send(int(fault), b"busy")
            case "no ranges":
                self._send(200, data)
            case "redirect":
                self._send(302, b"", location=state.location)
            case "wrong range":
                self._send(206, part, f"bytes {first + 1}-{last + 1}/{len(data)}")
            case "no range header":
                self._send(206, part)
            case "other size":
                self._send(206, part, f"bytes {first}-{last}/{len(data) + 1}")
            case "too much":
                self._send(206, part + b"!!", span)
            case "gzip":
                self._send(206, part, span, coding="gzip")
            case "short":
                self._send(206, part[:-3], span)
            case "cut":  # promises the whole, closes half-way
                self._head(206, len(part), span)
                self.wfile.write(part[: len(part) // 2])
                self.close_connection = True
            case "reset" | "early reset":
                if fault == "reset":
                    self._head(206, len(part), span)
                    self.wfile.write(part[: len(part) // 2])
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True
            case "idle close":
                self._send(206, part, span)
                self.close_connection = True
            case "dribble" | "dribbled head":
                self.close_connection = True
                if fault == "dribble":
                    self._head(206, len(part), span)
                else:
                    self.wfile.write(b"HTTP/1.1 206 ")
                for byte in part if fault == "dribble" else b"x" * len(part):
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.02)
            case _:
                raise AssertionError(fault)

    def _head(self, status: int, length: int, span: str = "", location: str = "", coding: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length) if self.state.length is None else self.state.length)
        self.send_header("ETag", self.state.etag)
        for name, value in (("Content-Range", span), ("Location", location), ("Content-Encoding", coding)):
            if value:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.flush()

    def _send(
        self, status: int, data: bytes, span: str = "", *, body: bool = True, location: str = "", coding: str = ""
    ) -> None:
        self._head(status, len(data), span, location, coding)
        if body:
            self.wfile.write(data)


@contextmanager
def range_server(address: tuple[str, int] = ("127.0.0.1", 0)) -> Iterator[RangeServer]:
    state = RangeServer()
    with serving(_Handler, state, address) as state.url:
        yield state
