"""`python -m jp_train.cluster.probe`: what preflight runs on every host. Reads questions as lines of JSON, answers with
MARK in front of each.

One process does it all, because Python and torch take seconds to start; torch is loaded in the background while the
quick questions are answered. It ends with its input, or when its time is over, whatever it is doing then.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jp_train.cluster.conversation import MARK
from jp_train.cluster.facts import Query, device_count, has_marker, host_facts, remove_marker, write_marker
from jp_train.cluster.reach import Listeners, listen, reach

LIFETIME_S = 300


class Probe:
    """The answers of one host; `torch` is the thread that loads it."""

    def __init__(self) -> None:
        self._listeners = Listeners()
        self._torch: threading.Thread | None = None

    def facts(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """`host_facts`; then torch is loaded in the background if it will be needed."""
        facts = host_facts(
            Query(
                config=question.get("config"),
                overrides=tuple(question.get("overrides", ())),
                run_dir=question.get("run_dir", ""),
                expected_launches=tuple(question.get("expected_launches", ())),
            )
        )
        if question.get("load_torch"):
            self._torch = threading.Thread(target=_load_torch, daemon=True)
            self._torch.start()
        return facts

    def clock(self, _: Mapping[str, Any]) -> dict[str, Any]:
        """Seconds since the epoch, now."""
        return {"time": time.time()}

    def write_marker(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Write the file that the others are to see: its `folder`, or the `error`."""
        try:
            return {"folder": write_marker(Path(question["folder"]), question["name"], question["text"])}
        except OSError as error:
            return {"error": error.strerror or str(error)}

    def has_marker(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Whether the first host's file is here."""
        folder, wait_s = Path(question["folder"]), float(question["wait_s"])
        return {"seen": has_marker(folder, question["name"], question["text"], wait_s=wait_s)}

    def remove_marker(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Remove it."""
        remove_marker(Path(question["folder"]), question["name"])
        return {}

    def listen(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Open the listeners."""
        return listen(self._listeners, gpu=device_count() > 0, master_port=question["master_port"])

    def reach(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Connect to the listeners of the others."""
        return {"failed": reach(question["targets"], timeout_s=float(question["timeout_s"]))}

    def close(self, _: Mapping[str, Any]) -> dict[str, Any]:
        """Close the listeners: the all-reduce needs the master port, and no rank may take the listener there for
        rank 0."""
        self._listeners.close()
        return {}

    def data(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """What this host sees of the data."""
        from jp_train.cluster.data_facts import data_facts

        os.environ.update(question.get("credentials", {}))
        return data_facts(question["config"], question["overrides"], int(question["number"]))

    def bandwidth(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Join the all-reduce."""
        if self._torch is not None:
            self._torch.join()
        from jp_train.cluster.bandwidth import measure

        return measure(
            int(question["rank"]), int(question["world"]), question["address"], int(question["port"]),
            timeout_s=float(question["timeout_s"]), gpu=question["gpu"],
        )  # fmt: skip

    def torch(self, _: Mapping[str, Any]) -> dict[str, Any]:
        """torch as it imports (which may differ from its metadata), with CUDA and NCCL as they run; `broken`: the GPUs
        on which no tensor can be made, and why (a driver older than torch's CUDA still counts them)."""
        if self._torch is not None:
            self._torch.join()
        import torch

        devices = torch.cuda.device_count()
        broken = {}
        for device in range(devices):
            try:
                torch.zeros(1, device=f"cuda:{device}").item()
            except Exception as error:
                broken[str(device)] = str(error).strip().partition("\n")[0]
        build = {"version": str(torch.__version__), "cuda": str(torch.version.cuda or ""), "devices": devices}
        build |= {"broken": broken} if broken else {}
        return build | ({"nccl": ".".join(map(str, torch.cuda.nccl.version()))} if devices else {})


def main() -> int:
    """Answer until the input ends."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    # the kernel's: it ends a process that hangs in C code too
    signal.alarm(int(os.environ.get("JP_TRAIN_PROBE_LIFETIME_S", LIFETIME_S)))
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    probe = Probe()
    lock = threading.Lock()

    def answer(question: dict[str, Any]) -> None:
        try:
            reply = {"id": question["id"], "answer": _handler(probe, question["ask"])(question)}
        except Exception as error:  # the question failed, the host goes on answering
            reply = {"id": question.get("id"), "error": f"{type(error).__name__}: {error}"}
        with lock:
            replies.write(f"{MARK}{json.dumps(reply)}\n")
            replies.flush()

    for line in sys.stdin:
        # in a thread of its own: while one answer hangs in a dead file server, the end of the input is still seen
        threading.Thread(target=answer, args=(json.loads(line),), daemon=True).start()
    os._exit(0)  # threads may be anywhere, also inside a collective; nothing of theirs is worth waiting for


def _handler(probe: Probe, name: str) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    names = (
        "facts", "clock", "write_marker", "has_marker", "remove_marker", "listen", "reach", "close", "data",
        "bandwidth", "torch",
    )  # fmt: skip
    if name not in names:
        raise ValueError(
            f"this host's jp_train does not know the question {name!r}; it knows {', '.join(names)}: "
            "another version of the code"
        )
    return getattr(probe, name)


def _load_torch() -> None:
    try:
        import torch.distributed  # noqa: F401
    except Exception as error:  # the question `torch` reports it
        print(f"probe: torch cannot be loaded: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
