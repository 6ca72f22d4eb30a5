"""The pool of the offline commands: order, bounded memory, and what is left when a worker or the command ends early."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from functools import partial

import pytest

from jp_train.data.processes import AHEAD, DeadWorkerError, ordered_results, process_state
from jp_train.errors import DataError
from tests.data.killed_fork_server import fork_server_killed_at_a_start


def _square(number, *, slow=(), dies_at=None, fails_at=None):
    """The square and who computed it; the items in `slow` take long, those after them do not."""
    if number == dies_at:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == fails_at:
        raise DataError(f"shard {number} is damaged")
    time.sleep(0.3 if number in slow else 0)
    return number * number, os.getpid()


def _blocked_signals(_):
    """The signals that a worker blocks."""
    return signal.pthread_sigmask(signal.SIG_BLOCK, ())


def _results(items, processes, *, at_least=2, **work):
    pool = ordered_results(
        items, partial(_square, **work), processes, describe=lambda item: f"item {item}", at_least=at_least
    )
    with pool as results:
        return [(item, square, pid) for item, (square, pid) in results]


@pytest.mark.parametrize("processes", [1, 2])
def test_results_come_in_the_order_of_the_items_though_later_ones_are_done_first(processes):
    results = _results(range(12), processes, slow={0, 5})
    assert [(item, square) for item, square, _ in results] == [(n, n * n) for n in range(12)]
    workers = {pid for _, _, pid in results}
    assert workers == {os.getpid()} if processes == 1 else os.getpid() not in workers and len(workers) == 2
    assert not multiprocessing.active_children()


def test_few_items_start_no_process_unless_one_is_demanded():
    assert {pid for _, _, pid in _results([7], 4)} == {os.getpid()}
    assert {pid for _, _, pid in _results(range(4), 4, at_least=5)} == {os.getpid()}
    assert os.getpid() not in {pid for _, _, pid in _results([7], 4, at_least=1)}


def test_no_more_items_are_taken_than_the_processes_need_to_stay_busy():
    taken = []
    with ordered_results(iter(lambda: taken.append(1) or len(taken), 101), _square, 2, describe=str) as results:
        for done, _ in enumerate(results, start=1):
            assert len(taken) <= done + 2 * AHEAD
    assert done == 100


def test_a_killed_worker_is_one_error_that_names_the_oldest_item_without_a_result():
    with pytest.raises(DeadWorkerError, match="died near item 3 .*fewer processes"):
        _results(range(20), 2, dies_at=3, slow={3})
    assert not multiprocessing.active_children()


def test_a_fork_server_that_is_killed_while_it_starts_the_pool_is_the_same_error():
    with fork_server_killed_at_a_start(), pytest.raises(DeadWorkerError, match="died near item 0 .*fewer processes"):
        _results(range(20), 2)
    assert not multiprocessing.active_children()
    assert [square for _, square, _ in _results(range(3), 2)] == [0, 1, 4]


def test_an_error_of_the_work_arrives_as_it_was_raised_with_its_item_noted():
    with pytest.raises(DataError, match="^shard 4 is damaged") as raised:
        _results(range(20), 2, fails_at=4)
    assert str(raised.value) == "shard 4 is damaged"
    if sys.version_info >= (3, 11):
        assert raised.value.__notes__ == ["in a worker process, at item 4"]
    assert not multiprocessing.active_children()


def test_an_interrupt_while_a_worker_is_busy_ends_it_at_once_and_signals_are_blocked_in_it():
    started = time.monotonic()

    def interrupt():
        raise KeyboardInterrupt

    with (
        pytest.raises(KeyboardInterrupt),
        ordered_results([300, 300], time.sleep, 2, describe=str, waiting=interrupt) as results,
    ):
        next(results)
    assert time.monotonic() - started < 60 and not multiprocessing.active_children()
    with ordered_results([0, 1], _blocked_signals, 2, describe=str) as results:
        assert all({signal.SIGINT, signal.SIGTERM, signal.SIGUSR1} <= blocked for _, blocked in results)


def test_the_state_of_a_process_follows_what_is_done_to_it():
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(300,), daemon=True)
    process.start()
    assert process_state(process.pid) == "running"
    os.kill(process.pid, signal.SIGSTOP)
    assert _becomes(process.pid, "stopped")
    process.kill()
    assert _becomes(process.pid, "gone"), "a zombie is gone"
    process.join()
    assert process_state(process.pid) == "gone"


def _becomes(pid, state):
    end = time.monotonic() + 20
    while process_state(pid) != state and time.monotonic() < end:
        time.sleep(0.01)
    return process_state(pid) == state
