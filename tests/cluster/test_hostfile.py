"""Hostfiles and filters: what they select, and the error of each wrong line."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from jp_train.cluster.hostfile import Host, parse_hostfile, runs_locally, select_slots, world_size
from jp_train.errors import ConfigError, LaunchError

ROOT = Path(__file__).resolve().parents[2]


def write_hostfile(folder: Path, text: str) -> Path:
    path = folder / "hostfile"
    path.write_text(text)
    return path


def test_a_hostfile_gives_its_hosts_in_order(tmp_path: Path) -> None:
    text = "# cluster\n\nnode-b slots=8   # rack 2\n10.0.0.7\tslots=4\n  localhost  slots=2\n"
    assert parse_hostfile(write_hostfile(tmp_path, text)) == [
        Host("node-b", 8),
        Host("10.0.0.7", 4),
        Host("localhost", 2),
    ]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("node1", "slots=N"),
        ("node1 slots=eight", "slots=N"),
        ("node1 slots=-8", "slots=N"),
        ("node1 slots=8 gpus=8", "slots=N"),
        ("node1:8", "slots=N"),
        ("node1 slots=0", "0 slots"),
        ("good slots=4", "already on line 2"),
        ("a;reboot slots=8", "a;reboot"),
        ("$(id) slots=8", "characters"),
        ("-oProxyCommand=x slots=8", "characters"),
        ("a,b slots=8", "characters"),
        ("user@host slots=8", "characters"),
        ("nöde slots=8", "characters"),
    ],
)
def test_a_bad_line_is_rejected_with_its_number_and_its_text(tmp_path: Path, line: str, complaint: str) -> None:
    with pytest.raises(LaunchError) as caught:
        parse_hostfile(write_hostfile(tmp_path, f"# hosts\ngood slots=8\n{line}\n"))
    assert "line 3" in str(caught.value) and complaint in str(caught.value)


def test_a_missing_or_empty_hostfile_is_an_error_and_never_a_local_run(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="not there"):
        parse_hostfile(tmp_path / "nothing")
    with pytest.raises(LaunchError, match="names no host"):
        parse_hostfile(write_hostfile(tmp_path, "# only a comment\n"))


def test_every_hostfile_of_the_repository_parses() -> None:
    ranks = {
        p.name: sum(h.slots for h in parse_hostfile(p)) for p in (ROOT / "hostfiles").iterdir() if p.suffix != ".md"
    }
    assert ranks == {"local": 2, "a100_16x8": 128, "a100_32x8": 256}


def test_filters_keep_what_they_say() -> None:
    hosts = [Host("a", 2), Host("b", 4)]
    assert select_slots(hosts) == {"a": (0, 1), "b": (0, 1, 2, 3)}
    assert select_slots(hosts, include="b:3,1@a") == {"a": (0, 1), "b": (1, 3)}
    assert select_slots(hosts, exclude="a@b:0") == {"b": (1, 2, 3)}


@pytest.mark.parametrize(
    ("include", "exclude"), [("a", "b"), ("c", ""), ("", "a:7"), ("a:x", ""), ("a:", ""), ("", "a@b"), ("a@", "")]
)
def test_a_filter_that_means_nothing_is_rejected(include: str, exclude: str) -> None:
    with pytest.raises(ConfigError):
        select_slots([Host("a", 2), Host("b", 4)], include=include, exclude=exclude)


def test_one_host_with_a_name_of_this_machine_needs_no_ssh_and_several_hosts_do() -> None:
    here = socket.gethostname()
    assert all(runs_locally({name: (0, 1)}) for name in ("localhost", "127.0.0.1", here))
    assert not runs_locally({"node1.invalid": (0,)}) and not runs_locally({"localhost": (0,), here: (1,)})
    assert world_size({"a": (0, 1), "b": (3,)}) == 3
