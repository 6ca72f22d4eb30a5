"""What reading a data set needs of the Hugging Face Hub: its tree, and links to another server that expire."""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.data.local_server import Handler, serving
from tests.data.range_server import RangeServer, range_server

REPOSITORY, TOKEN = "datasets/lab/set", "hf_ofAReaderOfThisSet"


@dataclass
class Hub:
    """A gated data set whose revision `main` has `files`; their content comes from `cdn`."""

    cdn: RangeServer
    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    links: int = 0


class _Handler(Handler):
    state: Hub

    def do_GET(self) -> None:  # noqa: N802 - the name that http.server calls
        hub, path = self.state, urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        hub.requests.append(path)
        tree, resolve = f"/api/{REPOSITORY}/tree/main", f"/{REPOSITORY}/resolve/main/"
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, b"{}", {"X-Error-Code": "GatedRepo"})
        elif path.startswith(tree):
            below = path[len(tree) :].strip("/")
            deep = "recursive=true" in self.path.lower()
            names = [name for name in hub.files if deep or name.rpartition("/")[0] == below]
            entries = [
                {"type": "file", "path": name, "size": len(hub.files[name]), "oid": "0"}
                for name in names
                if not below or name.startswith(f"{below}/")
            ]
            self._send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})
        elif path.startswith(resolve) and (data := hub.files.get(path[len(resolve) :])) is not None:
            hub.links += 1
            hub.cdn.content[f"/blob?Signature={hub.links}"] = data
            self._send(302, b"", {"Location": f"{hub.cdn.url}/blob?Signature={hub.links}"})
        else:
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def hub_server() -> Iterator[Hub]:
    with range_server() as cdn:
        hub = Hub(cdn)
        with serving(_Handler, hub) as hub.url:
            yield hub
