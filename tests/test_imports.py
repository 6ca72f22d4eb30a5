"""The import rules of docs/architecture.md, read from the sources, and what importing the package must not do."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "jp_train"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 500


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports_of(path: Path) -> frozenset[str]:
    """Every module that a file of the package imports."""
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return frozenset(imports_in(path.read_text(encoding="utf-8"), package))


def imports_in(source: str, package: str) -> set[str]:
    """Every module that `source` imports anywhere, also inside functions, as absolute names; `from a import b` gives
    `a` and `a.b`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found.add(base)
            found.update(f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", None) or getattr(node.func, "id", None)
            if called in ("import_module", "__import__"):
                found.add(str(node.args[0].value))
    return found


def importers(of: str, among: list[Path] = MODULES) -> set[str]:
    """Names of the modules that import `of` or anything in it."""
    return {
        module_name(path) for path in among if any(name == of or name.startswith(of + ".") for name in imports_of(path))
    }


def within(*rooms: str) -> list[Path]:
    """The files of these packages or modules."""
    return [
        path
        for path in MODULES
        if any(module_name(path) == room or module_name(path).startswith(room + ".") for room in rooms)
    ]


def test_the_reader_of_imports_sees_every_form() -> None:
    source = (
        "import a.b\ndef f():\n    from c import d\n    from . import e\n    from ..g import h\n"
        "    importlib.import_module('i.j')\n    __import__('k')\n"
    )
    assert imports_in(source, "p.q") == {"a.b", "c", "c.d", "p.q", "p.q.e", "p.g", "p.g.h", "i.j", "k"}
    assert MODULES and importers("jp_train.errors")


GROUND = {"errors", "types", "files", "terminal"}
"""Modules that everybody may import; of each other they may import errors and types."""
MAY_IMPORT = {
    "config": set(),
    "data": {"config"},
    "model": {"config"},
    "engine": {"config", "data", "model"},
    "run": {"config", "data", "engine"},
    "train": {"config", "data", "model", "engine", "run"},
    "cluster": {"config", "data", "run"},
    "tools": {"config", "data", "model", "engine", "run", "cluster"},
    "cli": {"config", "run", "train", "cluster", "tools"},
}
"""Which rooms a room may import, besides itself and GROUND: arrows point downwards only."""


def rooms_imported_by(room: str) -> dict[str, str]:
    """Names directly below jp_train that a room's modules import, with one module that does."""
    return {
        name.split(".")[1]: module_name(path)
        for path in within(f"jp_train.{room}")
        for name in imports_of(path)
        if name.startswith("jp_train.") and name != "jp_train.__version__"
    }


def test_every_room_has_a_rule() -> None:
    """A new folder or module directly in the package needs a place in the order before anything can import it."""
    found = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES}
    assert found == GROUND | set(MAY_IMPORT) | {"__init__", "__main__"}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_the_rooms_below_it(room: str) -> None:
    upwards = {
        name: by for name, by in rooms_imported_by(room).items() if name not in MAY_IMPORT[room] | GROUND | {room}
    }
    assert upwards == {}, f"jp_train/{room} may import {sorted(MAY_IMPORT[room] | GROUND)}"


@pytest.mark.parametrize("module", sorted(GROUND))
def test_the_ground_imports_nothing_above_it(module: str) -> None:
    assert set(rooms_imported_by(module)) <= {"errors", "types"} - {module}


def test_the_package_never_imports_the_examples_or_the_tests() -> None:
    assert importers("examples") == importers("tests") == set()


def test_only_the_engine_and_the_launcher_import_deepspeed() -> None:
    allowed = {module_name(path) for path in within("jp_train.engine", "jp_train.cluster")}
    assert importers("deepspeed") - allowed == set()


def test_only_the_process_that_feeds_wandb_imports_it() -> None:
    assert importers("wandb") == {"jp_train.run.wandb_process"}


def test_reading_a_run_folder_needs_no_torch() -> None:
    rooms = within("jp_train.tools.report", "jp_train.run.reading", "jp_train.run.summary", "jp_train.run.status")
    for heavy in ("torch", "jp_train.types", "jp_train.config", "jp_train.data", "jp_train.engine"):
        assert importers(heavy, rooms) == set(), f"status and report must start without {heavy}"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_no_module_has_two_jobs(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{path} has {lines} lines; one past {MAX_LINES} has two jobs: split it"


CHECK = """
import importlib, logging, random, signal, socket, sys

def refuse(*args, **kwargs):
    raise AssertionError("import opened a network connection")

socket.socket.connect = socket.create_connection = refuse
import numpy, torch
import torch.distributed
import sklearn.datasets  # brings rich, which draws a number from `random` while it is imported: not ours to change

def state():
    return (
        torch.get_rng_state().tolist(), str(numpy.random.get_state()), random.getstate(), torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled(), list(logging.getLogger().handlers),
        logging.getLogger().level,
        signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), torch.distributed.is_initialized(),
        torch.cuda.is_initialized(),
    )

before = state()
for name in sys.argv[1:]:
    importlib.import_module(name)
    loaded = {"deepspeed", "wandb"} & set(sys.modules)
    assert not loaded, f"importing {name} loads {loaded}"
    changed = [i for i, (was, now) in enumerate(zip(before, state())) if was != now]
    assert not changed, f"importing {name} changes the process: state {changed}"
"""


def test_importing_touches_no_device_process_group_network_seed_or_logger() -> None:
    """All modules but those that are there to drive deepspeed, in one fresh process, lightest first."""
    heavy = {module_name(path) for path in within("jp_train.engine")} | {"jp_train.__main__"}
    heavy |= {name for path in MODULES if (name := module_name(path)) not in heavy and _reaches(path, heavy)}
    light = sorted({module_name(path) for path in MODULES} - heavy, key=lambda name: (name.count("."), name))
    assert {
        "jp_train",
        "jp_train.types",
        "jp_train.config",
        "jp_train.tools.report",
        "jp_train.run.status",
        "jp_train.cluster.launch",
        "jp_train.cli.main",
    } <= set(light)
    done = subprocess.run(
        [sys.executable, "-c", CHECK, *light], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def _reaches(path: Path, heavy: set[str]) -> bool:
    """Whether a module imports the engine at its top level (inside a function it costs nothing at import time)."""
    top = "\n".join(
        ast.unparse(node)
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
    )
    return bool(imports_in(top, module_name(path).rpartition(".")[0]) & heavy)


def test_every_module_has_tests_in_the_folder_that_mirrors_its_own() -> None:
    """`jp_train/data/plan.py` has `tests/data/test_plan.py`, or a file beside it names `jp_train.data.plan`."""
    without = []
    for path in MODULES:
        if path.stem in ("__init__", "__main__"):
            continue
        folder = ROOT / "tests" / path.relative_to(PACKAGE).parent
        if (folder / f"test_{path.stem}.py").is_file():
            continue
        name = module_name(path)
        imported = {name for test in folder.glob("*.py") for name in imports_of(test)}
        as_text = any(f"{name} import" in test.read_text(encoding="utf-8") for test in folder.glob("*.py"))
        if not (name in imported or as_text):
            without.append(name)
    assert without == []
