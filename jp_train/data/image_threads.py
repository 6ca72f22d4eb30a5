"""The images of a row in a few threads of the process that builds it. PIL lets others run while it decodes and
resizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class ImageThreads:
    """Maps in `threads` threads (`data.image_threads`); with 1, in the caller's thread, one item whenever the next
    result is requested.

    The threads start with the first work, so that an object may be made before its process forks, and end with `close`.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool: ThreadPoolExecutor | None = None

    def map(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """The results in the order of the items, whichever is done first. An exception of `work` is raised in its
        item's place; work that has not begun by then is cancelled."""
        if self._threads == 1:
            return map(work, items)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="images")
        return self._pool.map(work, items)

    def close(self) -> None:
        """End the threads, after the images they are working on. Safe to call twice; `map` starts new ones."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(cancel_futures=True)
