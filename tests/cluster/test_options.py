"""Options of a launch: which are rejected, and what is left of them on fewer hosts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jp_train.cluster.options import LaunchOptions, filter_text, ranks_of
from jp_train.errors import ConfigError
from tests.cluster.test_hostfile import write_hostfile


@pytest.mark.parametrize(
    "wrong",
    [
        {"launcher": "mpich"},
        {"master_port": 80},
        {"master_addr": "-oProxyCommand=x"},
        {"max_restarts": -1},
        {"grace_s": float("nan")},
        {"patience_s": 0.0},
        {"launcher_args": "--mca x y"},
        {"launcher": "slurm", "launcher_args": "'open"},
    ],
)
def test_options_that_cannot_be_meant_are_rejected(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        LaunchOptions(hostfile=tmp_path, **wrong)


def test_an_address_of_the_first_host_is_not_taken_for_that_of_the_host_that_replaces_it(tmp_path: Path) -> None:
    options = LaunchOptions(
        hostfile=write_hostfile(tmp_path, "n1 slots=2\nn2 slots=2\nn3 slots=2\n"), master_addr="10.0.0.1"
    )
    kept = options.restricted({"n1": (0, 1), "n3": (0, 1)})
    assert (kept.master_addr, kept.include) == ("10.0.0.1", "n1:0,1@n3:0,1")
    assert (kept.restricted({"n3": (0, 1)}).master_addr, options.restricted({"n2": (0,)}).master_addr) == ("", "")


def test_a_filter_text_names_every_rank_with_its_host_and_slot_in_order() -> None:
    text = filter_text({"b": (1, 3), "a": (0,)})
    assert (text, ranks_of(text)) == ("b:1,3@a:0", [("b", 1), ("b", 3), ("a", 0)])
