"""The wheel alone, installed outside the checkout: the command line, presets and run-file examples, nothing else."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from jp_train.cli.main import COMMANDS
from jp_train.config.load import preset_names
from tests.test_imports import imports_of

ROOT = Path(__file__).resolve().parents[1]
BUILT_FROM = ("jp_train", "launch", "data_recipes", "hostfiles", "README.md", "LICENSE", "setup.cfg", "pyproject.toml")


@dataclass(frozen=True)
class Installed:
    """`target`: where pip put the wheel; `folder`: an empty working directory."""

    wheel: Path
    target: Path
    folder: Path

    @property
    def share(self) -> Path:
        return self.target / "share" / "jp_train"

    def run(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """`jp-train WORDS` of the wheel, from the empty folder."""
        environment = {**os.environ, "PYTHONPATH": str(self.target), "XDG_CACHE_HOME": str(self.folder / "cache")}
        command = [sys.executable, str(self.target / "bin" / "jp-train"), *map(str, words)]
        return subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=300, check=False
        )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel of a copy of the sources (setuptools leaves its build folder beside them), without dependencies: they
    are those of this environment."""
    root = tmp_path_factory.mktemp("wheel")
    for name in BUILT_FROM:
        source, copy = ROOT / name, root / "source" / name
        copy.parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)
    shutil.copytree(ROOT / "examples", root / "source" / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "source" / "tests").mkdir()
    (root / "source" / "tests" / "__init__.py").touch()
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", str(root)]
    subprocess.run([*pip, *build, str(root / "source")], check=True, timeout=300)
    (wheel,) = root.glob("*.whl")
    install = ["install", "--no-index", "--no-deps", "--target", str(root / "target"), str(wheel)]
    subprocess.run([*pip, *install], check=True, timeout=300)
    (root / "empty").mkdir()
    return Installed(wheel, root / "target", root / "empty")


def test_the_wheel_holds_the_package_its_presets_the_run_files_and_the_licence_and_nothing_else(
    installed: Installed,
) -> None:
    names = set(zipfile.ZipFile(installed.wheel).namelist())
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "jp_train").rglob("*.py")}
    presets = {str(path.relative_to(ROOT)) for path in (ROOT / "jp_train" / "presets").rglob("*.yaml")}
    tools = ROOT / "jp_train" / "tools"
    pages = {str(path.relative_to(ROOT)) for ending in ("html", "css") for path in tools.rglob(f"*.{ending}")}
    metadata = {name for name in names if ".dist-info/" in name}
    shared = {name for name in names if ".data/data/share/jp_train/" in name}
    assert names == code | presets | pages | metadata | shared
    folders = ("launch", "data_recipes", "hostfiles")
    run_files = {str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).iterdir()}
    assert {name.partition("share/jp_train/")[2] for name in shared} == run_files
    assert any(name.endswith("licenses/LICENSE") for name in metadata)
    assert len(presets) >= len(preset_names()) == 12


def test_the_metadata_names_the_licence_and_exactly_the_packages_that_the_code_imports(installed: Installed) -> None:
    (name,) = (name for name in zipfile.ZipFile(installed.wheel).namelist() if name.endswith("METADATA"))
    lines = zipfile.ZipFile(installed.wheel).read(name).decode().splitlines()
    assert any(line in ("License: Apache-2.0", "License-Expression: Apache-2.0") for line in lines)
    requirements = [line.split()[1] for line in lines if line.startswith("Requires-Dist") and "extra ==" not in line]
    required = {MODULES.get(name, name) for name in (re.split("[=<>;]", text)[0] for text in requirements)}
    imported = {module.split(".")[0] for path in (ROOT / "jp_train").rglob("*.py") for module in imports_of(path)}
    # _typeshed: names of types that exist for type checkers only
    foreign = imported - set(sys.stdlib_module_names) - {"jp_train", "", "_typeshed"}
    assert foreign - OPTIONAL == required


MODULES = {"pillow": "PIL", "pyyaml": "yaml"}
"""Packages whose module has another name."""
OPTIONAL = {"huggingface_hub", "obstore", "pyarrow", "zstandard"}
"""Modules of the extras."""


def test_every_help_text_is_shown_outside_the_checkout(installed: Installed) -> None:
    words = [(), *((command,) for command in COMMANDS)]
    words += [
        ("data", tool) for tool in ("import", "index", "verify", "inspect", "explain", "simulate", "encode-images")
    ]
    formats = ("imagenet", "coco", "conversations", "pairs", "text", "parquet", "webdataset")
    words += [("data", "import", layout) for layout in formats]
    for command in words:
        done = installed.run(*command, "--help")
        assert done.returncode == 0, f"{command}: {done.stderr}"
        assert done.stdout.startswith("usage: jp-train"), command
        for inner in _choices(done.stdout):
            assert (*command, inner) in words, f"{(*command, inner)} is a command that this test does not know"


def _choices(text: str) -> list[str]:
    """Subcommands that a help text lists in braces or under a metavar."""
    block = text.partition("positional arguments:")[2].partition("\noptions:")[0]
    return [line.split()[0] for line in block.splitlines() if line.startswith("    ") and line[4:5].isalpha()]


def test_check_and_forecast_of_the_shipped_run_files_work_outside_the_checkout(installed: Installed) -> None:
    config, hosts = installed.share / "launch" / "janus_pro_1b_stage2.yaml", installed.share / "hostfiles" / "a100_16x8"
    checked = installed.run("check", config, "--config-only", "--hostfile", hosts)
    assert checked.returncode == 0, checked.stderr
    assert "360,000, stopped early at 270,000" in checked.stdout
    assert "2 : 3 : 5" in checked.stdout
    forecast = installed.run("forecast", config, "--hostfile", hosts, "--out", installed.folder / "forecast")
    assert forecast.returncode == 0, forecast.stderr
    assert "128 ranks on 16 node(s)" in forecast.stdout
    assert (installed.folder / "forecast" / "forecast.html").read_text().startswith("<!doctype html>")
    assert not (installed.folder / "runs").exists()


def test_a_run_file_of_one_s_own_finds_presets_and_recipes_of_the_wheel(installed: Installed) -> None:
    recipe = installed.share / "data_recipes" / "janus_pro_stage1.yaml"
    (installed.folder / "mine.yaml").write_text(f"preset: tiny/stage1\nrecipe: {recipe}\nrun_dir: out\n")
    done = installed.run("check", "mine.yaml", "--config-only")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "32 samples" in done.stdout and "1 : 0 : 3" in done.stdout


def test_nothing_of_the_wheel_comes_from_the_checkout(installed: Installed) -> None:
    where = "import jp_train, sys; print(jp_train.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(installed.target)}
    done = subprocess.run(
        [sys.executable, "-c", where], cwd=installed.folder, env=environment, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()).is_relative_to(installed.target)
