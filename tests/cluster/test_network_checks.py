"""Planted answers about the network between hosts, and the faults that are made of them."""

from __future__ import annotations

from typing import Any

import pytest

from jp_train.cluster import network_checks
from tests.cluster.test_host_checks import HOSTS, given, hosts_and_warnings, only


def test_a_busy_master_port_is_reported_with_its_holder_and_hides_that_nobody_reaches_it() -> None:
    busy = {"error": "Address already in use", "holder": "pid 12 (python x)"}
    fault = only(
        network_checks.check_port(
            given(
                rendezvous_host="a1",
                address="10.0.0.1",
                port=29500,
                listening={"a1": {"master": busy}},
                unreached_port={"b2": "refused"},
            )
        )
    )
    assert fault.host == "a1" and "held by pid 12" in fault.message
    assert hosts_and_warnings(
        network_checks.check_port(
            given(
                rendezvous_host="a1",
                address="10.0.0.1",
                port=29500,
                listening={"a1": {"master": {}}},
                unreached_port={"b2": "refused"},
            )
        )
    ) == [("b2", False)]


def fabric(**changed: Any) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "fabric": changed.get(name, {"address": f"10.0.0.{n}", "interface": "eth0", "chosen_by": "test", "port": 1})
        }
        for n, name in enumerate(HOSTS, 1)
    }


def test_a_pair_is_reported_once_with_its_direction() -> None:
    assert list(network_checks.check_reach(given(listening=fabric()))) == []
    both = only(
        network_checks.check_reach(
            given(listening=fabric(), unreached={"a1": {"b2": "no answer"}, "b2": {"a1": "no answer"}})
        )
    )
    assert "a1 and b2 do not reach each other" in both.message
    fault = only(network_checks.check_reach(given(listening=fabric(), unreached={"b2": {"a1": "no answer"}})))
    assert (fault.host, fault.message[:21]) == ("b2", "b2 does not reach a1:")


def test_a_host_that_nobody_reaches_is_one_fault_and_not_one_a_pair() -> None:
    failed = {"a1": {"c3": "no answer"}, "b2": {"c3": "no answer"}, "c3": {"a1": "no answer", "b2": "no answer"}}
    fault = only(network_checks.check_reach(given(listening=fabric(), unreached=failed)))
    assert fault.host == "c3" and "no other host reaches it" in fault.message


def test_a_loopback_address_is_a_fault_only_among_several_hosts() -> None:
    loop = fabric(b2={"address": "127.0.1.1", "interface": "", "chosen_by": "the name", "port": 1})
    assert hosts_and_warnings(network_checks.check_reach(given(listening=loop))) == [("b2", False)]
    assert list(network_checks.check_reach(given(listening={"b2": loop["b2"]}, alone=True))) == []
    unusable = fabric(c3={"error": "no interface eth9", "variable": "NCCL_SOCKET_IFNAME"})
    assert "export NCCL_SOCKET_IFNAME" in only(network_checks.check_reach(given(listening=unusable))).remedy


def test_hosts_whose_all_reduce_failed_are_named_with_what_failed_and_where_the_ranks_would_meet() -> None:
    fault = only(
        network_checks.check_all_reduce(
            given(all_reduce_errors={"b2": "NCCL error"}, rendezvous_host="a1", address="10.0.0.1", port=29500)
        )
    )
    assert (fault.host, fault.check) == ("b2", "bandwidth") and "NCCL error" in fault.message
    assert "10.0.0.1:29500 is its way to a1" in fault.remedy


@pytest.mark.parametrize(
    ("rate", "backend", "expected"),
    [
        (9e9, "nccl", []), (3e9, "nccl", [("b2", False)]), (5e9, "gloo", []), (2e9, "gloo", [("b2", True)]),
        (1e8, "gloo", [("b2", False)]),
    ],
)  # fmt: skip
def test_a_host_far_below_the_median_is_slow(rate: float, backend: str, expected: list) -> None:
    rates = {name: {"sends": 1e10, "receives": 1e10} for name in HOSTS} | {"b2": {"sends": rate, "receives": 1e10}}
    assert hosts_and_warnings(network_checks.check_bandwidth(given(rates=rates, backend=backend))) == expected


def test_a_network_that_is_slow_for_all_is_a_fault_of_every_host_and_of_one_of_two() -> None:
    crawling = {name: {"sends": 1e7, "receives": 1e7} for name in HOSTS}
    assert hosts_and_warnings(network_checks.check_bandwidth(given(rates=crawling, backend="gloo"))) == [
        (name, False) for name in HOSTS
    ]
    pair = {name: crawling[name] for name in ("a1", "b2")}
    assert (
        "of two hosts nobody can tell"
        in only(network_checks.check_bandwidth(given(rates=pair, backend="gloo"))).message
    )
