"""Launching: real local and (through a stand-in for ssh and pdsh) remote runs of a stand-in trainer."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jp_train.cluster.launch import _Attempts, _Preflight, launch
from jp_train.cluster.options import LaunchOptions
from jp_train.cluster.running import StopSignals
from jp_train.config import load_config
from jp_train.errors import ConfigError, LaunchError
from jp_train.run.lock import take

ROOT = Path(__file__).resolve().parents[2]

TRAINER = """
import json, os, pathlib, signal, sys, time
rank, here = os.environ["RANK"], pathlib.Path(sys.argv[2]).parent
mode = (here / "mode").read_text()
signals = []
signal.signal(signal.SIGTERM, lambda number, frame: signals.append(number))
facts = {"argv": sys.argv[1:], "env": dict(os.environ), "pid": os.getpid()}
(here / f"tmp{rank}").write_text(json.dumps(facts))
os.rename(here / f"tmp{rank}", here / f"rank{rank}.json")
if mode == "fail" and rank == "1":
    raise SystemExit(3)
for _ in range(600):
    time.sleep(0.1)
    if signals:
        time.sleep(1.0)
        (here / f"saved{rank}").write_text(str(len(signals)))
        raise SystemExit(143)
raise SystemExit(9)
"""
DRIVER = """
import json, sys
from pathlib import Path
from jp_train.cluster.launch import _Attempts, _Preflight, launch
from jp_train.cluster.options import LaunchOptions
from jp_train.cluster.running import StopSignals
from jp_train.config import load_config
options = LaunchOptions(hostfile=Path(sys.argv[2]), master_port=int(sys.argv[4]), skip_preflight=True)
raise SystemExit(launch(sys.argv[1], json.loads(sys.argv[3]), options))
"""
PDSH = """#!{python}
import re, subprocess, sys
rest = sys.argv[1:]
hosts = rest[rest.index("-w") + 1].split(",")
command = " ".join(rest[rest.index("-w") + 2 :])
running = [
    subprocess.Popen(["sh", "-c", command.replace("%n", str(i)).replace("%h", host)]) for i, host in enumerate(hosts)
]
raise SystemExit(max(process.wait() for process in running))
"""

SSH = """#!/bin/sh
for last; do :; done
case "$last" in
    # one process table
    *cluster.signals*) case "$*" in *" beta "*) echo "jp_train: reached 0 processes" ;; *) exec sh -c "$last" ;; esac ;;
    *) echo 127.0.0.1 ;;
esac
"""


def write_hostfile(folder: Path, text: str) -> Path:
    path = folder / "hostfile"
    path.write_text(text)
    return path


def test_a_dry_run_prints_arithmetic_and_command_and_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    config = ROOT / "launch" / "janus_pro_1b_stage2.yaml"
    options = LaunchOptions(hostfile=ROOT / "hostfiles" / "a100_16x8", dry_run=True)
    assert launch(config, ["seed=3", "engine.micro_batch_rows=1"], options) == 0
    text = capsys.readouterr().out
    assert (
        "128 ranks on 16 hosts" in text and "512 rows a step = 1 micro-batch rows x 4 accumulation x 128 ranks" in text
    )
    assert "-m deepspeed.launcher.launch" in text and "seed=3" in text
    with pytest.raises(ConfigError, match="100"):
        launch(config, [], LaunchOptions(hostfile=write_hostfile(tmp_path, "node[1-2] slots=50\n"), dry_run=True))


def test_a_busy_port_is_an_error_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        with pytest.raises(LaunchError, match="--master-port"):
            port = busy.getsockname()[1]
            options = LaunchOptions(hostfile=ROOT / "hostfiles" / "local", master_port=port, skip_preflight=True)
            launch(ROOT / "examples" / "smoke" / "stage1.yaml", [f"run_dir={tmp_path / 'run'}"], options)


def test_a_run_folder_in_which_another_job_trains_is_rejected_with_its_host_and_process(tmp_path: Path) -> None:
    held = take(tmp_path / "run")
    try:
        with pytest.raises(LaunchError, match=f"process {os.getpid()} on {socket.gethostname()}"):
            options = LaunchOptions(hostfile=ROOT / "hostfiles" / "local", master_port=free_port())
            launch(ROOT / "examples" / "smoke" / "stage1.yaml", [f"run_dir={tmp_path / 'run'}"], options)
    finally:
        held.release()


def test_a_host_whose_ranks_were_killed_twice_is_left_out_of_a_restart_unless_the_rows_need_it(tmp_path: Path) -> None:
    config = ROOT / "launch" / "janus_pro_1b_stage2.yaml"
    cfg = load_config(config, [f"run_dir={tmp_path / 'run'}", "engine.micro_batch_rows=1"])

    def usable(hosts: str, *killed: str, silent: tuple[str, ...] = ()) -> list[str]:
        hostfile = write_hostfile(tmp_path, "".join(f"{name} slots=8\n" for name in hosts))
        options = LaunchOptions(hostfile=hostfile, skip_preflight=True)
        attempts = _Attempts(cfg, ["train"], options, StopSignals(), _Preflight(config, []))
        attempts._kills.update(killed)
        return list(attempts._usable_hosts(dict.fromkeys(silent, "no answer")))

    # 512 rows divide among 8, 16 and 32 ranks, not among 24
    assert usable("abcd") == usable("abcd", "b") == ["a", "b", "c", "d"]
    assert usable("abc", "b", "b") == ["a", "c"] and usable("ab", "a", "a", "b", "b") == ["a", "b"]
    assert usable("abcd", silent=("b",)) == ["a", "c"]
    with pytest.raises(LaunchError, match="no restart: 0 ranks on no host are left.*a: no answer"):
        usable("a", silent=("a",))


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A folder whose `jp_train` is the stand-in trainer: it comes first on the ranks' path because they start there."""
    (tmp_path / "jp_train").mkdir()
    (tmp_path / "jp_train" / "__init__.py").write_text(f"__path__.append({str(ROOT / 'jp_train')!r})\n")
    (tmp_path / "jp_train" / "__main__.py").write_text(TRAINER)
    (tmp_path / "run.yaml").write_text(f"preset: tiny/stage1\nrun_dir: {tmp_path / 'run'}\n")
    (tmp_path / "mode").write_text("train")
    (tmp_path / "drive").mkdir()
    (tmp_path / "drive" / "driver.py").write_text(DRIVER)
    return tmp_path


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def start(folder: Path, hostfile_text: str, overrides: list[str], **env: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "drive/driver.py",
        str(folder / "run.yaml"),
        str(write_hostfile(folder, hostfile_text)),
        json.dumps(overrides),
        str(free_port()),
    ]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.Popen(
        command, cwd=folder, env=environ, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )


def ranks_started(folder: Path, running: subprocess.Popen[str]) -> list[dict]:
    until = time.monotonic() + 120
    while not all((folder / f"rank{i}.json").is_file() for i in (0, 1)):
        assert running.poll() is None and time.monotonic() < until, running.stderr and running.stderr.read()
        time.sleep(0.1)
    return [json.loads((folder / f"rank{i}.json").read_text()) for i in (0, 1)]


def check_stop(folder: Path, running: subprocess.Popen[str], ranks: list[dict]) -> None:
    running.send_signal(signal.SIGTERM)
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 143, errors
    assert [(folder / f"saved{i}").read_text() for i in (0, 1)] == ["1", "1"], (
        "each rank gets the signal exactly once, and saves"
    )
    (log,) = (folder / "run" / "logs").glob("*/launcher.log")
    noise = ("[INFO]", "[ERROR]")
    assert not [text for text in noise if text in errors] and all(text in log.read_text() for text in noise), errors
    assert not any(Path(f"/proc/{rank['pid']}").exists() for rank in ranks)


def test_a_stop_signal_reaches_local_ranks_once_and_their_code_comes_back(stand_in: Path) -> None:
    running = start(stand_in, "localhost slots=2\n", ["seed=3"])
    ranks = ranks_started(stand_in, running)
    assert [rank["argv"] for rank in ranks] == [["train", str(stand_in / "run.yaml"), "seed=3"]] * 2
    assert [(r["env"]["RANK"], r["env"]["LOCAL_RANK"], r["env"]["WORLD_SIZE"]) for r in ranks] == [
        ("0", "0", "2"),
        ("1", "1", "2"),
    ]
    assert all(rank["env"]["OMP_NUM_THREADS"] for rank in ranks)
    check_stop(stand_in, running, ranks)


def test_a_failing_rank_ends_the_run_with_its_code_and_leaves_the_handlers_as_they_were(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (stand_in / "mode").write_text("fail")
    monkeypatch.chdir(stand_in)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    options = LaunchOptions(hostfile=write_hostfile(stand_in, "localhost slots=2\n"), master_port=free_port())
    assert launch(stand_in / "run.yaml", [], options) == 3
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_one_local_host_is_examined_too_and_its_table_printed_only_with_a_fault(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(stand_in)
    (stand_in / "mode").write_text("fail")
    (stand_in / "drawn.tar").write_bytes(b"no tar" * 1000)
    hostfile = write_hostfile(stand_in, "localhost slots=2\n")
    data = ["data.sources={drawn: {kind: generation, shards: drawn.tar}}", "stage.mixture.understanding=0"]
    with pytest.raises(LaunchError, match="preflight found 1 faults .*localhost: source drawn: shard .*drawn.tar"):
        launch(stand_in / "run.yaml", data, LaunchOptions(hostfile=hostfile, master_port=free_port()))
    assert "FAULT  localhost  data: source drawn" in capfd.readouterr().err
    assert not (stand_in / "rank0.json").exists()
    assert launch(stand_in / "run.yaml", [], LaunchOptions(hostfile=hostfile, master_port=free_port())) == 3
    assert "free  clock" not in capfd.readouterr().err


def test_remote_ranks_get_their_arguments_unchanged_and_one_stop_signal(stand_in: Path) -> None:
    programs = stand_in / "bin"
    programs.mkdir()
    for name, text in (("pdsh", PDSH.format(python=sys.executable)), ("ssh", SSH)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    overrides = [
        "data.root=a {b,c} \"d\" 'e' * ~ $HOME \\",
        "data.system_prompt=$(id)`id`;&|<>*{1..3}[x]\"'!#",
        "seed=3",
    ]
    env = {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "WANDB_API_KEY": "s3cret",
        "WANDB_MODE": "offline",
        "JP_TRAIN_NOTE": "two $words ^`(",
    }
    running = start(stand_in, "alpha slots=1\nbeta slots=1\n", overrides, **env)
    ranks = ranks_started(stand_in, running)
    assert [rank["argv"][2:] for rank in ranks] == [overrides] * 2
    assert [(r["env"]["RANK"], r["env"]["LOCAL_RANK"]) for r in ranks] == [("0", "0"), ("1", "0")]
    assert all(
        rank["env"]["JP_TRAIN_NOTE"] == "two $words ^`("
        and re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{8}", rank["env"]["JP_TRAIN_LAUNCH_ID"])
        for rank in ranks
    )
    check_stop(stand_in, running, ranks)
