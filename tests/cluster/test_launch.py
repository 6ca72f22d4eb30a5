"""Launching: the hostfile parser, the command, and real local and (through a stand-in for ssh and pdsh) remote runs
of a stand-in trainer."""

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

from jp_train.cluster.launch import (
    Host,
    LaunchOptions,
    exit_code,
    launch,
    launch_command,
    parse_hostfile,
    passed_environment,
    ranks_command,
    remote_argument,
    runner_environment,
    select_slots,
)
from jp_train.cluster.rank import rank_environment
from jp_train.errors import ConfigError, LaunchError
from jp_train.run.lock import take

ROOT = Path(__file__).resolve().parents[2]
RUNNER = [sys.executable, "-m", "deepspeed.launcher.runner"]

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
from jp_train.cluster.launch import LaunchOptions, launch
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


def test_a_hostfile_gives_its_hosts_in_order(tmp_path: Path) -> None:
    text = "# cluster\n\nnode-b slots=8   # rack 2\n10.0.0.7\tslots=4\n  localhost  slots=2\n"
    assert parse_hostfile(write_hostfile(tmp_path, text)) == [
        Host("node-b", 8),
        Host("10.0.0.7", 4),
        Host("localhost", 2),
    ]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("node1", "slots=N"),
        ("node1 slots=eight", "slots=N"),
        ("node1 slots=-8", "slots=N"),
        ("node1 slots=8 gpus=8", "slots=N"),
        ("node1:8", "slots=N"),
        ("node1 slots=0", "0 slots"),
        ("good slots=4", "already on line 2"),
        ("a;reboot slots=8", "a;reboot"),
        ("$(id) slots=8", "characters"),
        ("-oProxyCommand=x slots=8", "characters"),
        ("a,b slots=8", "characters"),
        ("user@host slots=8", "characters"),
        ("nöde slots=8", "characters"),
    ],
)
def test_a_bad_line_is_refused_with_its_number_and_its_text(tmp_path: Path, line: str, complaint: str) -> None:
    with pytest.raises(LaunchError) as caught:
        parse_hostfile(write_hostfile(tmp_path, f"# hosts\ngood slots=8\n{line}\n"))
    assert "line 3" in str(caught.value) and complaint in str(caught.value)


def test_a_missing_or_empty_hostfile_is_an_error_and_never_a_local_run(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="not there"):
        parse_hostfile(tmp_path / "nothing")
    with pytest.raises(LaunchError, match="names no host"):
        parse_hostfile(write_hostfile(tmp_path, "# only a comment\n"))


def test_every_hostfile_of_the_repository_parses() -> None:
    ranks = {
        p.name: sum(h.slots for h in parse_hostfile(p)) for p in (ROOT / "hostfiles").iterdir() if p.suffix != ".md"
    }
    assert ranks == {"local": 2, "a100_16x8": 128, "a100_32x8": 256}


def test_filters_keep_what_they_say() -> None:
    hosts = [Host("a", 2), Host("b", 4)]
    assert select_slots(hosts) == {"a": (0, 1), "b": (0, 1, 2, 3)}
    assert select_slots(hosts, include="b:3,1@a") == {"a": (0, 1), "b": (1, 3)}
    assert select_slots(hosts, exclude="a@b:0") == {"b": (1, 2, 3)}


@pytest.mark.parametrize(
    ("include", "exclude"), [("a", "b"), ("c", ""), ("", "a:7"), ("a:x", ""), ("a:", ""), ("", "a@b"), ("a@", "")]
)
def test_a_filter_that_means_nothing_is_refused(include: str, exclude: str) -> None:
    with pytest.raises(ConfigError):
        select_slots([Host("a", 2), Host("b", 4)], include=include, exclude=exclude)


def test_the_command_of_a_local_run_needs_no_ssh(tmp_path: Path) -> None:
    hostfile = write_hostfile(tmp_path, "localhost slots=2\n")
    options = LaunchOptions(hostfile=hostfile, master_port=29501)
    assert launch_command("run.yaml", ["seed=3", "a=b c{1,2}"], options) == [
        *RUNNER, "--hostfile", str(hostfile), "--master_port", "29501", "--no_ssh_check", "--master_addr", "127.0.0.1",
        "--no_local_rank", "--module", "jp_train.cluster.rank", "train", "run.yaml", "seed=3", "a=b c{1,2}",
    ]  # fmt: skip


def test_the_command_of_a_remote_run_forces_the_remote_launcher_even_for_one_host(tmp_path: Path) -> None:
    hostfile = write_hostfile(tmp_path, "node1 slots=2\nnode2 slots=2\n")
    options = LaunchOptions(hostfile=hostfile, include="node2:1")
    assert launch_command("run.yaml", ["data.sources.x.shards=s-{0..9}.tar"], options) == [
        *RUNNER, "--hostfile", str(hostfile), "--master_port", "29500", "--include", "node2:1", "--launcher", "pdsh",
        "--force_multi",
        "--no_local_rank", "--module", "jp_train.cluster.rank", "train", "run.yaml",
        "'data.sources.x.shards=s-{0..9}.tar'",
    ]  # fmt: skip


def test_deepspeeds_own_parser_reads_the_command_as_meant(tmp_path: Path) -> None:
    from deepspeed.launcher.runner import parse_args

    hostfile = write_hostfile(tmp_path, "node1 slots=2\nnode2 slots=2\n")
    parsed = parse_args(launch_command("run.yaml", ["seed=3"], LaunchOptions(hostfile=hostfile, exclude="node1:0"))[3:])
    assert (parsed.user_script, parsed.user_args) == ("jp_train.cluster.rank", ["train", "run.yaml", "seed=3"])
    assert (
        parsed.module
        and parsed.force_multi
        and parsed.no_local_rank
        and parsed.exclude == "node1:0"
        and parsed.launcher == "pdsh"
    )


def test_an_argument_that_the_remote_shell_would_change_is_refused() -> None:
    for argument in ("a=100%", "a=b\nc", "a=$HOME x", "a=`id` x", "a=\\ x"):
        with pytest.raises(LaunchError, match="configuration file"):
            remote_argument(argument)


def test_mpirun_gets_the_hosts_in_order_and_the_names_of_variables_but_no_value(tmp_path: Path) -> None:
    hostfile = write_hostfile(tmp_path, "node2 slots=2\nnode1 slots=4\n")
    options = LaunchOptions(
        hostfile=hostfile, exclude="node1:0", launcher="openmpi", launcher_args="--mca btl_tcp_if_include 'ib 0'"
    )
    passed = passed_environment({"NCCL_DEBUG": "INFO", "HF_TOKEN": "s3cret"})
    command = ranks_command(["train", "run.yaml", "a=b c"], options, passed)
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    assert command == [
        "mpirun", "-n", "5", "--host", "node2:2,node1:3", "--map-by", "slot", "--bind-to", "none", "--wdir",
        os.getcwd(), *root,
        "-x", "NCCL_DEBUG", "--mca", "btl_tcp_if_include", "ib 0",
        sys.executable, "-u", "-m", "jp_train.cluster.rank", "train", "run.yaml", "a=b c",
    ]  # fmt: skip


def test_srun_gets_one_task_a_slot_in_blocks_and_refuses_unequal_hosts(tmp_path: Path) -> None:
    hostfile = write_hostfile(tmp_path, "node1 slots=2\nnode2 slots=2\n")
    command = launch_command(
        "run.yaml", [], LaunchOptions(hostfile=hostfile, launcher="slurm", launcher_args="--mpi=none")
    )
    assert command == [
        "srun", "--nodes", "2", "--ntasks", "4", "--ntasks-per-node", "2", "--nodelist", "node1,node2",
        "--distribution", "block",
        "--kill-on-bad-exit=1", "--unbuffered", "--export", "ALL", "--chdir", os.getcwd(), "--mpi=none",
        sys.executable, "-u", "-m", "jp_train.cluster.rank", "train", "run.yaml",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="node1 1, node2 2"):
        launch_command("run.yaml", [], LaunchOptions(hostfile=hostfile, launcher="slurm", exclude="node1:0"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"launcher": "mpich"},
        {"master_port": 80},
        {"master_addr": "-oProxyCommand=x"},
        {"max_restarts": -1},
        {"grace_s": float("nan")},
        {"patience_s": 0.0},
        {"launcher_args": "--mca x y"},
        {"launcher": "slurm", "launcher_args": "'open"},
    ],
)
def test_options_that_cannot_be_meant_are_refused(tmp_path: Path, wrong: dict) -> None:
    with pytest.raises(ConfigError):
        LaunchOptions(hostfile=tmp_path, **wrong)


@pytest.mark.parametrize(
    "told",
    [
        {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"},
        {"SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4", "SLURMD_NODENAME": "node1"},
    ],
)
def test_a_rank_learns_its_number_from_open_mpi_or_slurm(told: dict[str, str]) -> None:
    ours = {"JP_TRAIN_WORLD": "node2:1,3@node1:0,1", "JP_TRAIN_MASTER_ADDR": "node2", "JP_TRAIN_MASTER_PORT": "29501"}
    env = rank_environment(told | ours)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES")
    assert [env[name] for name in names] == ["2", "0", "4", "node2", "29501", "0,1"]
    assert rank_environment(told | ours | {"CUDA_VISIBLE_DEVICES": "5"})["CUDA_VISIBLE_DEVICES"] == "5", (
        "what Slurm has chosen stays"
    )


def test_a_rank_that_slurm_has_put_on_another_host_than_the_hostfile_is_refused() -> None:
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


def test_secrets_and_unsafe_values_never_leave_the_launching_host() -> None:
    environ = {"WANDB_API_KEY": "s3cret", "HF_TOKEN": "s3cret", "NCCL_DEBUG": "INFO", "WANDB_MODE": "offline",
               "NCCL_X": "$(id)", "HOME": "/root",
               "TOKENIZERS_PARALLELISM": "false", "HF_EMPTY": "", "MLFLOW_TRACKING_TOKEN": "s3cret",
               "PYTHONSTARTUP": "a'b", "CUDA_VISIBLE_DEVICES": "1"}  # fmt: skip
    passed = passed_environment(environ)
    assert passed.text() == "NCCL_DEBUG=INFO\nTOKENIZERS_PARALLELISM=false\nWANDB_MODE=offline\n"
    assert passed.secrets == ("HF_TOKEN", "WANDB_API_KEY") and passed.unsafe == ("HF_EMPTY", "NCCL_X")
    runner = runner_environment(environ, "id", local=False)
    assert (
        not {"MLFLOW_TRACKING_TOKEN", "PYTHONSTARTUP", "NCCL_X"} & set(runner) and runner["WANDB_API_KEY"] == "s3cret"
    )


def test_exit_codes_mean_what_they_say() -> None:
    for code in (0, 2, 3, 4, 5):
        assert exit_code(code, None, "") == code and exit_code(code, signal.SIGTERM, "") == code
    assert (
        exit_code(143, None, "") == 143
        and exit_code(1, signal.SIGTERM, "") == 143
        and exit_code(241, signal.SIGINT, "") == 130
    )
    assert (
        exit_code(1, None, "DataError") == 3
        and exit_code(1, None, "CheckpointError") == 4
        and exit_code(1, None, "ValueError") == 1
    )
    for killed in (247, -9):
        with pytest.raises(LaunchError, match="SIGKILL"):
            exit_code(killed, None, "")


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
    assert "deepspeed.launcher.runner" in text and "seed=3" in text
    with pytest.raises(ConfigError, match="100"):
        launch(config, [], LaunchOptions(hostfile=write_hostfile(tmp_path, "node1 slots=100\n"), dry_run=True))


def test_a_busy_port_is_an_error_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        with pytest.raises(LaunchError, match="--master-port"):
            options = LaunchOptions(hostfile=ROOT / "hostfiles" / "local", master_port=busy.getsockname()[1])
            launch(ROOT / "examples" / "smoke" / "stage1.yaml", [f"run_dir={tmp_path / 'run'}"], options)


def test_a_run_folder_in_which_another_job_trains_is_refused_with_its_host_and_process(tmp_path: Path) -> None:
    held = take(tmp_path / "run")
    try:
        with pytest.raises(LaunchError, match=f"process {os.getpid()} on {socket.gethostname()}"):
            options = LaunchOptions(hostfile=ROOT / "hostfiles" / "local", master_port=free_port())
            launch(ROOT / "examples" / "smoke" / "stage1.yaml", [f"run_dir={tmp_path / 'run'}"], options)
    finally:
        held.release()


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


def test_remote_ranks_get_their_arguments_unchanged_and_one_stop_signal(stand_in: Path) -> None:
    programs = stand_in / "bin"
    programs.mkdir()
    for name, text in (("pdsh", PDSH.format(python=sys.executable)), ("ssh", SSH)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    overrides = ["data.root=a {b,c} \"d\" 'e' * ~", "data.system_prompt=$(id)`id`;&|<>*{1..3}[x]\"'!#", "seed=3"]
    env = {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "WANDB_API_KEY": "s3cret",
        "WANDB_MODE": "offline",
        "JP_TRAIN_NOTE": "two words",
    }
    running = start(stand_in, "alpha slots=1\nbeta slots=1\n", overrides, **env)
    ranks = ranks_started(stand_in, running)
    assert [rank["argv"][2:] for rank in ranks] == [overrides] * 2
    assert [(r["env"]["RANK"], r["env"]["LOCAL_RANK"]) for r in ranks] == [("0", "0"), ("1", "0")]
    assert all(
        rank["env"]["JP_TRAIN_NOTE"] == "two words"
        and re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{8}", rank["env"]["JP_TRAIN_LAUNCH_ID"])
        for rank in ranks
    )
    check_stop(stand_in, running, ranks)
