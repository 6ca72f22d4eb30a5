"""Which links are measured together, and how fast a host is by its links."""

from __future__ import annotations

import pytest

from jp_train.cluster.bandwidth import host_rates, rounds


def test_a_host_is_as_fast_as_its_better_neighbour_so_that_one_slow_host_does_not_blame_others() -> None:
    hosts = ["a1", "b2", "c3", "d4"]
    speed = {"a1": 900.0, "b2": 900.0, "c3": 10.0, "d4": 900.0}
    measured = {
        name: {
            "sends": {str((rank + shift) % 4): min(speed[name], speed[hosts[(rank + shift) % 4]]) for shift in (1, 2)}
        }
        for rank, name in enumerate(hosts)
    }
    rates = host_rates(hosts, measured)
    assert {name: min(ways.values()) for name, ways in rates.items()} == speed


def test_a_host_that_only_receives_slowly_is_found_by_what_the_others_send() -> None:
    hosts = ["a1", "b2", "c3"]
    measured = {
        "a1": {"sends": {"1": 5.0, "2": 500.0}},
        "b2": {"sends": {"2": 500.0, "0": 500.0}},
        "c3": {"sends": {"0": 500.0, "1": 5.0}},
    }
    rates = host_rates(hosts, measured)
    assert (
        rates["b2"] == {"sends": 500.0, "receives": 5.0}
        and min(min(rates[name].values()) for name in ("a1", "c3")) == 500.0
    )


@pytest.mark.parametrize("world", [2, 3, 4, 5, 7, 32, 33])
def test_every_link_of_the_ring_is_measured_once_while_both_of_its_ends_do_nothing_else(world: int) -> None:
    planned = rounds(world)
    links = [link for group in planned for link in group]
    shifts = {1} if world == 2 else {1, 2}
    assert sorted(links) == sorted((rank, (rank + shift) % world) for rank in range(world) for shift in shifts)
    for group in planned:
        ends = [end for link in group for end in link]
        assert len(ends) == len(set(ends))
    assert len(planned) <= 8  # 33 hosts take no longer than 5
