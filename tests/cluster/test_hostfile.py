"""Hostfiles and filters: what they select, and the error of each wrong line."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from jp_train.cluster.hostfile import Host, parse_hostfile, runs_locally, select_slots, world_size
from jp_train.cluster.options import filter_text, ranks_of
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
        ("node1 slots=800", "1 to 64"),
        ("node1 slots=8x", "slots=N"),
        ("good slots=4", "already on line 2"),
        ("me@Good slots=4", "already on line 2"),
        ("node[1-3,2] slots=4", "already on line 3"),
        ("node[3-1] slots=4", "no list of numbers"),
        ("node[1-] slots=4", "no list of numbers"),
        ("node[0-99999999] slots=4", "more than 4096 hosts"),
        ("r[0-99]n[0-99] slots=4", "more than 4096 hosts"),
        ("node[a-b] slots=4", "characters"),
        ("a;reboot slots=8", "a;reboot"),
        ("$(id) slots=8", "characters"),
        ("-oProxyCommand=x slots=8", "characters"),
        ("a,b slots=8", "characters"),
        ("user@-oProxyCommand=x slots=8", "characters"),
        ("-l@host slots=8", "characters"),
        ("a@b@c slots=8", "characters"),
        ("[$(id)::1] slots=8", "characters"),
        ("node1:22 slots=8", "characters"),
        ("nöde slots=8", "characters"),
    ],
)
def test_a_bad_line_is_rejected_with_its_number_and_its_text(tmp_path: Path, line: str, complaint: str) -> None:
    with pytest.raises(LaunchError) as caught:
        parse_hostfile(write_hostfile(tmp_path, f"# hosts\ngood slots=8\n{line}\n"))
    assert "line 3" in str(caught.value) and complaint in str(caught.value)


def test_a_host_may_have_a_user_or_an_ipv6_address_and_a_range_stands_for_its_hosts(tmp_path: Path) -> None:
    text = "me@node[08-10,1] slots=4\n[fd00::1] slots=2\nfd00::2 slots=2\nr[1-2]n[1-2] slots=1\n"
    hosts = parse_hostfile(write_hostfile(tmp_path, text))
    names = ["me@node08", "me@node09", "me@node10", "me@node1", "fd00::1", "fd00::2", "r1n1", "r1n2", "r2n1", "r2n2"]
    assert [host.name for host in hosts] == names and world_size(select_slots(hosts)) == 24
    kept = select_slots(hosts, include="me@node[08-09]:3,1@fd00::1@[fd00::2]:0@r1n[1-2]@me@node1")
    assert kept == {
        "me@node08": (1, 3), "me@node09": (1, 3), "me@node1": (0, 1, 2, 3), "fd00::1": (0, 1), "fd00::2": (0,),
        "r1n1": (0,), "r1n2": (0,),
    }  # fmt: skip
    assert select_slots(hosts, include=filter_text(kept)) == kept
    assert ranks_of(filter_text(kept))[:2] == [("me@node08", 1), ("me@node08", 3)]
    assert [host for host, _ in ranks_of(filter_text(kept))] == [host for host, slots in kept.items() for _ in slots]


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
