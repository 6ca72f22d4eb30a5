"""One rank under its supervisor, with small programs in the place of jp_train: logs, records, signals, and a
terminal that stands still."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jp_train.cluster.rank import Log, gpu_settings, rank_environment
from jp_train.cluster.records import RankRecord, culprits, log_path, new_launch_id, open_logs, read_records
from jp_train.cluster.signals import rank_processes
from jp_train.errors import LaunchError
from jp_train.run.lock import LAUNCH_ID

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A folder whose `jp_train` runs the Python text in its argument; everything else of the package is the real
    one."""
    (tmp_path / "jp_train").mkdir()
    (tmp_path / "jp_train" / "__init__.py").write_text(f"__path__.append({str(ROOT / 'jp_train')!r})\n")
    (tmp_path / "jp_train" / "__main__.py").write_text("import sys\nexec(sys.argv[1])\n")
    return tmp_path


def start(program: Path, text: str, *, rank: int = 0, **env: str) -> subprocess.Popen[bytes]:
    environ = {
        **os.environ, "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "1", "JP_TRAIN_WORLD": "node1:0@node2:3",
        "JP_TRAIN_LOGS": str(program / "logs"), **env,
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "jp_train.cluster.rank", text],
        cwd=program,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_for_log(program: Path, name: str, word: bytes) -> None:
    deadline = time.monotonic() + 60
    path = program / "logs" / name
    while not (path.is_file() and word in path.read_bytes()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def runs(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]
    except OSError:  # ended, also while it was read
        return False


def test_rank_0_shows_on_the_terminal_what_its_log_keeps_and_others_only_keep(program: Path) -> None:
    text = "import sys; print('out ä'); print('err', file=sys.stderr); print('no end', end='')"
    for rank, name, shown in ((0, "node1_rank0.log", ["out ä", "no end"]), (1, "node2_rank1.log", [])):
        out, err = start(program, text, rank=rank).communicate(timeout=60)
        assert sorted((program / "logs" / name).read_text().split("\n")) == ["", "err", "no end", "out ä"]
        assert out.decode().splitlines() == shown and err == (b"err\n" if rank == 0 else b"")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("raise SystemExit(3)", 3),
        ("import os; os.kill(os.getpid(), 9)", -9),
        ("import os; os.abort()", -6),
        ("1 / 0", 1),
    ],
)
def test_a_supervisor_ends_as_its_rank_ended_and_the_record_says_how(program: Path, text: str, code: int) -> None:
    running = start(program, text, rank=1)
    running.communicate(timeout=60)
    assert running.returncode == code
    (record,) = read_records(program / "logs")
    assert (record.rank, record.host, record.slot, record.code) == (1, "node2", 3, code) and record.failed
    if code == 1:
        assert record.tail[-1] == "ZeroDivisionError: division by zero"


def test_the_rank_and_nothing_else_of_its_launch_gets_a_stop_signal(program: Path) -> None:
    text = (
        "import signal, subprocess, sys, time; got = []; signal.signal(15, lambda *a: got.append(1))\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)']); print('ready', flush=True)\n"
        "while not got: time.sleep(0.01)\n"
        "time.sleep(0.5); alive = child.poll() is None; child.kill(); raise SystemExit(143 if alive and len(got) == 1 "
        "else 9)"
    )
    launch_id = new_launch_id()
    running = start(program, text, rank=1, **{LAUNCH_ID: launch_id})
    wait_for_log(program, "node2_rank1.log", b"ready")
    (rank,) = rank_processes(launch_id)
    assert rank != running.pid
    os.kill(rank, signal.SIGTERM)
    running.communicate(timeout=60)
    assert running.returncode == 143


def test_a_rank_is_asked_to_save_when_its_supervisor_is_killed_or_its_launcher_dies(program: Path) -> None:
    text = (
        "import signal, sys, time; signal.signal(15, lambda *a: (print('saved', flush=True), sys.exit(143))); "
        "print('ready', flush=True); time.sleep(100)"
    )
    running = start(program, text, rank=1)
    wait_for_log(program, "node2_rank1.log", b"ready")
    (record,) = read_records(program / "logs")
    running.kill()
    running.communicate(timeout=60)
    deadline = time.monotonic() + 60
    while runs(record.pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)

    (program / "logs" / "node2_rank1.log").unlink()
    script = 'RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 "$0" -m jp_train.cluster.rank "$1" & wait'
    environ = {**os.environ, "JP_TRAIN_LOGS": str(program / "logs"), "JP_TRAIN_WORLD": "node1:0@node2:3"}
    launcher = subprocess.Popen(["sh", "-c", script, sys.executable, text], cwd=program, env=environ)
    wait_for_log(program, "node1_rank0.log", b"ready")
    launcher.kill()
    launcher.wait()
    wait_for_log(program, "node1_rank0.log", b"saved")
    wait_for_log(program, "node1_rank0.json", b'"code": 143')
    (first,) = culprits(read_records(program / "logs")[:1])
    assert "the launcher of its host died" in first.describe()


def test_a_terminal_that_stands_still_stops_no_rank(program: Path) -> None:
    running = start(
        program,
        "print('x' * 99 + '\\n', end='') or [print('y' * 99) for _ in range(20_000)]; print('the end', flush=True)",
    )
    wait_for_log(program, "node1_rank0.log", b"the end")  # nobody reads what the supervisor shows
    running.kill()
    running.communicate()


def test_a_log_keeps_the_newest_and_a_disk_that_refuses_it_costs_lines_only(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = log_path(tmp_path / "logs", "node1", 0)
    log = Log(path, limit=1000)
    for number in range(100):
        log.write(b"line %06d........\n" % number)
    log.close()
    kept = path.with_name("node1_rank0.log.1").read_bytes() + path.read_bytes()
    assert 1000 <= len(kept) <= 2000 and kept.endswith(b"line 000099........\n") and kept == b"".join(
        b"line %06d........\n" % n for n in range(100 - len(kept) // 20, 100)
    )  # fmt: skip
    (tmp_path / "file").write_text("")
    broken = Log(log_path(tmp_path / "file" / "logs", "node1", 0))
    broken.write(b"a\n")
    broken.write(b"b\n")
    assert broken.lost == 2 and capfd.readouterr().err.count("cannot be written") == 1


def test_the_logs_of_the_oldest_launches_are_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "logs" / "mine").mkdir(parents=True)
    for number in range(25):
        (tmp_path / "logs" / f"20260101-0000{number:02d}-0123abcd").mkdir()
    new = open_logs(tmp_path, new_launch_id())
    kept = sorted(path.name for path in (tmp_path / "logs").iterdir())
    assert len(kept) == 21 and "mine" in kept and new.name in kept and kept[0] == "20260101-000006-0123abcd"


def test_a_clock_that_was_set_back_costs_no_launch_its_new_logs(tmp_path: Path) -> None:
    for number in range(25):
        folder = tmp_path / "logs" / f"20990101-0000{number:02d}-0123abcd"
        folder.mkdir(parents=True)
        os.utime(folder, (1000 + number,) * 2)
    first, second = (open_logs(tmp_path, new_launch_id()) for _ in range(2))
    assert first.is_dir() and second.is_dir()
    assert min(path.name for path in (tmp_path / "logs").glob("2099*")) == "20990101-000007-0123abcd"


def test_torn_and_foreign_records_are_left_out(tmp_path: Path) -> None:
    RankRecord(3, "node1", 0, 17, 1.0).write(tmp_path)
    (tmp_path / "node2_rank1.json").write_text('{"rank": 1')
    (tmp_path / "node2_rank2.json").write_text(json.dumps({"rank": 2}))
    assert [record.rank for record in read_records(tmp_path)] == [3] and read_records(None) == []


def test_a_rank_that_has_obeyed_a_stop_signal_stays_until_the_others_have(program: Path) -> None:
    first = start(program, "raise SystemExit(143)", rank=1, WORLD_SIZE="2")
    wait_for_log(program, "node2_rank1.json", b'"code": 143')
    second = start(program, "import time; time.sleep(1.5); raise SystemExit(143)", rank=0, WORLD_SIZE="2")
    wait_for_log(program, "node1_rank0.json", b'"code": null')
    assert first.poll() is None, "a launcher that sees it end would kill the other one in its save"
    assert [process.wait(60) for process in (first, second)] == [143, 143]


@pytest.mark.parametrize(
    "numbering",
    [
        {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"},
        {"SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4", "SLURMD_NODENAME": "node1"},
    ],
)
def test_a_rank_learns_its_number_from_open_mpi_or_slurm(numbering: dict[str, str]) -> None:
    ours = {"JP_TRAIN_WORLD": "node2:1,3@node1:0,1", "JP_TRAIN_MASTER_ADDR": "node2", "JP_TRAIN_MASTER_PORT": "29501"}
    env = rank_environment(numbering | ours)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES")
    assert [env[name] for name in names] == ["2", "0", "4", "node2", "29501", "0,1"]
    assert rank_environment(numbering | ours | {"CUDA_VISIBLE_DEVICES": "5"})["CUDA_VISIBLE_DEVICES"] == "5", (
        "what Slurm has chosen stays"
    )


def test_torch_and_nccl_are_set_up_for_gpus_where_the_user_has_not() -> None:
    settings = gpu_settings({"JP_TRAIN_LOGS": "/runs/a/logs/20261122-101500-5ac1f00d"})
    assert settings == {
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": "/runs/a/stacks/nccl_rank_",
    }
    theirs = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512", "TORCH_FR_BUFFER_SIZE": "0"}
    assert gpu_settings(theirs) == {"TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}


def test_a_rank_that_slurm_has_put_on_another_host_than_the_hostfile_is_rejected() -> None:
    env = {
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NTASKS": "2",
        "SLURMD_NODENAME": "node1",
        "JP_TRAIN_WORLD": "node2:0@node1:0",
    }
    with pytest.raises(LaunchError, match="scontrol show hostnames"):
        rank_environment(env)
    with pytest.raises(LaunchError, match="3, but the hostfile has 2"):
        rank_environment(env | {"SLURM_NTASKS": "3"})
    with pytest.raises(LaunchError, match="jp-train launch"):
        rank_environment({"JP_TRAIN_WORLD": "node2:0"})


def test_what_pythons_resource_tracker_says_after_a_kill_is_logged_but_no_last_words(program: Path) -> None:
    text = (
        "import multiprocessing, os, signal, sys; lock = multiprocessing.get_context('spawn').Lock()\n"
        "print('about to end', file=sys.stderr); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert start(program, text).wait(60) == -signal.SIGKILL
    (record,) = read_records(program / "logs")
    assert "leaked semaphore" in (program / "logs" / "node1_rank0.log").read_text()
    assert record.tail == ["about to end"]
