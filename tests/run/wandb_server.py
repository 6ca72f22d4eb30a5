"""A stand-in for wandb's server: keeps runs by id as the real one does (config, history lines by offset), or refuses
them. wandb's own client talks to it over HTTP.

    python -m tests.run.wandb_server ADDRESS PORT

serves until its input ends. A line on stdin is the HTTP status of every answer from then on; 200: all is well again.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789" * 4


class Server(ThreadingHTTPServer):
    """`answer`: None, or (status, body) of every answer, or a pause: the server takes requests and never answers.
    `runs`: {run id: {history line number: values}}."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int] = ("127.0.0.1", 0)) -> None:
        self.runs: dict[str, dict[int, dict[str, Any]]] = {}
        self.configs: dict[str, str] = {}
        self.exit_codes: dict[str, int] = {}
        self.answer: tuple[int, bytes] | threading.Event | None = None
        super().__init__(address, Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no news."""

    @property
    def url(self) -> str:
        return f"http://{self.server_address[0]}:{self.server_port}"

    def steps(self, run: str) -> list[int]:
        """The values of `step` in the order of the curve."""
        return [values["step"] for _, values in sorted(self.runs[run].items()) if "step" in values]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if isinstance(self.server.answer, threading.Event):
            self.server.answer.wait()
        status, reply = self.server.answer if isinstance(self.server.answer, tuple) else (200, self._reply(body))
        self.send_response(status)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *args: object) -> None:
        pass

    do_GET = do_PUT = do_POST  # noqa: N815

    def _reply(self, body: bytes) -> bytes:
        if self.path.endswith("/file_stream"):
            *_, run, _ = self.path.split("/")
            request = json.loads(body)
            if request.get("complete"):
                self.server.exit_codes[run] = request.get("exitcode")
            for name, part in request.get("files", {}).items():
                if name == "wandb-history.jsonl":
                    for number, line in enumerate(part["content"], start=part["offset"]):
                        self.server.runs[run][number] = json.loads(line)
            return b"{}"
        if not self.path.endswith("/graphql"):
            return b"{}"
        request = json.loads(body)
        return json.dumps({"data": self._data(request["query"], request.get("variables") or {})}).encode()

    def _data(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables.get("name", "")
        known = self.server.runs.get(name)
        if "mutation UpsertBucket" in query:
            self.server.runs.setdefault(name, {})
            self.server.configs[name] = variables.get("config") or self.server.configs.get(name, "{}")
            project = {"name": variables.get("project"), "entity": {"name": "someone"}}
            bucket = {"id": name, "name": name, "displayName": name, "sweepName": None, "project": project}
            return {
                "upsertBucket": {"bucket": bucket | {"historyLineCount": len(known or {})}, "inserted": known is None}
            }
        if "query RunResumeStatus" in query:
            last = json.dumps(known[max(known)] if known else {})
            bucket = {
                "id": name,
                "name": name,
                "summaryMetrics": last,
                "displayName": name,
                "logLineCount": 0,
                "historyLineCount": len(known or {}),
                "eventsLineCount": 0,
                "historyTail": json.dumps([last] if known else []),
                "eventsTail": "[]",
                "config": self.server.configs.get(name),
                "tags": [],
                "notes": None,
                "wandbConfig": json.dumps({"t": 1}),
            }
            return {
                "model": {
                    "id": "p",
                    "name": "p",
                    "entity": {"id": "e", "name": "someone"},
                    "bucket": bucket if known else None,
                }
            }
        if "mutation CreateRunFiles" in query:
            files = [{"name": file, "uploadUrl": f"{self.server.url}/upload"} for file in variables["files"]]
            return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}
        return {}


@contextmanager
def serving(address: tuple[str, int] = ("127.0.0.1", 0)) -> Iterator[Server]:
    server = Server(address)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    with serving((sys.argv[1], int(sys.argv[2]))) as running:
        print("ready", flush=True)
        for line in sys.stdin:
            status = int(line)
            running.answer = None if status == 200 else (status, b"{}")
