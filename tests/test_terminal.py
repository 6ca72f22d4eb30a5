"""Durations, progress lines, and the width of the terminal."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import termios

import pytest

from jp_train.terminal import (
    ProgressLine,
    aligned,
    duration,
    folded,
    measured,
    printable,
    short_number,
    shortened,
    terminal_columns,
)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (0, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.9, "59 s"),
        (60, "1 min 0 s"),
        (725, "12 min 5 s"),
        (7449, "2 h 4 min"),
        (48 * 3600, "2 d 0 h"),
    ],
)
def test_a_duration_has_its_two_largest_units(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_progress_tells_the_share_the_time_spent_and_the_time_left_and_skips_lines_that_come_too_soon() -> None:
    now = [0.0]
    stream = io.StringIO()
    line = ProgressLine("verify", stream, every_s=1, clock=lambda: now[0])
    for now[0], done in ((0.5, 1), (10.0, 25), (10.5, 26), (100.0, 50), (101.5, 51), (150.0, 100)):
        line.show(done, 100, f"shard {done}/100")
    assert stream.getvalue().splitlines() == [
        "verify: shard 25/100, 25%, 10 s, 30 s left",
        "verify: shard 50/100, 50%, 1 min 40 s, 1 min 40 s left",
        "verify: shard 100/100, 100%, 2 min 30 s",
    ], "1.5 s after 100 s are too soon: lines come further apart as the work grows long"


def test_no_time_left_is_told_from_the_first_bytes_after_a_slow_start() -> None:
    now = [0.0]
    line = ProgressLine("verify", None, every_s=0, clock=lambda: now[0])
    told = []
    for now[0], done in ((2.0, 2), (4.0, 90), (5.0, 100)):
        told.append(line.text(done, 10_000))
    assert told[:2] == ["verify: 0%, 2.0 s", "verify: 1%, 4.0 s"]
    assert told[2] == "verify: 1%, 5.0 s, 8 min 15 s left"
    now[0] = 130.0
    slow = ProgressLine("verify", None, every_s=0, done=9_000, clock=lambda: now[0])
    now[0] = 195.0
    assert slow.text(9_001, 10_000) == "verify: 90%, 1 min 5 s, 18 h 2 min left", "after a minute it is slow work"


def test_what_an_earlier_run_did_does_not_count_as_speed() -> None:
    now = [0.0]
    stream = io.StringIO()
    line = ProgressLine("import", stream, every_s=0, done=80, clock=lambda: now[0])
    now[0] = 10.0
    line.show(90, 100)
    line.show(0, 0)
    assert stream.getvalue().splitlines() == ["import: 90%, 10 s, 10 s left", "import: 100%, 10 s"]
    ProgressLine("silent", None).show(1, 1)


def test_a_table_is_aligned_and_foreign_text_cannot_steer_the_terminal() -> None:
    assert aligned([("name", "n"), ("a", "10")], left=(0,)) == ["name   n", "a     10"]
    assert printable("a\x1b[2J\ud800é") == "a\\x1b[2J\\ud800é"


STEP = "step  40/420  loss 4.549 (und 4.567 text 4.849 gen 4.297)  norm 1.64  3,223 tok/s  ETA 2 min 37 s"


def test_a_step_line_is_folded_between_its_fields_and_no_other_line_is() -> None:
    lines = folded(STEP, 60).splitlines()
    assert max(map(len, lines)) <= 60 and len(lines) == 2
    assert "  ".join(line.strip() for line in lines) == STEP
    assert folded(STEP, len(STEP)) == folded(STEP, None) == STEP
    assert folded("launch: step by step " * 9, 40) == "launch: step by step " * 9


def test_only_a_terminal_has_columns(tmp_path) -> None:
    master, slave = pty.openpty()
    try:
        assert terminal_columns(slave) is None, "a new pseudo-terminal has no size"
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        assert terminal_columns(slave) == 80
    finally:
        os.close(master), os.close(slave)
    with (tmp_path / "log").open("w") as file:
        assert terminal_columns(file) is None and terminal_columns(io.StringIO()) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.00012, "1.2e-4"),
        (0.3671, "0.367"),
        (3223, "3,223"),
        (12345, "12.3k"),
        (2e6, "2M"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
    ],
)
def test_a_short_number_has_three_significant_digits(value: float, text: str) -> None:
    assert short_number(value) == text


def test_what_is_not_finite_is_named() -> None:
    for value, text in ((float("nan"), "nan"), (float("inf"), "inf"), (-float("inf"), "-inf")):
        assert short_number(value) == measured(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.367, "0.367"),
        (2.4, "2.400"),
        (9.9996, "10.00"),
        (11.52, "11.52"),
        (0.0, "0.000"),
        (0.002, "2e-3"),
        (250.0, "250"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
    ],
)
def test_a_measured_value_has_the_same_decimals_whatever_its_size(value: float, text: str) -> None:
    assert measured(value) == text


def test_a_long_text_is_cut_between_words_onto_one_line() -> None:
    assert shortened("one  two\nthree", 13) == "one two three"
    assert shortened("one two three", 12) == "one two …"
    assert shortened("a" * 20, 10) == "aaaaaaaa …"
