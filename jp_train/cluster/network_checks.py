"""Preflight's checks of the network between hosts: the master port, every pair, and the bandwidth of an all-reduce."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from jp_train.cluster.answers import Answers
from jp_train.cluster.findings import Fault, rate_text

SLOW_SHARE = {"nccl": 0.5, "gloo": 0.25}
"""A host below this share of the median is slow. gloo shares its cores with everything else, so its figures scatter
more."""
SLOW_GLOO = 125e6
"""Bytes/s (1 Gbit/s) below which a slow host is a fault on CPU hosts too; above it may be noise of busy cores, so it
is a warning."""
SLOW_ALL = 25e6
"""Bytes/s (0.2 Gbit/s) that no link between training hosts may go below, whatever the others do: a port that has
fallen back to 100 Mbit/s does."""


def check_port(answers: Answers) -> Iterator[Fault]:
    """Whether the rendezvous host could open the master port, and which hosts did not reach it."""
    first, address, port = answers.rendezvous_host, answers.address, answers.port
    opened = answers.listening[first]["master"]
    if opened.get("error"):
        holder = f" by {opened['holder']}" if opened.get("holder") else ""
        yield Fault(
            first, "port", f"master port {port}: {opened['error']}; it is held{holder}",
            f"end that process on {first}, or give another port with --master-port",
        )  # fmt: skip
        return
    for host, why in answers.unreached_port.items():
        yield Fault(
            host, "port", f"does not reach the rendezvous on {first}: {why}",
            f"open port {port} of {first} for {host} (firewall), and see that {address}, the first of `hostname -I` on "
            f"{first}, is its cluster address (else --master-addr)",
        )  # fmt: skip


def check_reach(answers: Answers) -> Iterator[Fault]:
    """`fabric` of each host, and {host: {other: why not reached}}. One fault per pair, or one per host that nobody
    reaches."""
    listening, unusable = answers.listening, set[str]()
    for host, opened in listening.items():
        fabric = opened["fabric"]
        variable = fabric.get("variable", "GLOO_SOCKET_IFNAME")
        if "error" in fabric:
            unusable.add(host)
            yield Fault(
                host,
                "reach",
                fabric["error"],
                f"export {variable}=NAME of the interface that the hosts share (`ip addr` on {host})",
            )
        elif not answers.alone and fabric["address"].startswith("127."):
            unusable.add(host)
            yield Fault(
                host, "reach",
                f"ranks would use {fabric['address']}, which no other host reaches: {fabric['chosen_by']}",
                "export GLOO_SOCKET_IFNAME=NAME of the interface that the hosts share, or correct /etc/hosts on "
                f"{host}",
            )  # fmt: skip
    pairs = {(host, other): why for host, others in answers.unreached.items() for other, why in others.items()}
    hosts = [host for host in listening if host not in unusable]
    nobody = [
        host for host in hosts if len(hosts) > 2 and all((other, host) in pairs for other in hosts if other != host)
    ]
    for host in nobody:
        why = next(why for (_, other), why in pairs.items() if other == host)
        remedy = f"open the fabric of {host} for all ports from the other hosts (firewall, cable, switch port)"
        yield Fault(host, "reach", f"no other host reaches it: {why}", remedy)
    reported: set[tuple[str, str]] = set()
    for (host, other), why in pairs.items():
        if {host, other} & {*nobody, *unusable} or (other, host) in reported:
            continue
        reported.add((host, other))
        both = (other, host) in pairs
        what = f"{host} and {other} do not reach each other" if both else f"{host} does not reach {other}"
        yield Fault(
            host, "reach", f"{what}: {why}",
            f"open all ports between {host} and {other} (firewall rules of both, routes, switch)",
        )  # fmt: skip


def check_all_reduce(answers: Answers) -> Iterator[Fault]:
    """Hosts on which the all-reduce failed, and how."""
    for host, error in answers.all_reduce_errors.items():
        yield Fault(
            host, "bandwidth", f"the all-reduce failed: {error}",
            f"see what {host} says: NCCL_DEBUG=INFO (GPUs), and that {answers.address}:{answers.port} is its way to "
            f"{answers.rendezvous_host}",
        )  # fmt: skip


def check_bandwidth(answers: Answers) -> Iterator[Fault]:
    """Hosts far below the median rate, or below what any training network does."""
    rates, backend = answers.rates, answers.backend
    all_rates = [rate for ways in rates.values() for rate in ways.values()]
    if not all_rates:
        return
    median = statistics.median_high(all_rates)
    pair = len(rates) == 2
    for host, ways in list(rates.items())[1 if pair else 0 :]:
        slowest = min(ways.values())
        relative = slowest < SLOW_SHARE[backend] * median
        if not relative and slowest >= SLOW_ALL:
            continue
        sure = slowest < SLOW_ALL or backend == "nccl" or slowest < SLOW_GLOO
        measured = ", ".join(f"{name} at {rate_text(rate)}" for name, rate in ways.items())
        either = f" (or {next(iter(rates))} is: of two hosts nobody can tell)" if pair else ""
        yield Fault(
            host, "bandwidth", f"slow: {measured}; the median is {rate_text(median)}{either}",
            f"look at the link of {host} (`ethtool` its interface: speed, errors; cable, switch port), and that "
            f"{backend.upper()}_SOCKET_IFNAME names the fast network; or leave it out with --exclude {host}",
            warning=not sure,
        )  # fmt: skip
