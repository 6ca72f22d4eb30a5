"""`jp-train preflight` on this very machine, as one local host and over an ssh that is not there. Several hosts:
tests/multinode."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jp_train.cluster.options import LaunchOptions
from jp_train.cluster.preflight import checkpoint_bytes, preflight, probe_environment
from jp_train.config import load_config
from jp_train.errors import ConfigError, LaunchError

ROOT = Path(__file__).resolve().parents[2]


def write(folder: Path, text: str) -> Path:
    path = folder / "hostfile"
    path.write_text(text)
    return path


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "jp_train", "preflight", *arguments]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def free_port() -> int:
    import socket

    with socket.create_server(("", 0)) as made:
        return int(made.getsockname()[1])


def test_one_local_host_needs_no_ssh_and_json_is_alone_on_stdout(tmp_path: Path) -> None:
    done = run(
        "--hostfile",
        str(write(tmp_path, "localhost slots=1\n")),
        "--master-port",
        str(free_port()),
        "--json",
        "--skip",
        "locks,disk",
    )
    report = json.loads(done.stdout)
    assert (done.returncode, report["faults"]) == (0, []), done.stdout
    assert report["hosts"]["localhost"]["address"].startswith("127.") and "preflight: 1/" in done.stderr
    assert (
        any(note.startswith("no GPU on any host") for note in report["notes"]) or report["hosts"]["localhost"]["GPUs"]
    )
    assert "not looked at, as asked: disk, locks" in report["notes"]


def test_a_run_whose_data_is_missing_exits_with_5_and_leaves_no_run_folder(tmp_path: Path) -> None:
    hostfile = write(tmp_path, "localhost slots=1\n")
    overrides = [
        f"data.root={tmp_path}",
        f"run_dir={tmp_path / 'run'}",
        f"tokenizer.path={tmp_path}",
        f"model.init_from={tmp_path}",
    ]
    done = run(
        "examples/smoke/stage2.yaml",
        *overrides,
        "--hostfile",
        str(hostfile),
        "--master-port",
        str(free_port()),
        "--skip",
        "locks",
    )
    assert done.returncode == 5, done.stdout
    assert "FAULT  localhost  data: source digits-und: shards 'digits-und'" in done.stdout
    assert "-> correct data.root and the paths in the configuration" in done.stdout
    assert not (tmp_path / "run").exists()


def test_hosts_without_an_ssh_server_are_faults_of_a_few_seconds(tmp_path: Path) -> None:
    # addresses of the machine's own loopback network, where no ssh server can be reached by key
    report = preflight(LaunchOptions(hostfile=write(tmp_path, "127.9.9.1 slots=1\nno-such-host.invalid slots=1\n")))
    assert [(fault.host, fault.check) for fault in report.faults] == [
        ("127.9.9.1", "ssh"),
        ("no-such-host.invalid", "ssh"),
    ]
    assert report.faults[1].message.startswith("unknown host name") and report.exit_code == 5 and report.hosts == {}


def test_a_wrong_call_is_a_config_error_before_any_host_is_asked(tmp_path: Path) -> None:
    options = LaunchOptions(hostfile=write(tmp_path, "localhost slots=1\n"))
    with pytest.raises(ConfigError, match="no check 'colour' to skip; there are versions"):
        preflight(options, skip=["colour"])
    with pytest.raises(ConfigError, match="--timeout"):
        preflight(options, timeout_s=float("nan"))
    with pytest.raises(ConfigError, match="nothere"):
        preflight(options, config=tmp_path / "nothere.yaml")
    with pytest.raises(LaunchError, match="is not there"):
        preflight(LaunchOptions(hostfile=tmp_path / "nothere"))


def test_the_probes_get_what_the_ranks_get_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".deepspeed_env").write_text("NCCL_IB_HCA=^mlx5_0\n")
    given = {
        "NCCL_SOCKET_IFNAME": "^lo,docker0",
        "GLOO_SOCKET_IFNAME": "eth1",
        "WANDB_API_KEY": "s3cret",
        "PYTHONPATH": "/a b",
        "HOME": str(tmp_path),
        "NCCL_TOKEN": "x",
        "EDITOR": "vi",
    }
    options = LaunchOptions(hostfile=tmp_path, env=["EDITOR"])
    assert probe_environment(given, options, local=True) == {"OMP_NUM_THREADS": "1"}
    env = probe_environment(given, options, local=False)
    assert env == {
        "EDITOR": "vi",
        "NCCL_IB_HCA": "^mlx5_0",
        "NCCL_SOCKET_IFNAME": "^lo,docker0",
        "GLOO_SOCKET_IFNAME": "eth1",
        "PYTHONPATH": "/a b",
        "OMP_NUM_THREADS": "1",
    }


def test_the_room_for_a_checkpoint_is_a_lower_bound_by_the_language_model() -> None:
    cfg = load_config(ROOT / "launch/janus_pro_7b_stage2.yaml")
    # 30 layers of 4 x 4096^2 + 3 x 4096 x 11008 weights, and 102400 x 4096 twice, with 12 bytes each
    assert checkpoint_bytes(cfg) == 12 * (30 * (4 * 4096**2 + 3 * 4096 * 11008) + 2 * 102400 * 4096)
    assert checkpoint_bytes(load_config(ROOT / "launch/janus_pro_7b_stage1.yaml")) == 0


def test_importing_preflight_loads_no_torch() -> None:
    code = (
        "import sys, jp_train.cluster.preflight, jp_train.cluster.probe; "
        "print(bool({'torch', 'deepspeed', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
