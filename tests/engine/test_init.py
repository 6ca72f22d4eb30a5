"""Joining the other ranks: what happens when they do not come."""

from __future__ import annotations

import os
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


def test_a_rank_whose_peers_do_not_come_says_where_it_waited_and_how_long() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = {**os.environ, **place, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, env=environment)
    assert f"rank 1 could not meet the other ranks at 127.0.0.1:{port} within 2 s" in done.stdout, done.stderr[-2000:]
