"""What ranks on two hosts find in their environment, read there, under each launcher; and hosts that are reached by
user, IPv6 address and port."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jp_train.config import save_config
from tests.engine.tiny_run import tiny_run, write_data
from tests.multinode.cluster_rig import Cluster

ROOT = Path(__file__).resolve().parents[2]
PORT = 2222
TABLE = {
    "NCCL_SOCKET_IFNAME": "^lo,docker0",
    "NCCL_TOPO_FILE": "~/x",
    "NCCL_TUNER_CONFIG": "(v1) a;b",
    "UCX_TLS": "$HOME",
    "PYTORCH_CUDA_ALLOC_CONF": '"quoted"',
    "CUBLAS_WORKSPACE_CONFIG": "it's",
    "WANDB_NAME": "back\\slash \\n \\",
    "WANDB_NOTES": "  two  spaces\tand a tab ",
    "WANDB_PROJECT": "Größe 模型 (v2)",
    "HF_EMPTY": "",
    "OFI_NCCL_X": "100% %n %h %% %u",
    "NVTE_X": "`id` $(id) ${HOME}",
    "MKL_X": "a!b !! *?[a]{1,2} a&b|c<d>e #x",
    "https_proxy": "http://proxy:3128/?a=b;c&d",
    "PYTHONPATH": "/no where/$x",
    "MLFLOW_X": 'a"b$c`d',
}
CREDENTIALS = {"HF_TOKEN": "s3cret", "AWS_SECRET_ACCESS_KEY": "a/b+s3cret=\n'\"$x 模型"}
HELD_BACK = {"WANDB_API_KEY": "s3cret", "UCX_LINES": "a\nb", "http_proxy": "http://me:s3cret@proxy:3128"}
SHOW = """
import json, os
from pathlib import Path
shown = b""
for path in Path("/proc").glob("[0-9]*/cmdline"):
    try:
        shown += path.read_bytes()
    except OSError:
        pass
assert b"s3cret" not in shown
Path(f"rank{os.environ['RANK']}.json").write_text(json.dumps(dict(os.environ)))
"""
DRIVER = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from jp_train.cluster.launch import launch_ranks
from jp_train.cluster.options import LaunchOptions
from jp_train.cluster.preflight import probe_environment
from jp_train.cluster.remote import run_on_hosts
options = LaunchOptions(hostfile=Path("hostfile"), launcher=sys.argv[1], ssh_args=sys.argv[2], env=["OTHER"])
show = "import json, os; print(json.dumps(dict(os.environ)))"
probes = run_on_hosts(
    options.selection(), [sys.executable, "-c", show], timeout_s=30, ssh_args=options.ssh_words(),
    env=probe_environment(os.environ, options, local=False),
)
for number, answer in enumerate(probes.values()):
    assert answer.ok, answer
    Path(f"probe{{number}}.json").write_text(answer.stdout)
raise SystemExit(launch_ranks(["show"], options))
"""


@pytest.fixture(scope="module")
def cluster(make_cluster: Callable[..., Cluster]) -> Cluster:
    return make_cluster(hosts=2, port=PORT)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the ranks start: its `jp_train` writes down what it finds."""
    (tmp_path / "jp_train").mkdir()
    (tmp_path / "jp_train" / "__init__.py").write_text(f"__path__.append({str(ROOT / 'jp_train')!r})\n")
    (tmp_path / "jp_train" / "__main__.py").write_text(SHOW)
    (tmp_path / ".deepspeed_env").write_text("NCCL_IB_HCA=^mlx5_0 (a)\nNCCL_DEBUG=WARN\nMY_KEY=s3cret\n")
    (tmp_path / "driver.py").write_text(DRIVER.format(root=str(ROOT)))
    return tmp_path


def environments(folder: Path, what: str) -> list[dict[str, str]]:
    return [json.loads((folder / f"{what}{number}.json").read_text()) for number in (0, 1)]


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi", "slurm"])
def test_every_value_reaches_the_ranks_and_the_probes_unchanged_and_what_is_held_back_is_named(
    launcher: str, folder: Path, request: Any
) -> None:
    expected = TABLE | {"OTHER": "^x", "NCCL_IB_HCA": "^mlx5_0 (a)", "NCCL_DEBUG": "WARN"}
    given = (
        TABLE
        | HELD_BACK
        | CREDENTIALS
        | {"OTHER": "^x", "NCCL_DEBUG": "INFO", "HOME": str(folder), "DS_ACCELERATOR": "cpu"}
    )
    words = ["driver.py", launcher, f"-p {PORT}"]
    start: list[str] = []
    if launcher == "slurm":
        cluster, env = request.getfixturevalue("slurm")
        start, words[2] = ["salloc", "-N2", "--exclusive"], ""
        given |= env
    elif launcher == "openmpi" and shutil.which("mpirun") is None:
        pytest.skip("not installed: mpirun (Debian: apt-get install openmpi-bin)")
    else:
        cluster = request.getfixturevalue("cluster")
    (folder / "hostfile").write_text("node[1-2] slots=1\n")
    done = cluster.run("node1", [*start, sys.executable, *words], env=given, cwd=str(folder), timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    for what in ("rank", "probe"):
        for found in environments(folder, what):
            assert {name: found.get(name) for name in expected} == expected, what
            assert not {name for name in (*HELD_BACK, "MY_KEY") if name in found}, what
            # probes get them as part of a question
            assert {name: found.get(name) for name in CREDENTIALS} == (
                CREDENTIALS if what == "rank" else dict.fromkeys(CREDENTIALS)
            )
    named = [line for line in done.stderr.splitlines() if line.startswith("not passed on:")]
    assert all(any(name in line for line in named) for name in (*HELD_BACK, "MY_KEY")), done.stderr
    assert "handed to the ranks unseen: AWS_SECRET_ACCESS_KEY HF_TOKEN" in done.stderr
    assert "s3cret" not in done.stderr + done.stdout and not list(Path("/dev/shm").glob("jp_train-*"))
    assert cluster.wait_until_empty() == {} or launcher == "slurm"  # its daemons stay


def test_hosts_are_reached_by_user_by_ipv6_address_and_at_the_port_of_the_ssh_options(
    cluster: Cluster, folder: Path
) -> None:
    (folder / "hostfile").write_text("root@node1 slots=1\n[fd77::2] slots=1\n")
    words = [sys.executable, "driver.py", "pdsh", f"-p {PORT}"]
    done = cluster.run("node2", words, env={"OTHER": "", "DS_ACCELERATOR": "cpu"}, cwd=str(folder), timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    connections = [found["SSH_CONNECTION"].split()[2:] for found in environments(folder, "rank")]
    assert connections == [["10.77.0.1", str(PORT)], ["fd77::2", str(PORT)]]


def test_a_run_on_such_hosts_passes_preflight_trains_and_saves_on_a_stop_signal(
    cluster: Cluster, tmp_path: Path
) -> None:
    cfg = tiny_run(write_data(tmp_path / "data"), tmp_path / "run", stage=2, steps=400, rows=4)
    save_config(cfg, tmp_path / "run.yaml")
    hostfile, metrics = tmp_path / "hostfile", tmp_path / "run" / "metrics.jsonl"
    hostfile.write_text("root@node1 slots=1\nfd77::2 slots=1\n")
    env = {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    words = ["launch", str(tmp_path / "run.yaml"), "--hostfile", str(hostfile), "--ssh-args", f"-p {PORT}"]
    with (tmp_path / "terminal").open("w") as file:
        launch = cluster.popen(
            "node1", [sys.executable, "-m", "jp_train", *words], env=env, cwd=ROOT, stdout=file, stderr=file
        )
    deadline = time.monotonic() + 300
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 3):
        assert launch.poll() is None and time.monotonic() < deadline, (tmp_path / "terminal").read_text()[-4000:]
        time.sleep(0.1)
    cluster.send(launch, 15)
    assert launch.wait(120) == 143, (tmp_path / "terminal").read_text()[-4000:]
    step = json.loads(metrics.read_text().splitlines()[-1])["step"]
    manifest = json.loads((tmp_path / "run" / "checkpoints" / f"step_{step:07d}" / "manifest.json").read_text())
    assert manifest["dp_world_size"] == 2 and cluster.wait_until_empty() == {}
