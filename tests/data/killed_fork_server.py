"""The server that forks the data workers, killed in the middle of its work."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import forkserver

from jp_train.data.processes import worker_context

WAITING = ("_launch", "read_signed")
"""Functions of multiprocessing that wait for the server."""


@contextmanager
def fork_server_killed_at_a_start() -> Iterator[None]:
    """The server dies (SIGKILL) while the main thread waits inside for its first worker."""
    worker_context()
    forkserver.ensure_running()
    server, waiter = forkserver._forkserver._forkserver_pid, threading.get_ident()
    os.kill(server, signal.SIGSTOP)
    over = threading.Event()

    def kill() -> None:
        looks = 0
        while looks < 5 and not over.is_set():
            looks = looks + 1 if sys._current_frames()[waiter].f_code.co_name in WAITING else 0
            time.sleep(0.02)
        os.kill(server, signal.SIGKILL)
        # Until it is gone multiprocessing takes it for alive. Not reaped here: multiprocessing does that.
        with suppress(ChildProcessError):
            os.waitid(os.P_PID, server, os.WEXITED | os.WNOWAIT)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield
    finally:
        over.set()
        killer.join()
