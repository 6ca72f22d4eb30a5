"""What ships to be run: every shell script is clean, every launch YAML is checked and becomes a command on the
cluster that it is meant for."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from jp_train.cluster.hostfile import parse_hostfile
from jp_train.cluster.launch import launch
from jp_train.cluster.options import LaunchOptions
from jp_train.config import load_config
from jp_train.tools.check.check import check

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted([*(ROOT / "launch").glob("*.sh"), *(ROOT / "launch").glob("*.sbatch"), ROOT / ".ci" / "run"])
CONFIGS = sorted((ROOT / "launch").glob("*.yaml"))


def hostfile_of(config: Path) -> Path:
    """The paper's cluster of a configuration; smoke and showcase run on one machine."""
    big = config.stem in ("janus_pro_7b_stage1", "janus_pro_7b_stage2")
    name = "a100_32x8" if big else "a100_16x8" if config.stem.startswith("janus_pro") else "local"
    return ROOT / "hostfiles" / name


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_parses_and_is_clean(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (Debian: apt-get install shellcheck)")
    done = subprocess.run(
        ["shellcheck", "--severity", "style", str(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_launch_configuration_is_sound_and_becomes_a_command_for_its_cluster(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    hostfile = hostfile_of(config)
    found = check(load_config(config), hostfile, config_only=True)
    assert found["problems"] == []
    assert launch(config, ["seed=3"], LaunchOptions(hostfile=hostfile, dry_run=True)) == 0
    told = capsys.readouterr().out
    ranks = sum(host.slots for host in parse_hostfile(hostfile))
    assert f"{ranks} ranks on" in told and found["batch"]["text"] in told
    assert told.rstrip().endswith(f"--module jp_train.cluster.rank train {config} seed=3'"), (
        "the words of pdsh are one quoted command"
    )


def test_train_all_launches_the_stages_in_order_and_stops_at_the_first_that_fails(tmp_path: Path) -> None:
    program = tmp_path / "jp-train"
    program.write_text('#!/bin/sh\necho "$@" >> calls\ncase "$2" in *stage2*) exit "${FAIL:-0}";; esac\n')
    program.chmod(0o755)
    script = [str(ROOT / "launch" / "train_all.sh"), "janus_pro_7b", "big", "seed=3", "--skip-preflight"]
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "STAGE3_HOSTFILE": "small", "MAX_RESTARTS": "7"}
    subprocess.run(script, cwd=tmp_path, env=env, check=True, capture_output=True)
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"launch launch/janus_pro_7b_stage{stage}.yaml --hostfile {hostfile} --max-restarts 7 seed=3 --skip-preflight"
        for stage, hostfile in ((1, "big"), (2, "big"), (3, "small"))
    ]
    (tmp_path / "calls").unlink()
    failed = subprocess.run(script, cwd=tmp_path, env=env | {"FAIL": "4"}, check=False, capture_output=True)
    assert failed.returncode == 4 and len((tmp_path / "calls").read_text().splitlines()) == 2


@pytest.mark.parametrize("code", [143, 0])
def test_a_signal_to_train_all_reaches_the_launch_and_no_further_stage_starts(tmp_path: Path, code: int) -> None:
    """`jp-train` stands for a launch that saves and ends with `code`: 0 where the signal comes in the last step of
    its stage."""
    program = tmp_path / "jp-train"
    wait = f'trap "echo saved >> calls; exit {code}" TERM; kill -TERM "$PPID"; while :; do sleep 0.05; done'
    program.write_text(f'#!/bin/sh\necho "$2" >> calls\n{wait}\n')
    program.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = [str(ROOT / "launch" / "train_all.sh"), "janus_pro_1b", "hosts"]
    done = subprocess.run(script, cwd=tmp_path, env=env, check=False, capture_output=True, timeout=60)
    assert done.returncode == 143
    assert (tmp_path / "calls").read_text().splitlines() == ["launch/janus_pro_1b_stage1.yaml", "saved"]


@pytest.mark.parametrize(
    ("signal_name", "code", "requeued"), [("USR1", 143, True), ("TERM", 143, False), ("", 0, False), ("", 5, False)]
)
def test_the_slurm_script_queues_the_job_again_only_when_time_ran_out_after_a_save(
    tmp_path: Path, signal_name: str, code: int, requeued: bool
) -> None:
    """`jp-train` stands for a launch: it waits for the stop signal, where there is one, and ends with `code`."""
    (tmp_path / "scontrol").write_text(
        '#!/bin/sh\ncase "$1" in show) printf "node1\\nnode2\\n";; *) echo "$@" >> requeued;; esac\n'
    )
    wait = (
        f'trap "exit {code}" TERM; kill -{signal_name} "$PPID"; while :; do sleep 0.05; done'
        if signal_name
        else f"exit {code}"
    )
    (tmp_path / "jp-train").write_text(f'#!/bin/sh\necho "$@" > call\ncat "$4" > hosts\n{wait}\n')
    for name in ("scontrol", "jp-train"):
        (tmp_path / name).chmod(0o755)
    env = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_ID": "17",
        "SLURM_GPUS_ON_NODE": "4",
    }
    env["TMPDIR"] = str(tmp_path)
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "slurm.sbatch"), "run.yaml", "seed=3"],
        cwd=tmp_path,
        env=env,
        check=False,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == code
    words = (tmp_path / "call").read_text().split()
    assert words[:2] == ["launch", "run.yaml"] and words[4:] == ["--max-restarts", "2", "seed=3"]
    assert (tmp_path / "hosts").read_text() == "node1 slots=4\nnode2 slots=4\n"
    assert (tmp_path / "requeued").exists() == requeued
    assert not list(tmp_path.glob("hostfile.*")), "the script removes its hostfile"
