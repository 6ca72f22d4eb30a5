"""The report: faults first, alike ones together, JSON with everything, an exit code, and nothing that steers a
terminal."""

from __future__ import annotations

import json

import pytest

from jp_train.cluster.findings import Fault, Report, gib, rate_text


def report(faults: list[Fault], warnings: list[Fault] | None = None, hosts: int = 12) -> Report:
    names = [f"node{number:02}" for number in range(1, hosts + 1)]
    return Report(
        faults=faults,
        warnings=warnings or [],
        hosts={names[0]: {"slots": 8, "torch": "2.13.0"}},
        notes=["a note"],
        seconds=3.21,
        selected=names,
    )


def test_faults_come_before_warnings_and_each_has_its_remedy_below() -> None:
    lines = (
        report(
            [Fault("node02", "disk", "full", "clear it")], [Fault("node01", "clock", "late", "set it", warning=True)]
        )
        .table()
        .splitlines()
    )
    assert lines[:4] == [
        "FAULT  node02  disk: full",
        "       -> clear it",
        "warning  node01  clock: late",
        "         -> set it",
    ]
    assert lines[-2:] == ["a note", "1 fault, 1 warning: 12 hosts in 3.2 s"]


def test_the_same_fault_of_many_hosts_is_one_entry_of_the_table_and_many_of_the_json() -> None:
    faults = [Fault(f"node{n:02}", "data", f"no data on node{n:02}", f"copy it to node{n:02}") for n in range(1, 11)]
    result = report(faults)
    assert (
        result.table().count("FAULT") == 1 and "node01, node02, node03, node04 and 6 more (10 hosts" in result.table()
    )
    assert len(result.as_json()["faults"]) == 10
    assert (
        "FAULT  node01, node02 (2 hosts; what follows is of node01)  data: no data on node01"
        in report(faults[:2]).table()
    )
    other = [*faults, Fault("node11", "data", "no data on node10", "copy it to node11")]
    assert report(other).table().count("FAULT") == 2


def test_hosts_that_failed_after_different_times_with_the_same_error_are_one_entry() -> None:
    error = "unknown host name after {:.1f} s: ssh: Could not resolve hostname {}"
    faults = [Fault(f"node{n:02}", "ssh", error.format(n / 10, f"node{n:02}"), "correct the name") for n in (1, 2, 3)]
    table = report(faults).table()
    assert table.count("FAULT") == 1 and "node01, node02, node03 (3 hosts; what follows is of node01)" in table
    other = [*faults, Fault("node04", "ssh", "connection refused after 0.1 s", "correct the name")]
    assert report(other).table().count("FAULT") == 2, "another cause stays an entry of its own"


@pytest.mark.parametrize(
    "error",
    [
        "no answer after 5.0 s: ssh: connect to host 10.0.3.{} port 22: Connection timed out",
        "no route after 3.1 s: ssh: connect to host fe80::1:{}%eth0 port 22: No route to host",
        "does not reach the rendezvous on node01: [2001:db8::{}]:29500 timed out",
        "no other host reaches it: 192.168.7.{}:41{}17: connection refused",
    ],
)
def test_hosts_whose_errors_differ_in_their_addresses_only_are_one_entry(error: str) -> None:
    faults = [Fault(f"node{n:02}", "ssh", error.replace("{}", str(n)), "open the port") for n in (2, 3, 4)]
    table = report(faults).table()
    assert table.count("FAULT") == 1 and "node02, node03, node04 (3 hosts; what follows is of node02)" in table
    versions = [Fault(f"node{n:02}", "versions", f"nccl 2.27.3.{n}, but none on 1", "install it") for n in (2, 3)]
    assert report(versions).table().count("FAULT") == 2, "a version is no address"


def test_only_faults_decide_the_exit_code() -> None:
    warned = report([], [Fault("node01", "clock", "late", "set it", warning=True)])
    assert (warned.ok, warned.exit_code) == (True, 0)
    faulty = report([Fault("node01", "clock", "late", "set it")])
    assert (faulty.ok, faulty.exit_code) == (False, 5)


def test_the_json_is_json_with_host_check_found_and_remedy() -> None:
    result = json.loads(json.dumps(report([Fault("node01", "ssh", "x", "y")]).as_json()))
    assert result["faults"] == [{"host": "node01", "check": "ssh", "found": "x", "remedy": "y"}]
    assert result["ok"] is False and result["hosts"]["node01"]["torch"] == "2.13.0"


def test_what_a_host_says_cannot_steer_the_terminal() -> None:
    table = report([Fault("node01", "ssh", "bad \x1b[2J\nFAULT node02", "do \r this")]).table()
    assert (
        "\x1b" not in table
        and "\r" not in table
        and table.count("\n") == report([Fault("node01", "ssh", "x", "y")]).table().count("\n")
    )


def test_sizes_and_rates_read_as_people_write_them() -> None:
    assert (gib(3 << 30), gib(5 << 20)) == ("3.00 GiB", "5.0 MiB")
    assert (rate_text(2.5e9), rate_text(1.25e6)) == ("2.50 GB/s", "1.2 MB/s")
