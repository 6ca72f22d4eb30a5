"""Worker processes that are safe beside CUDA, threads and signals: started by a fork server, deaf to signals meant
for the trainer."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.context import BaseContext
from pathlib import Path

_PRELOAD = ["jp_train.data.loader", "tokenizers", "sentencepiece"]
"""Imported once by the fork server; workers inherit them. transformers is not among them: a tokenizer is sent to
workers as its content."""
_DEFERRED = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}


def worker_context() -> BaseContext:
    """The start method of every data worker: a fork server that imports torch and the data package once, and nothing of
    the trainer.

    A plain fork would copy a process that holds CUDA and threads. Each worker starts by importing the caller's main
    module, as with `spawn`: entry points keep their heavy imports inside functions.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def end_with_trainer(_worker: int = 0) -> None:
    """Call it first in every worker: the process ends as soon as the one that asked for it is gone, even by SIGKILL.

    A fork server lives as long as its workers, and torch's own check only looks at the fork server, so both would stay
    forever.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_wait_and_exit, args=(parent.sentinel,), name="end-with-trainer", daemon=True).start()


def _wait_and_exit(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Start processes inside: they inherit a mask that blocks SIGINT, SIGTERM and SIGUSR1, so that only the trainer
    answers them.

    A scheduler signals every process of a job; the trainer must still be able to finish its step, which needs its
    workers. A signal that comes while inside is delivered on leaving. Workers end by the loader's `close`, or on seeing
    that the trainer is gone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    resource_tracker.ensure_running()  # starting it unblocks SIGINT and SIGTERM, so it must not happen inside
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _DEFERRED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def kill_workers(pool: ProcessPoolExecutor) -> None:
    """End the processes of a pool at once: an interrupted command must not first read the shards that are under way to
    their end.

    By SIGKILL, because they block other signals; what they write is complete or absent.
    """
    for process in list((pool._processes or {}).values()):  # the executor has no public way before Python 3.14
        process.kill()


def process_state(pid: int) -> str:
    """`running`, `stopped`, `waiting for a disk` or `gone`: a process of this host, from /proc (`running` where
    there is no /proc)."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "gone" if Path("/proc/self").exists() else "running"
    except (OSError, IndexError):
        return "running"
    return {"T": "stopped", "t": "stopped", "D": "waiting for a disk", "Z": "gone", "X": "gone"}.get(letter, "running")
