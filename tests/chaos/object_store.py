"""The object store of a campaign, as a process of its own: shards over http with byte ranges, from a server that can be
stopped, killed and told to misbehave.

    python -m tests.chaos.object_store FOLDER ADDRESS PORT

Serves FOLDER/*/*.tar. A line on stdin holds the names of faults (`tests/data/range_server.py`) for the next GETs, with
commas between; it ends with its input.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.data.range_server import range_server


def main(folder: Path, address: str, port: int) -> None:
    with range_server((address, port)) as server:
        for path in folder.glob("*/*.tar"):
            server.content[f"/{path.relative_to(folder)}"] = path.read_bytes()
        print("ready", flush=True)
        for line in sys.stdin:
            server.faults += line.strip().split(",")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
