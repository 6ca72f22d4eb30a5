"""The rig of several hosts on one machine; its tests are skipped only where the machine lacks what it needs, and say
what."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.multinode.cluster_rig import Cluster, missing_parts


@pytest.fixture(scope="session")
def rig_parts() -> None:
    """Skips, with the reason, where no rig can be made."""
    missing = missing_parts()
    if missing:
        pytest.skip(missing)


@pytest.fixture(scope="module")
def make_cluster(rig_parts: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Cluster]]:
    """`make_cluster(hosts=3, slots=1)` gives a running Cluster that ends with the module."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(Cluster(tmp_path_factory.mktemp("rig"), **options))
