"""What the servers of these tests have in common: HTTP/1.1 without a word on stderr, in threads of this process."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Handler(http.server.BaseHTTPRequestHandler):
    """Subclasses name the type of `state`, the server's own object, which tests read and change."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args: object) -> None:
        pass


class _Quiet(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are what the tests are about."""


@contextmanager
def serving(handler: type[Handler], state: object, address: tuple[str, int] = ("127.0.0.1", 0)) -> Iterator[str]:
    """The URL of a running server whose handlers share `state`."""
    with _Quiet(address, type("Handler", (handler,), {"state": state})) as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield f"http://{address[0]}:{running.server_port}"
        running.shutdown()
