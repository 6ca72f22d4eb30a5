"""Which address the ranks would use, and who reaches it: rules by table, sockets for real."""

from __future__ import annotations

import socket
import threading

import pytest

from jp_train.cluster.reach import Listeners, fabric_address, interfaces, listen, reach

PRESENT = {"lo": "127.0.0.1", "docker0": "172.17.0.1", "eth0": "10.0.0.5", "eth1": "10.1.0.5", "ib0": "10.2.0.5"}


def test_the_loopback_interface_of_this_machine_is_listed() -> None:
    assert interfaces()["lo"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("variable", "interface"),
    [
        ("eth1", "eth1"), ("eth", "eth0"), ("=eth", None), ("=eth1", "eth1"), ("^lo,docker", "eth0"),
        ("^=lo,docker0,eth0,eth1", "ib0"), ("ens", None),
        ("ib,eth", "eth0"), ("", "ib0"),
    ],
)  # fmt: skip
def test_nccls_rules_for_the_interface(variable: str, interface: str | None) -> None:
    chosen = fabric_address(PRESENT, {"NCCL_SOCKET_IFNAME": variable}, gpu=True)
    assert chosen.get("interface") == interface
    if interface is None:
        assert f"NCCL_SOCKET_IFNAME={variable}" in chosen["error"] and "eth0 (10.0.0.5)" in chosen["error"]


def test_gloo_takes_the_named_interface_or_what_the_host_name_resolves_to(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fabric_address(PRESENT, {"GLOO_SOCKET_IFNAME": "eth1"}, gpu=False)["address"] == "10.1.0.5"
    assert "eth9" in fabric_address(PRESENT, {"GLOO_SOCKET_IFNAME": "eth9"}, gpu=False)["error"]
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    chosen = fabric_address(PRESENT, {}, gpu=False)
    assert (chosen["address"], chosen["interface"]) == ("127.0.0.1", "lo") and "'localhost' resolves to it" in chosen[
        "chosen_by"
    ]
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    assert "does not resolve" in fabric_address(PRESENT, {}, gpu=False)["error"]


def test_listeners_greet_whoever_connects_until_they_are_closed() -> None:
    listeners = Listeners()
    port = listeners.open("127.0.0.1", 0)
    targets = {f"host{number}": ("127.0.0.1", port, listeners.greeting) for number in range(31)}
    assert reach(targets, timeout_s=10) == {}
    listeners.close()
    assert set(reach(targets, timeout_s=10)) == set(targets)


def test_a_port_that_answers_but_is_somebody_elses_is_reported() -> None:
    listening, other = Listeners(), Listeners()
    port = listening.open("127.0.0.1", 0)
    failed = reach({"b": ("127.0.0.1", port, other.greeting)}, timeout_s=10)["b"]
    listening.close()
    assert "answered by something else" in failed


def test_a_port_that_accepts_and_says_nothing_is_given_up_and_control_characters_are_not_repeated() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("127.0.0.1", 0)) as rude:

        def shout() -> None:
            caller, _ = rude.accept()
            with caller:
                caller.sendall(b"\x1b[2J!!!!!!!!!!!!!")

        thread = threading.Thread(target=shout)
        thread.start()
        failed = reach({"s": (*silent.getsockname(), "x" * 16), "r": (*rude.getsockname(), "x" * 16)}, timeout_s=1.0)
        thread.join()
    assert "no answer from" in failed["s"] and "\x1b" not in failed["r"] and "?[2J" in failed["r"]


def test_nothing_there_is_reported_with_the_systems_words() -> None:
    with socket.create_server(("127.0.0.1", 0)) as made:
        port = made.getsockname()[1]
    assert reach({"b": ("127.0.0.1", port, "x")}, timeout_s=5) == {"b": f"127.0.0.1:{port}: Connection refused"}
    assert reach({}, timeout_s=5) == {}


def test_a_busy_master_port_is_reported_with_its_holder_and_a_free_one_is_opened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    listeners = Listeners()
    with socket.create_server(("", 0)) as held:
        port = held.getsockname()[1]
        busy = listen(listeners, gpu=False, master_port=port)
        assert busy["master"]["error"] == "Address already in use" and busy["master"]["holder"].startswith("pid ")
    listeners.close()
    free = listen(listeners, gpu=False, master_port=port)
    assert free["master"] == {} and free["fabric"]["address"] == "127.0.0.1"
    assert (
        reach(
            {"m": ("127.0.0.1", port, free["greeting"]), "f": ("127.0.0.1", free["fabric"]["port"], free["greeting"])},
            timeout_s=10,
        )
        == {}
    )
    listeners.close()
