"""One start under stop signals, with a real rank supervisor and a stand-in for ssh that runs the command on this
host."""

from __future__ import annotations

import os
import pty
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from jp_train.cluster import running
from jp_train.cluster.running import Run, StopSignals
from jp_train.cluster.signals import launched_processes
from jp_train.run.lock import LAUNCH_ID

ROOT = Path(__file__).resolve().parents[2]
RANK = """
import pathlib, signal, sys, time
number = []
signal.signal(signal.SIGTERM, lambda got, frame: number.append(got))
pathlib.Path("up").touch()
until = time.monotonic() + 100
while not number and time.monotonic() < until:
    time.sleep(0.05)
time.sleep(1.0)
raise SystemExit(143 if len(number) == 1 else 9)
"""

HANG_UP = """
import pathlib, signal, sys, time
from jp_train.cluster.running import StopSignals, say
with StopSignals().installed() as stop:
    hung_up = []
    before = signal.getsignal(signal.SIGHUP)
    signal.signal(signal.SIGHUP, lambda *told: (before(*told), hung_up.append(1)))
    pathlib.Path("ready").touch()
    until = time.monotonic() + 60
    while not hung_up and time.monotonic() < until:
        time.sleep(0.02)
    say("restart 1 of 5")
    print("a table", file=sys.stderr, flush=True)
    pathlib.Path("told").write_text(str(stop.number))
"""
SSH = """#!/bin/sh
for last; do :; done
if [ -e "$HERE/asked" ]; then while [ ! -e "$HERE/up" ]; do sleep 0.05; done; fi
sh -c "$last"
touch "$HERE/asked"
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose `jp_train` runs RANK; everything else of the package is the real one. `ssh` runs its last word
    here."""
    (tmp_path / "jp_train").mkdir()
    (tmp_path / "jp_train" / "__init__.py").write_text(f"__path__.append({str(ROOT / 'jp_train')!r})\n")
    (tmp_path / "jp_train" / "__main__.py").write_text(RANK)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text(SSH)
    (tmp_path / "bin" / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HERE", str(tmp_path))
    return tmp_path


def test_remote_ranks_that_come_up_after_the_stop_signal_still_get_it_and_only_once(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "SIGNAL_AGAIN_S", 0.2)
    launch_id = f"late-{os.getpid()}"
    env = {**os.environ, LAUNCH_ID: launch_id, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    # no rank before the hosts have been asked once, and no second question before it can hear a signal
    script = (
        'while [ ! -e "$HERE/asked" ]; do sleep 0.05; done; cd "$HERE"; '
        f"exec {sys.executable} -u -m jp_train.cluster.rank"
    )
    stop = StopSignals()
    stop.number = signal.SIGTERM
    ending = Run(["sh", "-c", script], env, launch_id, ["alpha"], stop, grace_s=100.0).wait()
    assert (program / "up").exists() and ending.code == 143
    assert launched_processes(launch_id) == []


def test_a_stop_signal_ends_at_once_what_runs_while_no_rank_does_and_is_only_noted_otherwise() -> None:
    with StopSignals().installed() as stop:
        with pytest.raises(KeyboardInterrupt), stop.interrupting():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        assert stop.number == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)  # no KeyboardInterrupt outside of the block
        with pytest.raises(KeyboardInterrupt), stop.interrupting():
            raise AssertionError("a signal that came before must be obeyed, too")


def test_a_terminal_that_goes_away_leaves_the_launch_at_its_work(tmp_path: Path) -> None:
    """The launch has a terminal of its own (a pseudo-terminal), which is closed: the kernel sends SIGHUP, and
    writing fails from then on."""
    program = tmp_path / "hang.py"
    program.write_text(HANG_UP)
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["PYTHONPATH"] = str(ROOT)
        os.chdir(tmp_path)
        os.execv(sys.executable, [sys.executable, str(program)])
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0 and (tmp_path / "told").read_text() == "None"


def test_a_run_folder_that_cannot_be_looked_at_ends_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def notice() -> None:
        os.listdir(tmp_path / "gone")

    ending = Run(
        ["sleep", "1"], dict(os.environ), f"look-{os.getpid()}", (), StopSignals(), grace_s=1.0, notice=notice
    ).wait()
    assert ending.code == 0
    assert capsys.readouterr().err.count("not watched at the moment: FileNotFoundError") == 1


def test_a_run_folder_that_never_answers_is_named_and_keeps_no_stop_signal_waiting(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "UNWATCHED_S", 0.5)
    stop, forever = StopSignals(), threading.Event()
    timer = threading.Timer(2.0, setattr, (stop, "number", signal.SIGTERM))
    timer.start()
    run = Run(
        ["sleep", "300"],
        dict(os.environ),
        f"hang-{os.getpid()}",
        (),
        stop,
        grace_s=100.0,
        notice=lambda: forever.wait(200),
    )
    began = time.monotonic()
    assert run.wait().code == -signal.SIGTERM and time.monotonic() - began < 150
    assert "has not answered for" in capsys.readouterr().err
    forever.set()
