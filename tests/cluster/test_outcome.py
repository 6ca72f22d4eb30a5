"""The exit code of a run from its launcher's, its records and its status."""

from __future__ import annotations

import signal

import pytest

from jp_train.cluster.outcome import judge, signalled
from jp_train.cluster.running import Ending


@pytest.mark.parametrize(
    ("code", "stopped_by", "failure", "expected"),
    [
        *((code, stop, "", code) for code in (0, 2, 3, 4, 5) for stop in (None, signal.SIGTERM)),
        (143, None, "", 143), (1, signal.SIGTERM, "", 143), (241, signal.SIGINT, "", 130),
        (1, None, "DataError", 3), (1, None, "CheckpointError", 4), (1, None, "ValueError", 1),
    ],
)  # fmt: skip
def test_the_exit_code_is_the_signals_or_that_of_the_error_in_the_status(
    code: int, stopped_by: int | None, failure: str, expected: int
) -> None:
    assert judge(Ending(code), (), stopped_by, failure).code == expected


@pytest.mark.parametrize("code", [247, -9, 137])
def test_a_process_that_was_killed_from_outside_is_named_and_worth_a_restart(code: int) -> None:
    outcome = judge(Ending(code), (), None, "")
    assert (outcome.code, outcome.again) == (5, "yes") and "SIGKILL" in outcome.cause


def test_a_signal_is_read_from_the_codes_of_every_launcher_and_not_from_those_of_ssh() -> None:
    assert [signalled(code) for code in (-15, 241, 143, 0, 1, 5, 255)] == [15, 15, 15, 0, 0, 0, 0]
