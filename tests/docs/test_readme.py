"""The README as a new user follows it: every command in it is run here, in its order, in a folder as `make smoke`
leaves it (with the smoke run's smallest shards and weights)."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jp_train.cli.main import parse

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*(ROOT / "docs").glob("*.md"), *(ROOT / folder / "README.md" for folder in (".", "data_recipes", "hostfiles"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CLUSTER = ("launch launch/", "launch/train_all.sh")
"""Commands that would start ranks on a cluster: run with --dry-run."""
ELSEWHERE = {
    "make smoke": "all of it: .ci/run",
    "make test": "this",
    "sbatch --nodes=16 launch/slurm.sbatch launch/janus_pro_1b_stage2.yaml": "tests/multinode/test_multinode_slurm.py",
}
"""Commands that another test runs."""


COMMAND = re.compile(r"^    ((?:jp-train|make|launch/|sbatch|cp)\b.*?)(?: +# .*)?$", flags=re.MULTILINE)


def commands_of(page: Path) -> list[str]:
    """The indented lines of a page that are commands, without comments."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [command.strip() for command in COMMAND.findall(text)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, small_world) -> Path:
    """A checkout beside what `make smoke` leaves, `my_run.yaml` as the README has it, and a user's own LLaVA file."""
    home = tmp_path_factory.mktemp("home")
    for name in ("launch", "hostfiles", "data_recipes", "examples", "jp_train"):
        (home / name).symlink_to(ROOT / name)
    shutil.copytree(small_world.root, home / "runs" / "smoke", ignore=shutil.ignore_patterns("run"))
    (config,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    (home / "my_run.yaml").write_text(config, encoding="utf-8")
    shutil.copytree(ROOT / "docs" / "images", home / "llava")
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A report."}]
    entries = [{"id": "0", "image": "report.png", "conversations": turns}]
    (home / "llava.json").write_text(json.dumps(entries), encoding="utf-8")
    return home


def run(command: str, home: Path) -> subprocess.CompletedProcess[str]:
    """One command in a shell; the machine's name for the package and the folder is set as an activated .venv does."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "WANDB_MODE": "offline",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        ["bash", "-c", command], cwd=home, env=environment, capture_output=True, text=True, check=False, timeout=600
    )


def prepared(command: str) -> tuple[str, int]:
    """The command as it is run here, and the exit status that it must have."""
    if any(part in command for part in CLUSTER) and "--dry-run" not in command:
        command += " --dry-run"
    elif "hostfiles/local" in command and " launch " in command:
        command += f" --master-port {free_port()}"
    if "preflight" in command:
        return f"{command} --timeout 3", 5  # the hosts of the example do not exist
    return command, 0


def test_every_command_of_the_readme_runs_in_its_order_and_leaves_what_it_promises(home: Path) -> None:
    run_here = [command for command in commands_of(ROOT / "README.md") if command not in ELSEWHERE]
    assert len(run_here) >= 20 and set(ELSEWHERE) <= set(commands_of(ROOT / "README.md"))
    output = {}
    for command in run_here:
        if command.startswith("cp "):  # tests/test_packaging.py installs the wheel
            continue
        if "runs/smoke/stage3/export" in command and not (home / "runs/smoke/stage3").exists():
            shutil.copytree(home / "runs/mine/export", home / "runs/smoke/stage3/export")
        text, expected = prepared(command)
        done = run(text, home)
        assert done.returncode == expected, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        output[command] = done.stdout + done.stderr
    status = json.loads((home / "runs/mine/status.json").read_text())
    assert (status["step"], status["dp_world_size"]) == (30, 2)
    steps = [json.loads(line)["step"] for line in (home / "runs/mine/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 31)), "the second launch went on where the first ended"
    assert (home / "runs/mine/report.html").is_file() and (home / "out/mine/config.json").is_file()
    assert (home / "three.png").read_bytes().startswith(b"\x89PNG")
    assert list((home / "shards/llava").glob("*.tar"))
    (preflight,) = (text for command, text in output.items() if "preflight" in command)
    assert "unknown host name" in preflight


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_jp_train_command_of_a_page_is_one_that_the_command_line_takes(page: Path) -> None:
    for command in commands_of(page):
        if command.startswith("jp-train "):
            assert parse(shlex.split(command)[1:]).run, command
