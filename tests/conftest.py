"""Artefacts that several rooms' tests share: the smoke run's data, tokenizer and starting weights at their smallest,
made once."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.data.store_server import StoreServer

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # `make test &` in a script ignores it, and so would every process that a test interrupts
    signal.signal(signal.SIGINT, signal.default_int_handler)


LONG = (
    "test_multinode_launch.py",
    "test_distributed_runs.py",
    "test_elastic.py",
    "test_readme.py",
    "test_smoke_run.py",
    "test_forensics.py",
    "test_watchdog.py",
    "test_chaos.py",
)
"""Files that take a minute or more. They come first: where files run side by side, one of them at the end would keep
everybody waiting."""


SLOW = (
    *LONG,
    "tests/chaos",
    "tests/multinode",
    "tests/examples",
    "tests/tools/encode_images",
    "tests/tools/forecast",
    "tests/tools/inspect/test_rows.py",
    "tests/tools/report",
    "tests/tools/test_inference.py",
    "tests/data/test_fuzz.py",
    "tests/model/test_pretrained.py",
    "tests/cli/test_main.py",
    "tests/docs",
    "tests/test_packaging.py",
)
"""Ends of paths that `--fast` leaves out: what takes more than about 5 seconds or needs `small_world`."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="only quick tests that start no process (`make test-fast`)")


def pytest_collection_finish(session: pytest.Session) -> None:
    """With `--fast` a test that starts a process is skipped at that moment, so that nobody keeps a list of them."""
    if not session.config.getoption("fast"):
        return

    def refuse(event: str, _arguments: object = None) -> None:
        if event in ("subprocess.Popen", "os.fork", "os.posix_spawn"):
            pytest.skip("starts a process")

    sys.addaudithook(refuse)
    # the fork server's children show in no audit event
    BaseProcess.start = lambda self: refuse("os.fork")  # type: ignore[method-assign]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `--fast`, SLOW is not even imported."""
    return True if config.getoption("fast") and str(collection_path).endswith(SLOW) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, everything else in its order."""
    rank = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONG)))


@dataclass(frozen=True)
class SmallWorld:
    """`overrides` point any examples/smoke/stage*.yaml at these folders."""

    root: Path

    @property
    def overrides(self) -> list[str]:
        return [
            f"data.root={self.root / 'data'}",
            f"tokenizer.path={self.root / 'tokenizer'}",
            f"model.init_from={self.root / 'init'}",
            f"run_dir={self.root / 'run'}",
        ]


@pytest.fixture(scope="session")
def small_world(tmp_path_factory) -> SmallWorld:
    """Real shards, a real tokenizer and real (barely trained) weights of the smoke run, in about 15 seconds."""
    from examples.smoke.pretrain import pretrain_all
    from examples.smoke.shards import build_shards
    from examples.smoke.sizes import SmokeSizes
    from examples.smoke.tokenizer import train_tokenizer

    root = tmp_path_factory.mktemp("small_world")
    sizes = SmokeSizes.minute()
    build_shards(root / "data", 0, sizes.shards)
    train_tokenizer(root / "data", root / "tokenizer")
    pretrain_all(root / "init", root / "data", root / "tokenizer", sizes, 0)
    return SmallWorld(root)


@pytest.fixture(scope="session")
def running_store(tmp_path_factory) -> Iterator[StoreServer]:
    """A real S3 server, for all tests of this process: 3 seconds."""
    from tests.data.store_server import store_server

    with store_server(tmp_path_factory.mktemp("store")) as server:
        yield server


@pytest.fixture
def store(running_store: StoreServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StoreServer:
    """The S3 server without faults, as the store that the environment names; nothing of this user's own."""
    forkserver._forkserver._stop()  # one that an earlier test started has not this environment
    running_store.faults.clear()
    running_store.requests.clear()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in running_store.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path))
    return running_store
