"""Options of a launch: which are rejected, and what is left of them on fewer hosts."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jp_train.cluster.options import LaunchOptions, filter_text, port_is_free, ranks_of
from jp_train.errors import ConfigError
from tests.cluster.test_hostfile import write_hostfile


@pytest.mark.parametrize(
    "wrong",
    [
        {"launcher": "mpich"},
        {"master_port": 80},
        {"master_addr": "-oProxyCommand=x"},
        {"master_addr": "me@node1"},
        {"max_restarts": -1},
        {"grace_s": float("nan")},
        {"patience_s": 0.0},
        {"launcher_args": "--mca x y"},
        {"launcher": "slurm", "launcher_args": "'open"},
        {"ssh_args": "node1"},
        {"ssh_args": "-o 'ProxyCommand nc %h'"},
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


def test_one_local_host_gets_a_free_port_where_the_usual_one_is_taken_and_nobody_gave_another(tmp_path: Path) -> None:
    local = write_hostfile(tmp_path, "localhost slots=2\n")
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        assert not port_is_free(port)
        usual = LaunchOptions(hostfile=local, master_port=port, choose_port=True)
        other = usual.with_free_port().master_port
        assert other != port and port_is_free(other)
        assert LaunchOptions(hostfile=local, master_port=port).with_free_port().master_port == port
        remote = write_hostfile(tmp_path, "n1 slots=2\n")
        assert replace(usual, hostfile=remote).with_free_port().master_port == port, "nobody knows the ports of n1"
    assert LaunchOptions(hostfile=local, master_port=port, choose_port=True).with_free_port().master_port == port


def test_a_filter_text_names_every_rank_with_its_host_and_slot_in_order() -> None:
    text = filter_text({"b": (1, 3), "a": (0,)})
    assert (text, ranks_of(text)) == ("b:1,3@a:0", [("b", 1), ("b", 3), ("a", 0)])


def test_words_for_ssh_are_those_that_pdsh_takes_from_its_variable_and_then_the_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-i key")
    assert LaunchOptions(hostfile=tmp_path, ssh_args="-p 2222").ssh_words() == ["-i", "key", "-p", "2222"]
