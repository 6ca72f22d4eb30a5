"""Credentials of object stores on their way from the launching shell to the ranks: over the input of ssh into a file in
each host's memory that only this user reads, never on a command line, in a log or on a disk.

The launch removes the files at its end; those of a launch that was killed stay until the host starts anew. Standard
library only: `cluster.rank` reads them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from jp_train.cluster.remote import run_on_hosts

MEMORY = Path("/dev/shm")
SENT_S = 30.0
# -C refuses a file that somebody else has laid there, the folder's sticky bit the renaming over one
_STORE = 'umask 077 && set -C && cat > "$1.$$" && mv -f "$1.$$" "$1"'


def file_of(launch_id: str) -> Path:
    """Where they lie on a host."""
    return MEMORY / f"jp_train-{launch_id}"


def hand_over(
    hosts: Sequence[str], launch_id: str, credentials: Mapping[str, str], *, ssh_args: Sequence[str] = ()
) -> dict[str, str]:
    """Store them on every host; {host: cause} of those that do not take them."""
    answers = run_on_hosts(
        hosts, ["sh", "-c", _STORE, "sh", str(file_of(launch_id))],
        timeout_s=SENT_S, ssh_args=ssh_args, text=json.dumps(dict(credentials)),
    )  # fmt: skip
    return {host: answer.summary for host, answer in answers.items() if not answer.ok}


def take_back(hosts: Sequence[str], launch_id: str, *, ssh_args: Sequence[str] = ()) -> None:
    """Remove them from every host that answers."""
    run_on_hosts(hosts, ["rm", "-f", str(file_of(launch_id))], timeout_s=SENT_S, ssh_args=ssh_args)


def received(launch_id: str) -> dict[str, str]:
    """What was handed over to this host by a launch; empty where nothing was, or somebody else laid the file there."""
    try:
        with open(file_of(launch_id), encoding="utf-8") as file:
            if os.fstat(file.fileno()).st_uid != os.geteuid():
                return {}
            return {str(name): str(value) for name, value in json.load(file).items()}
    except FileNotFoundError:
        return {}
