"""When a run ends, and with which exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from jp_train.config.schema import EarlyStopConfig, StageConfig
from jp_train.engine.stop import Patience, SignalFlag, SkipCounter, decide, last_step

STAGE = StageConfig(training_steps=360, early_stop=EarlyStopConfig(at_step=270, patience=2))


def ask(step: int, *, signal_number: int = 0, patience_over: bool = False, stage: StageConfig = STAGE):
    return decide(stage, step=step, signal_number=signal_number, patience_over=patience_over)


def test_at_step_stops_early_and_exits_0():
    assert ask(269) is None and last_step(STAGE) == 270
    stop = ask(270)
    assert (stop.state, stop.exit_code) == ("stopped_early", 0) and "270 of 360" in stop.reason


def test_the_last_training_step_finishes_the_stage():
    stage = StageConfig(training_steps=10)
    assert ask(9, stage=stage) is None and ask(10, stage=stage).state == "finished" and last_step(stage) == 10


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_signal_exits_with_128_and_its_number(number, code):
    stop = ask(5, signal_number=int(number))
    assert (stop.exit_code, stop.state) == (code, "stopped_by_signal") and number.name in stop.reason


def test_a_stage_that_is_done_is_not_interrupted_by_a_signal_in_its_last_step():
    assert ask(270, signal_number=15).exit_code == 0


def test_patience_counts_validations_without_a_better_loss_and_survives_a_checkpoint():
    patience = Patience(2)
    assert [patience.observe(loss) for loss in (3.0, 2.0, 2.5)] == [False, False, False]
    resumed = Patience(2)
    resumed.restore(patience.state())
    assert resumed.observe(2.0), "equal is not better"
    assert ask(5, patience_over=True).state == "stopped_early"


def test_without_a_limit_patience_never_ends():
    patience = Patience(None)
    assert not any(patience.observe(1.0) for _ in range(9)) and not patience.over


def test_only_consecutive_skips_stop_the_run():
    skips = SkipCounter()
    assert [skips.observe(ok) for ok in (False, False, True, False, False, False)] == [False] * 5 + [True]
    assert (skips.total, skips.consecutive) == (5, 3)


def test_the_flag_takes_the_first_signal_and_puts_the_old_handlers_back():
    before = signal.getsignal(signal.SIGUSR1)
    with SignalFlag().installed() as flag:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)  # at once after: the launcher's echo of the first
        time.sleep(0.01)
        assert flag.number == signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_second_signal_exits_at_once():
    code = (
        "import os, signal, time\n"
        "import jp_train.engine.stop as stop\n"
        "stop.SAME_SIGNAL_S = 0.05\n"
        "with stop.SignalFlag().installed():\n"
        "    os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.2)\n"
        "    os.kill(os.getpid(), signal.SIGINT); time.sleep(30)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 130
