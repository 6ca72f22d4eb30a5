"""Rank 0 works, the others wait for it for as long as it lives: no collective is open meanwhile, so no timeout of one
runs.

What takes unknown time (an index of any size, a lock whose holder must be watched) would otherwise end a healthy run
after `engine.collective_timeout_s`. The ranks wait at the store by which they met; rank 0 adds to a counter there every
BEAT_S seconds while it works. A rank 0 that is gone takes the store with it, and one whose counter stands still for
SILENT_S seconds counts as gone.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from jp_train.engine.init import Ranks
from jp_train.errors import JpTrainError, LaunchError

BEAT_S = 1.0
"""Seconds between two signs of life of rank 0, and at most between two questions of another rank."""
FIRST_LOOK_S = 0.01
LOOK_S = 0.2
SILENT_S = 120.0
"""Rank 0 without a sign of life for so long (a frozen host, a thread that holds Python's lock) is given up."""

T = TypeVar("T")
_turns = itertools.count()


def main_first(ranks: Ranks, action: Callable[[], T]) -> T:
    """Run `action` on rank 0, then on the others (which find what rank 0 built). Rank 0's JpTrainError is raised on
    every rank. Collective.

    `action` may take as long as it likes on rank 0, and may not run collectives. Raises LaunchError on the others when
    rank 0 is gone.
    """
    results: list[T] = []
    box: list[JpTrainError | None] = [None]
    turn = next(_turns)
    if ranks.is_main:
        with _signs_of_life(ranks, turn):
            try:
                results.append(action())
            except JpTrainError as error:
                box[0] = error
    elif ranks.dp_world_size > 1:
        _await(ranks, turn)
    if ranks.dp_world_size > 1:
        dist.broadcast_object_list(box, src=0)
    if box[0] is not None:
        raise box[0]
    return results[0] if results else action()


def _store() -> PrefixStore:
    return PrefixStore("jp_train/main_first", _get_default_store())


@contextmanager
def _signs_of_life(ranks: Ranks, turn: int) -> Iterator[None]:
    """Count while the block runs, and say when it is over, however it ends."""
    if ranks.dp_world_size == 1:
        yield
        return
    store, over = _store(), threading.Event()

    def count() -> None:
        while not over.wait(BEAT_S):
            with suppress(RuntimeError):
                store.add("alive", 1)

    thread = threading.Thread(target=count, name="signs-of-life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        store.set(f"done{turn}", "")


def _await(ranks: Ranks, turn: int) -> None:
    """Until rank 0 is done. The store is asked by a thread: it may not answer at all when rank 0's host is frozen."""
    store, over, answered = _store(), threading.Event(), threading.Event()
    lost: list[str] = []

    def ask() -> None:
        counted, pause = -1, FIRST_LOOK_S
        try:
            while not over.wait(pause):
                if store.check([f"done{turn}"]):
                    over.set()
                elif (now := store.add("alive", 0)) != counted:
                    counted = now
                    answered.set()
                pause = min(BEAT_S, 2 * pause)
        except RuntimeError as error:
            lost.append(str(error).partition("\n")[0])
            over.set()

    threading.Thread(target=ask, name="await-main", daemon=True).start()
    since = time.monotonic()
    while not over.wait(LOOK_S):
        if answered.is_set():
            answered.clear()
            since = time.monotonic()
        elif time.monotonic() - since > SILENT_S:
            over.set()
            raise _gone(ranks, f"timed out: no sign of life for {SILENT_S:.0f} s")
    if lost:
        raise _gone(ranks, f"connection closed by peer: {lost[0]}")


def _gone(ranks: Ranks, why: str) -> LaunchError:
    return LaunchError(
        f"rank {ranks.dp_rank} waited for rank 0, which is gone ({why}). The output of rank 0 is the cause"
    )
