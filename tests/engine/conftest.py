"""What several files of this room train on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.tiny_run import write_data
from tests.small_disk import mounted


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Shards of the three kinds, held-out ones, and a tokenizer."""
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder for run folders."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory) -> Iterator[Path | None]:
    """A real file system of 8 MiB; None where this process may not mount one."""
    place = tmp_path_factory.mktemp("small_disk")
    with mounted(place, "8m") as problem:
        yield None if problem else place
