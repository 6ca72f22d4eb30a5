"""Worker processes that are safe beside CUDA, threads and signals: a fork server starts them, and they ignore the
signals meant for the trainer. `ordered_results` is the pool of the offline commands; the loader has torch's."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import chain, islice
from multiprocessing import resource_tracker
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, TypeVar

from jp_train.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 3
"""Items that wait, are worked on or have a result that was not taken yet, per process."""
_TICK_S = 0.5

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
    """Call it first in every worker: the process ends as soon as its parent is gone, even by SIGKILL.

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


class DeadWorkerError(DataError):
    """A process ended without a result for an item: killed for memory, or by a crash in a library."""


@contextmanager
def ordered_results(
    items: Iterable[Item],
    work: Callable[[Item], Result],
    processes: int,
    *,
    describe: Callable[[Item], str],
    at_least: int = 2,
    waiting: Callable[[], None] = lambda: None,
) -> Iterator[Iterator[tuple[Item, Result]]]:
    """Iterate inside over (item, result) of every item, in the order of the items, made by `processes` processes;
    with one process or fewer than `at_least` items, by this one.

    `work` is pickled once per process. At most AHEAD items per process are taken from `items` before their results
    are. `waiting` is called twice a second while the next result is not there. However the block is left, no process
    stays: an exception in it (Ctrl-C) kills them at once; what they write must be complete or absent.

    Raises DeadWorkerError when a process dies; an exception of `work` arrives unchanged, with the item as a note
    (from Python 3.11 on).
    """
    source = iter(items)
    first = list(islice(source, at_least))
    source = chain(first, source)
    if processes <= 1 or len(first) < at_least:
        yield ((item, work(item)) for item in source)
        return
    pool = ProcessPoolExecutor(processes, mp_context=worker_context(), initializer=_start_worker, initargs=(work,))
    try:
        yield _taken_in_order(source, pool, processes * AHEAD, describe, waiting)
    except BaseException:
        # By SIGKILL, because workers block other signals. The executor has no public way before Python 3.14.
        for process in list((pool._processes or {}).values()):
            process.kill()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _taken_in_order(
    source: Iterator[Item],
    pool: ProcessPoolExecutor,
    at_once: int,
    describe: Callable[[Item], str],
    waiting: Callable[[], None],
) -> Iterator[tuple[Item, Any]]:
    pending: deque[tuple[Item, Future[Any]]] = deque()
    while True:
        for item in islice(source, at_once - len(pending)):
            future: Future[Any]
            try:
                with signals_deferred():  # the pool starts its processes as work comes in
                    future = pool.submit(_run_in_worker, item)
            # OSError, EOFError: a process, or the server that forks them, is gone before it has started.
            # Reported below, with the oldest item that has no result.
            except (BrokenProcessPool, OSError, EOFError) as error:
                future = Future()
                future.set_exception(BrokenProcessPool(str(error) or type(error).__name__))
            pending.append((item, future))
        if not pending:
            return
        item, future = pending.popleft()
        while not wait([future], _TICK_S).done:
            waiting()
        try:
            result = future.result()
        except BrokenProcessPool as error:
            raise DeadWorkerError(
                f"a worker process died near {describe(item)} (killed for memory, or a library crashed). Use fewer "
                "processes, or 1 to see the cause; what is finished is kept"
            ) from error
        except Exception as error:
            if sys.version_info >= (3, 11):
                error.add_note(f"in a worker process, at {describe(item)}")
            raise
        yield item, result


_work: Callable[[Any], Any] | None = None


def _start_worker(work: Callable[[Any], Any]) -> None:
    global _work
    end_with_trainer()
    _work = work


def _run_in_worker(item: object) -> Any:
    assert _work is not None
    return _work(item)


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
