"""The command that starts the ranks, for each launcher."""

from __future__ import annotations

import ast
import base64
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from jp_train.cluster.command import rank_variables, ranks_command
from jp_train.cluster.environment import PassedEnvironment
from jp_train.cluster.options import LaunchOptions
from jp_train.errors import ConfigError, LaunchError
from tests.cluster.test_hostfile import write_hostfile

RUNNER = [sys.executable, "-m", "deepspeed.launcher.runner"]
NOTHING = PassedEnvironment({}, {}, {})


def test_the_command_of_a_local_run_needs_no_ssh(tmp_path: Path) -> None:
    hostfile = write_hostfile(tmp_path, "localhost slots=2\n")
    options = LaunchOptions(hostfile=hostfile, master_port=29501)
    assert ranks_command(["train", "run.yaml", "seed=3", "a=b c{1,2}"], options, NOTHING) == [
        *RUNNER, "--hostfile", str(hostfile), "--master_port", "29501", "--no_ssh_check", "--master_addr", "127.0.0.1",
        "--no_local_rank", "--module", "jp_train.cluster.rank", "train", "run.yaml", "seed=3", "a=b c{1,2}",
    ]  # fmt: skip


def test_a_range_is_not_given_to_deepspeeds_runner_on_this_host_which_would_not_read_it(tmp_path: Path) -> None:
    hostfile = write_hostfile(tmp_path, "127.0.0.[1-2] slots=2\n")
    with pytest.raises(LaunchError, match=r"has 127\.0\.0\.1, this host, in a range.*line of its own"):
        ranks_command(["train"], LaunchOptions(hostfile=hostfile, include="127.0.0.1"), NOTHING)


def test_pdsh_starts_deepspeeds_launcher_with_words_and_values_that_no_shell_changes(tmp_path: Path) -> None:
    hostfile = write_hostfile(tmp_path, "me@node[1-2] slots=2\n")
    options = LaunchOptions(hostfile=hostfile, include="me@node2:1", master_addr="10.0.0.2")
    passed = PassedEnvironment({"NCCL_SOCKET_IFNAME": "^lo,50% $HOME 'x'"}, {}, {})
    argument = "data.system_prompt=100%n $(id) \"'\n\\ ~"
    *pdsh, text = ranks_command(["train", "run.yaml", argument], options, passed)
    assert pdsh == ["pdsh", "-S", "-R", "ssh", "-f", "1024", "-w", "me@node2"]  # one remote host, too
    show = "import os, sys; print([os.getcwd(), os.environ['NCCL_SOCKET_IFNAME'], *sys.argv[1:]])"
    launcher = shlex.join([sys.executable, "-u", "-m", "deepspeed.launcher.launch"])
    assert text.count(launcher) == 1
    remote = text.replace(launcher, shlex.join([sys.executable, "-c", show]))
    remote = remote.replace("--node_rank=%n", "--node_rank=0").replace("%%", "%")  # as pdsh does
    done = subprocess.run(["sh", "-c", remote], capture_output=True, text=True, check=True)
    cwd, value, world, *rest = ast.literal_eval(done.stdout)
    assert (cwd, value) == (os.getcwd(), "^lo,50% $HOME 'x'")
    assert json.loads(base64.urlsafe_b64decode(world.removeprefix("--world_info="))) == {"me@node2": [1]}
    assert rest == [
        "--node_rank=0", "--master_addr=10.0.0.2", "--master_port=29500", "--no_local_rank", "--module",
        "jp_train.cluster.rank", "train", "run.yaml", argument,
    ]  # fmt: skip


def test_deepspeeds_own_parsers_read_the_commands_as_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.launcher import launch, runner

    hostfile = write_hostfile(tmp_path, "localhost slots=2\n")
    options = LaunchOptions(hostfile=hostfile, exclude="localhost:0")
    local = runner.parse_args(ranks_command(["train", "run.yaml", "seed=3"], options, NOTHING)[3:])
    assert (local.user_script, local.user_args) == ("jp_train.cluster.rank", ["train", "run.yaml", "seed=3"])
    assert local.module and local.no_local_rank and local.exclude == "localhost:0"
    hostfile = write_hostfile(tmp_path, "node1 slots=2\nnode2 slots=2\n")
    text = ranks_command(["train", "run.yaml", "seed=3"], LaunchOptions(hostfile=hostfile), NOTHING)[-1]
    words = shlex.split(text.replace("%n", "1"))
    monkeypatch.setattr(sys, "argv", words[words.index("deepspeed.launcher.launch") :])
    remote = launch.parse_args()
    assert (remote.training_script, remote.training_script_args) == (local.user_script, local.user_args)
    assert remote.module and remote.no_local_rank and remote.node_rank == 1


def test_mpirun_gets_the_hosts_in_order_and_the_names_of_variables_but_no_value(tmp_path: Path) -> None:
    hostfile = write_hostfile(tmp_path, "node2 slots=2\nnode1 slots=4\n")
    options = LaunchOptions(
        hostfile=hostfile, exclude="node1:0", launcher="openmpi", launcher_args="--mca btl_tcp_if_include 'ib 0'",
        ssh_args="-p 2222",
    )  # fmt: skip
    passed = PassedEnvironment({"NCCL_DEBUG": "INFO"}, {"HF_TOKEN": "it looks secret"}, {})
    command = ranks_command(["train", "run.yaml", "a=b c"], options, passed)
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    assert command == [
        "mpirun", "-n", "5", "--host", "node2:2,node1:3", "--map-by", "slot", "--bind-to", "none", "--wdir",
        os.getcwd(), *root,
        "-x", "NCCL_DEBUG", "--mca", "plm_rsh_args", "-p 2222", "--mca", "btl_tcp_if_include", "ib 0",
        sys.executable, "-u", "-m", "jp_train.cluster.rank", "train", "run.yaml", "a=b c",
    ]  # fmt: skip


def test_srun_gets_one_task_a_slot_in_blocks_and_refuses_unequal_hosts(tmp_path: Path) -> None:
    hostfile = write_hostfile(tmp_path, "node1 slots=2\nnode2 slots=2\n")
    options = LaunchOptions(hostfile=hostfile, launcher="slurm", launcher_args="--mpi=none")
    command = ranks_command(["train", "run.yaml"], options, NOTHING)
    assert command == [
        "srun", "--nodes", "2", "--ntasks", "4", "--ntasks-per-node", "2", "--nodelist", "node1,node2",
        "--distribution", "block",
        "--kill-on-bad-exit=1", "--unbuffered", "--export", "ALL", "--chdir", os.getcwd(), "--mpi=none",
        sys.executable, "-u", "-m", "jp_train.cluster.rank", "train", "run.yaml",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="node1 1, node2 2"):
        options = LaunchOptions(hostfile=hostfile, launcher="slurm", exclude="node1:0")
        ranks_command(["train", "run.yaml"], options, NOTHING)


@pytest.mark.parametrize("launcher", ["openmpi", "slurm"])
@pytest.mark.parametrize("host", ["me@node1", "fd00::1"])
def test_mpirun_and_srun_which_cannot_take_a_user_or_an_ipv6_address_are_not_given_one(
    tmp_path: Path, launcher: str, host: str
) -> None:
    hostfile = write_hostfile(tmp_path, f"{host} slots=2\nnode2 slots=2\n")
    with pytest.raises(ConfigError, match=f"--launcher {launcher} cannot take {host} .*ssh/config"):
        ranks_command(["train", "run.yaml"], LaunchOptions(hostfile=hostfile, launcher=launcher), NOTHING)


def test_a_rank_gets_the_slots_of_all_ranks_and_the_rendezvous_where_the_launcher_gives_none(tmp_path: Path) -> None:
    hostfile = write_hostfile(tmp_path, "node2 slots=2\nnode1 slots=1\n")
    options = LaunchOptions(hostfile=hostfile)
    assert rank_variables(options, "/logs") == {"JP_TRAIN_WORLD": "node2:0,1@node1:0", "JP_TRAIN_LOGS": "/logs"}
    slurm = rank_variables(LaunchOptions(hostfile=hostfile, launcher="slurm", master_port=30000), "")
    assert slurm == {
        "JP_TRAIN_WORLD": "node2:0,1@node1:0", "JP_TRAIN_MASTER_ADDR": "node2", "JP_TRAIN_MASTER_PORT": "30000",
    }  # fmt: skip
