"""The table of checks: what --help prints, --skip takes and the preflight walks is the same list."""

from __future__ import annotations

import pytest

from jp_train.cli.main import build_parser
from jp_train.cluster.checks import CHECK_NAMES, CHECKS
from tests.cluster.test_host_checks import cluster, given, host

PHASES = {"facts", "clocks", "shared", "reach", "data", "torch", "bandwidth"}


def test_every_check_has_a_name_of_its_own_and_is_made_after_a_phase_of_the_preflight() -> None:
    assert len(set(CHECK_NAMES)) == len(CHECKS) == 13
    assert all(check.after and check.after.keys() <= PHASES for check in CHECKS)


def test_the_help_of_preflight_lists_every_check_with_its_question(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["preflight", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert all(f"{check.name} {check.question}" in words for check in CHECKS)


def test_no_check_of_the_facts_finds_a_fault_in_equal_hosts_and_each_sees_the_host_that_differs() -> None:
    answers = given(code=host()["code"], config=host()["config"], checkpoint_bytes=1 << 30, facts=cluster())

    def faulty() -> dict[str, set[str]]:
        return {
            check.name: {fault.host for find in check.after["facts"] for fault in find(answers)}
            for check in CHECKS
            if "facts" in check.after
        }

    healthy = faulty()
    assert healthy.pop("devices") == {"b2", "c3"}, "planted hosts have one name and address: one machine"
    assert healthy == {name: set() for name in ("versions", "code", "config", "disk", "jobs", "locks")}
    lock = {"path": "/e/lock", "age_s": 9e9}
    job = {"launch": "L", "pid": 1, "command": "x", "runner": False, "user": "u", "own": True, "run_dir": "/r"}
    full = {"path": "/r", "there": "/r", "free": 0, "size": 1, "device": 1}
    answers.facts = cluster(
        b2={
            "python": "3.9.0", "code": {}, "config": "lr: 9\n", "devices": 4, "disks": {"run folder": full},
            "locks": [lock], "jobs": [job],
        }
    )  # fmt: skip
    assert all("b2" in hosts for hosts in faulty().values())
