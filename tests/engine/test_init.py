"""Joining the other ranks: what happens when they do not come."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys

SCRIPT = """
from jp_train.config import RunConfig
from jp_train.engine.init import init_process_group
from jp_train.errors import LaunchError

cfg = RunConfig()
cfg.engine.collective_timeout_s = 2.0
try:
    init_process_group(cfg)
except LaunchError as error:
    print(error)
"""


def joined(rank: int, port: int) -> str:
    """What a rank of two prints that is to meet the other one there."""
    place = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = {**os.environ, **place, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, env=environment)
    return done.stdout + done.stderr[-2000:]


def test_a_rank_whose_peers_do_not_come_says_where_it_waited_and_how_long() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    told = joined(1, port)
    seconds = re.search(rf"rank 1 did not meet the other ranks at 127.0.0.1:{port} in (\d+) s", told)
    assert seconds and 2 <= int(seconds[1]) < 60, told


def test_a_port_that_another_process_has_taken_is_named_with_the_option_that_gives_another_one() -> None:
    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen()
        port = busy.getsockname()[1]
        told = joined(0, port)
    assert f"port {port} of {socket.gethostname()} is in use by another process" in told and "--master-port" in told
