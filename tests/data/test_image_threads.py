"""Pictures decoded in threads make the same rows, in bounded memory, and no thread outlives its loader."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from jp_train.config.batch import batch_plan
from jp_train.data.image_threads import ImageThreads
from jp_train.data.index import index_sources
from jp_train.data.ledger import Ledger
from jp_train.data.loader import StepLoader, build_plan
from jp_train.data.rows import RowBuilder
from jp_train.errors import DataError
from jp_train.types import PackedBatch

STEPS = 6
BROKEN = frozenset({f"g{number:04d}" for number in range(0, 25, 4)} | {"u0001", "u0005", "u0010"})

INTERRUPTED = """
import threading, time
from jp_train.data.image_threads import ImageThreads
threads = ImageThreads(2)
def work(number):
    if number == 2:
        print("working", flush=True)
    time.sleep(0.2)
try:
    list(threads.map(work, range(10_000)))
except KeyboardInterrupt:
    threads.close()
    left = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    print("left", left, flush=True)
"""


def picture_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("images")]


def steps_and_ledger(
    cfg, tokenizer, folder, *, workers: int, threads: int
) -> tuple[list[object], list[dict[str, object]]]:
    """Every tensor and every provenance of the first steps, bit for bit, and the ledger's entries without their
    time."""
    cfg.data.workers, cfg.data.image_threads, cfg.data.skip_minimum = workers, threads, 1000
    indexes, batch = index_sources(cfg, tokenizer), batch_plan(cfg, 1)
    ledger, tensors = Ledger(folder, cfg), []
    with StepLoader(
        cfg,
        build_plan(cfg, indexes, batch, tokenizer),
        indexes,
        tokenizer,
        dp_rank=0,
        dp_world_size=1,
        batch_plan=batch,
    ) as loader:
        for item in itertools.islice(loader, STEPS):
            for micro in item.micro_batches:
                values = [getattr(micro, name) for name in PackedBatch.__slots__]
                tensors += [
                    value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value) for value in values
                ]
            ledger.record(
                [skip for micro in item.micro_batches for skip in micro.skipped], item.used_per_source, item.step
            )
        assert len(picture_threads()) <= (threads if threads > 1 and not workers else 0)
    assert not picture_threads()
    entries = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    return tensors, [{key: value for key, value in entry.items() if key != "time"} for entry in entries]


def test_rows_and_ledger_are_the_same_however_many_threads(mixed, tokenizer, tmp_path):
    cfg = mixed(BROKEN)
    expected = steps_and_ledger(cfg, tokenizer, tmp_path / "alone", workers=0, threads=1)
    assert len(expected[1]) >= 3
    for workers, threads in ((0, 2), (0, 5), (1, 2)):
        assert (
            steps_and_ledger(cfg, tokenizer, tmp_path / f"{workers}x{threads}", workers=workers, threads=threads)
            == expected
        )


def test_an_error_that_stops_the_run_is_the_first_in_the_row_not_the_first_in_time(mixed, tokenizer, monkeypatch):
    cfg = mixed()
    cfg.data.image_threads = 4
    indexes, batch = index_sources(cfg, tokenizer), batch_plan(cfg, 1)
    specs = build_plan(cfg, indexes, batch, tokenizer).next_step()
    builder = RowBuilder(cfg, [index.locator for index in indexes], tokenizer)
    with_pictures = max(specs, key=lambda spec: len(builder.build(spec).gen_images))
    order = iter(range(100))

    def broken(*_arguments, **_options):
        number = next(order)
        time.sleep(0.2 if number == 0 else 0)
        raise DataError(f"out of memory at picture {number}")

    monkeypatch.setattr(builder._encoder, "image", broken)
    with pytest.raises(DataError, match="picture 0"):
        builder.build(with_pictures)
    builder.close()
    assert not picture_threads()


def test_results_come_in_the_order_of_the_items_and_no_more_than_the_threads_work_at_once():
    threads, lock = ImageThreads(3), threading.Lock()
    at_work, most = 0, 0

    def work(number: int) -> int:
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
        time.sleep(0.01 * (5 - number % 5))
        with lock:
            at_work -= 1
        return number

    assert list(threads.map(work, range(20))) == list(range(20))
    assert 2 <= most <= 3
    threads.close()
    threads.close()
    assert not picture_threads()
    assert list(threads.map(work, range(3))) == [0, 1, 2]
    threads.close()


def test_after_an_exception_what_has_not_begun_never_does():
    threads, begun = ImageThreads(2), []

    def work(number: int) -> int:
        begun.append(number)
        time.sleep(0.05)
        return 1 // (number - 1)

    with pytest.raises(ZeroDivisionError):
        list(threads.map(work, range(500)))
    threads.close()
    assert len(begun) < 250


def test_one_thread_is_the_callers():
    assert set(ImageThreads(1).map(lambda _: threading.get_ident(), range(3))) == {threading.get_ident()}
    assert not picture_threads()


def test_control_c_leaves_no_thread_behind():
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert process.stdout.readline() == "working\n"
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert output == "left []\n" and process.returncode == 0
