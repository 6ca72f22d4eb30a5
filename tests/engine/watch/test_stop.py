"""When a run ends, and with which exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jp_train.config.schema import EarlyStopConfig, GuardConfig, StageConfig
from jp_train.engine.watch.stop import GraceCheck, Patience, SignalFlag, SkipCounter, decide, last_step

STAGE = StageConfig(training_steps=360, early_stop=EarlyStopConfig(at_step=270, patience=2))

LIMITS = GuardConfig(max_consecutive_skips=3, skip_window=200, max_skip_share=0.025)


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


def test_skips_in_a_row_stop_the_run_and_a_good_step_between_forgives():
    skips = SkipCounter()
    messages = [skips.observe(ok, step, LIMITS) for step, ok in enumerate((False, False, True, False, False, False), 1)]
    assert messages[:5] == [""] * 5 and messages[5].startswith("3 updates in a row")
    assert (skips.total, skips.consecutive) == (5, 3)


def test_too_large_a_share_of_skips_stops_the_run_and_old_ones_are_forgotten():
    skips = SkipCounter()
    assert not any(skips.observe(step % 40 != 0, step, LIMITS) for step in range(1, 400)), (
        "5 in any 200 steps are allowed"
    )
    assert skips.recent == [200, 240, 280, 320, 360]
    messages = [skips.observe(step % 2 != 0, step, LIMITS) for step in range(400, 410)]
    assert [bool(text) for text in messages] == [False, False, True, False, True, False, True, False, True, False]
    assert "6 updates of the last 200 steps were left out, 5 are allowed" in messages[2]
    again = SkipCounter()
    again.restore(skips.state())
    assert again == skips


def test_a_share_that_binary_fractions_miss_by_a_hair_is_the_number_of_steps_that_was_meant():
    skips, limits = SkipCounter(), GuardConfig(max_consecutive_skips=1000, skip_window=100, max_skip_share=0.29)
    messages = [skips.observe(False, step, limits) for step in range(1, 31)]
    assert not any(messages[:29]) and "29 are allowed" in messages[29]


def test_a_grace_time_that_a_step_and_a_save_do_not_fit_in_is_said_once_and_again_when_it_grows():
    grace = GraceCheck(60.0)
    assert not grace.observe(20.0, 30.0)
    assert "take 70 s, engine.grace_s is 60 s" in grace.observe(40.0, 30.0)
    assert not grace.observe(10.0, 40.0) and grace.observe(80.0, 40.0)


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
        "import jp_train.engine.watch.stop as stop\n"
        "stop.SAME_SIGNAL_S = 0.05\n"
        "with stop.SignalFlag().installed():\n"
        "    os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.2)\n"
        "    os.kill(os.getpid(), signal.SIGINT); time.sleep(30)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 130


STUCK = """
import os, signal, sys, threading, time
import jp_train.engine.watch.stop as stop
stop.SAME_SIGNAL_S = 0.3
flag = stop.SignalFlag()
def watch():
    while True:
        code = flag.must_exit(starting=sys.argv[1] == "starting")
        if code:
            os._exit(code)
        time.sleep(0.02)
with flag.installed():
    threading.Thread(target=watch, daemon=True).start()  # the signal is delivered to this thread
    print("ready", flush=True)
    # the main thread's handlers do not run meanwhile, as in a collective
    signal.pthread_sigmask(signal.SIG_BLOCK, stop.STOP_SIGNALS)
    time.sleep(float(sys.argv[2]))
    print(flag.number, flush=True)
"""


@pytest.mark.parametrize("phase", ["starting", "training"])
def test_a_stuck_main_thread_does_not_keep_a_signal_from_ending_the_process(phase):
    """In C code that is resumed after a signal no Python handler runs. Start-up ends at the first signal, training
    at the second."""
    process = subprocess.Popen([sys.executable, "-c", STUCK, phase, "60"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    if phase == "training":
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.0)
        process.send_signal(signal.SIGUSR1)
    assert process.wait(120) == 138


def test_one_signal_that_the_main_thread_sees_late_is_not_taken_for_a_second():
    """A collective of some seconds, or the start of the data workers: the step is still to be finished, and saved."""
    process = subprocess.Popen([sys.executable, "-c", STUCK, "training", "2"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == f"{int(signal.SIGTERM)}\n"
    assert process.wait(120) == 0


ROOT = Path(__file__).resolve().parents[3]
LAUNCHER = """#!/usr/bin/env bash
echo "$@" >"$FAKE/arguments"
trap 'echo told >>"$FAKE/told"; sleep 0.3; exit ${FAKE_SIGNALLED:-143}' TERM
touch "$FAKE/up"
for i in $(seq 200); do [ -e "$FAKE/end" ] && exit "$(cat "$FAKE/end")"; sleep 0.05; done
exit 9
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
    show) printf 'node1\\nnode2\\n' ;;
    *) echo "$@" >>"$FAKE/queued" ;;
esac
"""


@pytest.fixture
def slurm(tmp_path):
    """`launch/slurm.sbatch` as Slurm starts it, with jp-train and scontrol that note what they are told."""
    for name, text in (("jp-train", LAUNCHER), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def start(**environment: str) -> subprocess.Popen:
        env = {
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "FAKE": str(tmp_path),
            "SLURM_JOB_ID": "77",
            "TMPDIR": str(tmp_path),
        }
        process = subprocess.Popen(
            ["bash", str(ROOT / "launch/slurm.sbatch"), "run.yaml", "seed=1"],
            env={**env, "SLURM_JOB_NODELIST": "node[1-2]", **environment},
            stdout=subprocess.PIPE,
            text=True,
        )
        until = time.monotonic() + 120
        while not (tmp_path / "up").exists():
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.02)
        return process

    return start


@pytest.mark.parametrize(
    ("signals", "status", "code", "queued"),
    [
        ([signal.SIGUSR1], "143", 143, True),
        ([signal.SIGUSR1, signal.SIGUSR1], "143", 143, True),
        ([signal.SIGUSR1, signal.SIGTERM], "143", 143, False),
        ([signal.SIGUSR1], "0", 0, False),
        ([signal.SIGUSR1], "4", 4, False),
        ([signal.SIGTERM], "143", 143, False),
    ],
)
def test_slurm_queues_a_job_again_only_when_time_ran_out_and_the_ranks_have_saved(
    slurm, tmp_path, signals, status, code, queued
):
    process = slurm(FAKE_SIGNALLED=status)
    for number in signals:
        process.send_signal(number)
    assert process.wait(120) == code
    assert (tmp_path / "told").read_text() == "told\n", "the launcher takes a second signal for `at once`"
    assert (tmp_path / "queued").exists() is queued
    assert not queued or (tmp_path / "queued").read_text() == "requeue 77\n"
    assert (tmp_path / "queued").exists() is queued
    assert not list(tmp_path.glob("hostfile.*"))


@pytest.mark.parametrize("code", [0, 3])
def test_slurm_leaves_an_ended_job_alone_and_passes_its_status_on(slurm, tmp_path, code):
    process = slurm()
    (hostfile,) = tmp_path.glob("hostfile.*")
    assert hostfile.read_text() == "node1 slots=8\nnode2 slots=8\n"
    (tmp_path / "end").write_text(str(code))
    assert process.wait(120) == code and not (tmp_path / "queued").exists()
    messages = (tmp_path / "arguments").read_text().split()
    assert messages[:4] == ["launch", "run.yaml", "--hostfile", str(hostfile)] and messages[4:] == [
        "--max-restarts",
        "2",
        "seed=1",
    ]
