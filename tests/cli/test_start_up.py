"""What a command imports before it answers: pinned by module names, as seconds differ between machines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STAGE1 = str(ROOT / "examples" / "smoke" / "stage1.yaml")
LAUNCH = str(ROOT / "launch" / "janus_pro_1b_stage1.yaml")
HOSTFILE = str(ROOT / "hostfiles" / "a100_16x8")
HEAVY = {"torch", "transformers", "deepspeed", "matplotlib", "tokenizers"}
"""Packages that take a second or more to import together."""

MISSPELT = "optimizer.warmup_step=3"


def imported_by(*command: str) -> tuple[int, set[str]]:
    """Exit status of `jp-train COMMAND` and the HEAVY packages that it imported."""
    script = (
        "import sys\n"
        "from jp_train.cli.main import main\n"
        "try:\n    code = main(sys.argv[1:])\n"
        "except SystemExit as stop:\n    code = stop.code\n"
        "sys.stdout.flush()\n"
        "print('\\n' + str(code), *sorted(sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *command], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr
    code, *modules = done.stdout.splitlines()[-1].split()
    return int(code), HEAVY & set(modules)


@pytest.mark.parametrize(
    "command",
    [
        ("check", STAGE1, MISSPELT),
        ("train", STAGE1, MISSPELT),
        ("launch", STAGE1, "--hostfile", HOSTFILE, MISSPELT),
        ("preflight", STAGE1, "--hostfile", HOSTFILE, MISSPELT),
        ("data", "index", STAGE1, MISSPELT),
        ("data", "verify", STAGE1, MISSPELT),
        ("data", "simulate", STAGE1, "--world", "1", MISSPELT),
        ("forecast", LAUNCH, "--world", "128", MISSPELT),
    ],
    ids=lambda command: "-".join(word for word in command[:2] if word not in (STAGE1, LAUNCH)),
)
def test_a_misspelt_key_is_answered_before_anything_heavy_is_imported(command: tuple[str, ...]) -> None:
    assert imported_by(*command) == (2, set())


@pytest.mark.parametrize("command", [("chek",), ("data", "indx")])
def test_a_misspelt_command_is_answered_before_anything_heavy_is_imported(command: tuple[str, ...]) -> None:
    assert imported_by(*command) == (2, set())


def test_launch_dry_run_imports_nothing_heavy() -> None:
    assert imported_by("launch", LAUNCH, "--hostfile", HOSTFILE, "--dry-run") == (0, set())


def test_a_launch_that_cannot_start_is_answered_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    hostfile = str(ROOT / "hostfiles" / "local")
    absent = [f"{key}={tmp_path / 'absent'}" for key in ("model.init_from", "tokenizer.path")]
    assert imported_by("launch", STAGE1, "--hostfile", hostfile, *absent) == (2, set())


@pytest.mark.parametrize("arguments", [(LAUNCH,), ("--keys",), ("--presets",)], ids=["CONFIG", "keys", "presets"])
def test_the_resolved_configuration_keys_and_presets_are_shown_without_anything_heavy(arguments: tuple[str]) -> None:
    assert imported_by("config", *arguments) == (0, set())


def test_a_forecast_imports_nothing_heavy() -> None:
    assert imported_by("forecast", LAUNCH, "--hostfile", HOSTFILE) == (0, set())


def test_check_of_a_configuration_alone_imports_nothing_heavy() -> None:
    assert imported_by("check", LAUNCH, "--config-only") == (0, set())


def test_check_looks_for_weights_without_transformers(tmp_path: Path) -> None:
    absent = [f"{key}={tmp_path / 'absent'}" for key in ("data.root", "model.init_from", "tokenizer.path")]
    assert imported_by("check", STAGE1, *absent) == (2, {"torch"})


def test_an_error_in_a_hostfile_is_answered_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("node1 slots=two\n")
    assert imported_by("launch", LAUNCH, "--hostfile", str(hostfile)) == (5, set())


def test_status_of_a_folder_that_is_no_run_imports_nothing_heavy(tmp_path: Path) -> None:
    code, heavy = imported_by("status", str(tmp_path))
    assert (code != 0, heavy) == (True, set())


def test_an_import_needs_no_torch(tmp_path: Path) -> None:
    source = tmp_path / "text"
    source.mkdir()
    (source / "a.txt").write_text("one document of a few words")
    assert imported_by("data", "import", "text", str(source), str(tmp_path / "shards")) == (0, set())
