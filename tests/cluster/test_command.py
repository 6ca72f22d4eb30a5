"""The command that starts the ranks, for each launcher."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from jp_train.cluster.command import rank_variables, ranks_command, remote_argument
from jp_train.cluster.environment import passed_environment
from jp_train.cluster.options import LaunchOptions
from jp_train.errors import ConfigError, LaunchError
from tests.cluster.test_hostfile import write_hostfile

RUNNER = [sys.executable, "-m", "deepspeed.launcher.runner"]


def test_the_command_of_a_local_run_needs_no_ssh(tmp_path: Path) -> None:
    hostfile = write_hostfile(tmp_path, "localhost slots=2\n")
    options = LaunchOptions(hostfile=hostfile, master_port=29501)
    assert ranks_command(["train", "run.yaml", "seed=3", "a=b c{1,2}"], options) == [
        *RUNNER, "--hostfile", str(hostfile), "--master_port", "29501", "--no_ssh_check", "--master_addr", "127.0.0.1",
        "--no_local_rank", "--module", "jp_train.cluster.rank", "train", "run.yaml", "seed=3", "a=b c{1,2}",
    ]  # fmt: skip


def test_the_command_of_a_remote_run_forces_the_remote_launcher_even_for_one_host(tmp_path: Path) -> None:
    hostfile = write_hostfile(tmp_path, "node1 slots=2\nnode2 slots=2\n")
    options = LaunchOptions(hostfile=hostfile, include="node2:1")
    assert ranks_command(["train", "run.yaml", "data.sources.x.shards=s-{0..9}.tar"], options) == [
        *RUNNER, "--hostfile", str(hostfile), "--master_port", "29500", "--include", "node2:1", "--launcher", "pdsh",
        "--force_multi",
        "--no_local_rank", "--module", "jp_train.cluster.rank", "train", "run.yaml",
        "'data.sources.x.shards=s-{0..9}.tar'",
    ]  # fmt: skip


def test_deepspeeds_own_parser_reads_the_command_as_meant(tmp_path: Path) -> None:
    from deepspeed.launcher.runner import parse_args

    hostfile = write_hostfile(tmp_path, "node1 slots=2\nnode2 slots=2\n")
    parsed = parse_args(
        ranks_command(["train", "run.yaml", "seed=3"], LaunchOptions(hostfile=hostfile, exclude="node1:0"))[3:]
    )
    assert (parsed.user_script, parsed.user_args) == ("jp_train.cluster.rank", ["train", "run.yaml", "seed=3"])
    assert (
        parsed.module
        and parsed.force_multi
        and parsed.no_local_rank
        and parsed.exclude == "node1:0"
        and parsed.launcher == "pdsh"
    )


def test_an_argument_that_the_remote_shell_would_change_is_rejected() -> None:
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
    command = ranks_command(
        ["train", "run.yaml"], LaunchOptions(hostfile=hostfile, launcher="slurm", launcher_args="--mpi=none")
    )
    assert command == [
        "srun", "--nodes", "2", "--ntasks", "4", "--ntasks-per-node", "2", "--nodelist", "node1,node2",
        "--distribution", "block",
        "--kill-on-bad-exit=1", "--unbuffered", "--export", "ALL", "--chdir", os.getcwd(), "--mpi=none",
        sys.executable, "-u", "-m", "jp_train.cluster.rank", "train", "run.yaml",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="node1 1, node2 2"):
        ranks_command(["train", "run.yaml"], LaunchOptions(hostfile=hostfile, launcher="slurm", exclude="node1:0"))


def test_a_rank_gets_the_slots_of_all_ranks_and_the_rendezvous_where_the_launcher_gives_none(tmp_path: Path) -> None:
    hostfile = write_hostfile(tmp_path, "node2 slots=2\nnode1 slots=1\n")
    options = LaunchOptions(hostfile=hostfile)
    assert rank_variables(options, "/logs") == {"JP_TRAIN_WORLD": "node2:0,1@node1:0", "JP_TRAIN_LOGS": "/logs"}
    slurm = rank_variables(LaunchOptions(hostfile=hostfile, launcher="slurm", master_port=30000), "")
    assert slurm == {
        "JP_TRAIN_WORLD": "node2:0,1@node1:0", "JP_TRAIN_MASTER_ADDR": "node2", "JP_TRAIN_MASTER_PORT": "30000",
    }  # fmt: skip
