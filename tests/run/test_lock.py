"""One job in one run folder, with real processes: who is refused, and whose lock is taken over, when."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jp_train.errors import LaunchError
from jp_train.run import lock as run_lock

ROOT = Path(__file__).resolve().parents[2]
CHILD = """
import sys, time
from jp_train.run import lock as run_lock
from jp_train.errors import LaunchError
folder, host, lease_s, go = sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4]
run_lock.BEAT_S, run_lock.LEASE_S = 0.05, lease_s
if host:  # a machine of its own, which knows nothing of this one's processes
    run_lock.socket.gethostname = lambda: host
    run_lock._line = lambda path: path + host
    run_lock._pid_space = lambda: "pid:" + host
from pathlib import Path
while go and not Path(go).exists():
    time.sleep(0.001)
try:
    lock = run_lock.take(folder)
except LaunchError as error:
    print(f"refused: {error}", flush=True)
    sys.exit(error.exit_code)
print("taken", flush=True)
sys.stdin.read()
lock.release()
"""


@pytest.fixture
def start(tmp_path) -> Iterator:
    """Starts jobs that hold the lock of `tmp_path` until their stdin closes."""
    started: list[subprocess.Popen] = []

    def begin(
        host: str = "", *, lease_s: float = 120.0, go: str = "", wait: bool = True, launch: str = ""
    ) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "JP_TRAIN_LAUNCH_ID": launch}
        job = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path), host, str(lease_s), go],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        started.append(job)
        if wait:
            assert job.stdout.readline() == "taken\n", job.stderr.read()
        return job

    yield begin
    for job in started:
        job.kill()
        job.wait(60)
        for stream in (job.stdin, job.stdout, job.stderr):
            stream.close()


def claim(folder: Path) -> tuple[run_lock.RunLock, list[str]]:
    messages: list[str] = []
    return run_lock.take(folder, say=messages.append), messages


def changed(folder: Path, **values: object) -> None:
    """A lock as if its holder were another."""
    path = folder / "run.lock"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_second_job_is_refused_and_told_who_holds_the_folder_and_what_to_do(start, tmp_path):
    job = start(launch="5ac1")
    with pytest.raises(LaunchError) as error:
        claim(tmp_path)
    for part in (
        f"run_dir {tmp_path} is in use",
        f"process {job.pid} on ",
        "launch 5ac1, since 20",
        f"kill -TERM {job.pid}",
        "another run_dir",
    ):
        assert part in str(error.value), error.value
    job.send_signal(signal.SIGSTOP)
    with pytest.raises(LaunchError):
        claim(tmp_path)
    job.send_signal(signal.SIGCONT)
    job.stdin.close()
    job.wait(60)
    lock, messages = claim(tmp_path)
    assert not messages
    lock.release()
    assert not (tmp_path / "run.lock").exists(), "a job that ends leaves no lock"


def test_the_lock_of_a_killed_job_of_this_host_is_taken_over_without_a_wait(start, tmp_path):
    job = start()
    job.kill()
    job.wait(60)
    lock, messages = claim(tmp_path)
    assert messages == [] and run_lock.read_holder(tmp_path).pid == os.getpid()
    lock.release()


@pytest.mark.parametrize(
    "gone", [{"process_started": "1"}, {"boot": "an earlier start of this host", "pid_space": "pid:[1]"}]
)
def test_a_process_number_that_is_used_again_and_a_host_that_restarted_hold_nothing(gone, start, tmp_path):
    start()
    changed(tmp_path, **gone)
    lock, messages = claim(tmp_path)
    assert messages == []
    lock.release()


def test_a_job_of_another_host_is_refused_once_it_has_shown_that_it_lives(start, tmp_path):
    start("node7")
    with pytest.raises(LaunchError, match=r"process \d+ on node7 .*trains there"):
        claim(tmp_path)


@pytest.mark.parametrize("unreadable", [False, True])
def test_a_job_of_another_host_that_gives_no_sign_for_the_lease_is_dead(unreadable, start, tmp_path, monkeypatch):
    job = start("node7")
    job.kill()
    job.wait(60)
    if unreadable:  # a power cut in the middle of the write
        (tmp_path / "run.lock").write_bytes(b"")
    monkeypatch.setattr(run_lock, "LEASE_S", 0.6)
    lock, messages = claim(tmp_path)
    assert (
        "within 1 s" in messages[0] and "is taken over" in messages[-1] and ("node7" in messages[0]) is not unreadable
    )
    assert run_lock.read_holder(tmp_path).token == lock.holder.token
    lock.release()


def test_of_many_jobs_that_find_a_dead_holder_one_gets_the_folder(start, tmp_path):
    dead = start()
    dead.kill()
    dead.wait(60)
    go = tmp_path / "go"
    jobs = [start(go=str(go), wait=False) for _ in range(6)]
    time.sleep(1.0)
    go.touch()
    answers = [job.stdout.readline() for job in jobs]
    assert sorted(text.partition(":")[0].strip() for text in answers) == ["refused"] * 5 + ["taken"], answers
    winner = jobs[answers.index("taken\n")]
    assert run_lock.read_holder(tmp_path).pid == winner.pid
    assert {path.name for path in tmp_path.iterdir()} == {"go", "run.lock", ".run.lock.guard"}


def test_a_launcher_hands_back_the_lock_of_its_own_dead_launch_and_no_other(start, tmp_path):
    job = start("node7", launch="5ac1")
    job.kill()
    job.wait(60)
    assert not run_lock.release_dead_launch(tmp_path, "77") and not run_lock.release_dead_launch(tmp_path, "")
    assert run_lock.release_dead_launch(tmp_path, "5ac1") and not run_lock.release_dead_launch(tmp_path, "5ac1")
    lock, messages = claim(tmp_path)
    assert messages == []
    lock.release()


def test_a_job_whose_folder_was_taken_over_ends_and_touches_the_others_lock_no_more(start, tmp_path):
    job = start("node7", launch="5ac1")
    job.send_signal(signal.SIGSTOP)  # suspended for longer than the lease
    assert run_lock.release_dead_launch(tmp_path, "5ac1")
    lock, _ = claim(tmp_path)
    job.send_signal(signal.SIGCONT)
    assert job.wait(60) == 5
    output = job.stderr.read()
    assert "was taken over by" in output and str(os.getpid()) in output
    assert run_lock.read_holder(tmp_path).token == lock.holder.token
    lock.release()


def test_a_lock_that_somebody_deleted_comes_back_while_its_job_lives(start, tmp_path):
    job = start()
    (tmp_path / "run.lock").unlink()
    deadline = time.monotonic() + 60
    while run_lock.read_holder(tmp_path) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert run_lock.read_holder(tmp_path).pid == job.pid
