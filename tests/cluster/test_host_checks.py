"""Planted facts of all hosts, and the faults that are made of them: one test an idea, each with its counterpart that
must stay silent."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from jp_train.cluster import host_checks
from jp_train.cluster.answers import Answers
from jp_train.cluster.facts import FACTS
from jp_train.cluster.findings import Fault
from jp_train.cluster.remote import Answer, Cause

HOSTS = ("a1", "b2", "c3")
GIB = 1 << 30


def host(**changed: Any) -> dict[str, Any]:
    """The facts of a healthy host with 8 GPUs."""
    room = {"path": "/x", "there": "/x", "free": 100 * GIB, "size": 200 * GIB, "device": 1}
    return {
        "gpu_memory": [[gpu, 400, 40960] for gpu in range(8)], "host_name": "h", "python": "3.11.7", "driver": "550.1",
        "devices": 8, "cores": 64, "addresses": ["10.0.0.1"],
        "packages": {"torch": "2.13.0", "deepspeed": "0.19.8"}, "code": {"train.py": "aa", "loop.py": "bb"},
        "config": "seed: 1\nlr: 2\n",
        "disks": {"run folder": room, "temporary files": room, "shared memory": room, "index cache": room},
        "locks": [], "jobs": [], **changed,
    }  # fmt: skip


def cluster(**odd: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: host(**odd.get(name, {})) for name in HOSTS}


def given(**what: Any) -> Answers:
    """What the preflight of a cluster on several hosts with 8 slots each would know."""
    selection, slots = dict.fromkeys(HOSTS, tuple(range(8))), dict.fromkeys(HOSTS, 8)
    return Answers(**{"selection": selection, "slots": slots, "local": False, "port": 29500} | what)


def hosts_and_warnings(faults: Any) -> list[tuple[str, bool]]:
    return [(fault.host, fault.warning) for fault in faults]


def only(faults: Any) -> Fault:
    (fault,) = faults
    return fault


# -- who is odd ------------------------------------------------------------------------------------


def test_what_most_hosts_have_is_right_and_a_tie_is_decided_by_the_launching_host() -> None:
    assert host_checks.odd_ones({"a": 1, "b": 2, "c": 2}) == (2, ["a"])
    assert host_checks.odd_ones({"a": 1, "b": 2}) == (1, ["b"])
    assert host_checks.odd_ones({"a": 1, "b": 2}, here=2) == (2, ["a"])
    assert host_checks.odd_ones({"a": 1, "b": 2}, here=3) == (1, ["b"])
    assert host_checks.odd_ones({}) == (None, [])


def test_equal_hosts_have_no_fault() -> None:
    facts = cluster()
    assert list(host_checks.check_versions(given(facts=facts))) == []
    assert list(host_checks.check_code(given(facts=facts, code=host()["code"]))) == []
    assert list(host_checks.check_config(given(facts=facts, config=host()["config"]))) == []
    assert list(host_checks.check_devices(given(facts=facts))) == []
    assert list(host_checks.check_disks(given(facts=facts, checkpoint_bytes=GIB))) == []
    assert list(host_checks.check_jobs(given(facts=facts))) == list(host_checks.check_locks(given(facts=facts))) == []


def test_another_version_is_named_with_both_versions() -> None:
    fault = only(
        host_checks.check_versions(given(facts=cluster(b2={"packages": {"torch": "2.12.0", "deepspeed": "0.19.8"}})))
    )
    assert (fault.host, fault.check) == ("b2", "versions")
    assert (
        "torch 2.12.0" in fault.message
        and "2.13.0 on 2 of 3 hosts" in fault.message
        and "pip install torch==2.13.0" in fault.remedy
    )


def test_a_package_that_one_host_lacks_and_one_that_all_lack_are_faults() -> None:
    assert (
        "deepspeed not installed"
        in only(host_checks.check_versions(given(facts=cluster(c3={"packages": {"torch": "2.13.0"}})))).message
    )
    none = {name: {"packages": {"torch": "2.13.0", "deepspeed": "not installed"}} for name in HOSTS}
    assert sorted(hosts_and_warnings(host_checks.check_versions(given(facts=cluster(**none))))) == [
        (name, False) for name in HOSTS
    ]


def test_a_driver_that_one_host_lacks_is_named() -> None:
    fault = only(host_checks.check_versions(given(facts=cluster(a1={"driver": ""}))))
    assert "driver none" in fault.message and not fault.warning


def test_drivers_of_two_releases_are_a_warning_because_the_ranks_meet_all_the_same() -> None:
    assert hosts_and_warnings(host_checks.check_versions(given(facts=cluster(a1={"driver": "550.2"})))) == [
        ("a1", True)
    ]


def test_other_code_is_named_by_its_files() -> None:
    fault = only(
        host_checks.check_code(
            given(facts=cluster(b2={"code": {"train.py": "aa", "loop.py": "XX", "new.py": "cc"}}), code=host()["code"])
        )
    )
    assert fault.host == "b2" and "files loop.py, new.py differ" in fault.message


def test_when_all_hosts_agree_and_the_launching_one_differs_it_is_named() -> None:
    fault = only(host_checks.check_code(given(facts=cluster(), code={"train.py": "other", "loop.py": "bb"})))
    assert fault.host == "(this host)" and "train.py" in fault.message


def test_the_configuration_is_compared_with_the_one_that_launch_reads() -> None:
    fault = only(
        host_checks.check_config(given(facts=cluster(c3={"config": "seed: 1\nlr: 3\n"}), config=host()["config"]))
    )
    assert fault.host == "c3" and "lr: 3" in fault.message
    unreadable = only(
        host_checks.check_config(
            given(
                facts=cluster(a1={"config": {"error": "ConfigError: run.yaml is not there"}}), config=host()["config"]
            )
        )
    )
    assert unreadable.host == "a1" and "run.yaml is not there" in unreadable.message
    assert list(host_checks.check_config(given(facts=cluster()))) == []


# -- devices ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("devices", "slots", "selected", "expected"),
    [
        (8, 8, range(8), []),
        (8, 9, range(9), [("a1", False)]),
        (8, 9, range(8), []),  # the slot too many is not selected
        (8, 4, range(4), [("a1", True)]),
        (0, 2, range(2), []),
        (0, 9, range(9), [("a1", True)]),
    ],
)
def test_slots_must_be_devices_on_a_gpu_host_and_should_be_cores_elsewhere(
    devices: int, slots: int, selected: range, expected: list
) -> None:
    facts = {"a1": host(devices=devices, cores=4)}
    assert (
        hosts_and_warnings(
            host_checks.check_devices(given(facts=facts, selection={"a1": selected}, slots={"a1": slots}))
        )
        == expected
    )


def test_a_host_without_gpus_among_hosts_with_gpus_is_a_fault() -> None:
    fault = only(host_checks.check_devices(given(facts=cluster(b2={"devices": 0}))))
    assert fault.host == "b2" and "hosts a1, c3 have GPUs" in fault.message


def test_torch_that_sees_fewer_gpus_than_there_are_is_a_fault_and_so_is_another_nccl() -> None:
    torch = {name: {"version": "2.13.0", "cuda": "12.6", "nccl": "2.27.5", "devices": 8} for name in HOSTS}
    assert list(host_checks.check_torch(given(torch=torch, facts=cluster()))) == []
    torch["b2"] = torch["b2"] | {"devices": 0, "nccl": "2.20.0"}
    faults = list(host_checks.check_torch(given(torch=torch, facts=cluster())))
    assert hosts_and_warnings(faults) == [("b2", False)] * 2
    assert "nccl of torch runs as 2.20.0" in faults[0].message and "can use 0 of 8 GPUs" in faults[1].message


def test_selected_gpus_on_which_torch_can_make_no_tensor_are_one_fault_with_its_reason() -> None:
    old = "The NVIDIA driver on your system is too old"
    build = {"version": "2.13.0", "cuda": "13.0", "nccl": "2.27.5", "devices": 8}
    torch = {"a1": build, "b2": build | {"broken": {str(device): old for device in range(8)}}, "c3": build}
    fault = only(host_checks.check_gpus_work(given(torch=torch, facts=cluster(), selection={"b2": (2, 3)})))
    assert (fault.host, fault.check, fault.warning) == ("b2", "devices", False)
    assert f"GPUs 2, 3: {old}" in fault.message and "--exclude b2:2,3" in fault.remedy


def test_a_job_that_was_given_a_part_of_a_hosts_gpus_is_warned_and_may_run() -> None:
    torch = {name: {"version": "2.13.0", "cuda": "12.6", "nccl": "2.27.5", "devices": 4} for name in HOSTS}
    selection = {"a1": (0, 1), "b2": range(4), "c3": range(5)}
    assert hosts_and_warnings(host_checks.check_torch(given(torch=torch, facts=cluster(), selection=selection))) == [
        ("a1", True),
        ("b2", True),
        ("c3", False),
    ]


def test_gpus_in_use_by_anybody_are_named_if_they_are_selected() -> None:
    facts = cluster(b2={"gpu_memory": [[0, 400, 40960], [1, 30720, 40960], [2, 2048, 40960]]})
    fault = only(host_checks.check_busy(given(facts=facts)))
    assert (fault.host, fault.check, fault.warning) == ("b2", "devices", False)
    assert "GPUs 1 (30.00 GiB), 2 (2.00 GiB) in use" in fault.message and "--exclude b2:1,2" in fault.remedy
    assert list(host_checks.check_busy(given(facts=facts, selection=dict.fromkeys(HOSTS, (0, 3))))) == []
    assert hosts_and_warnings(host_checks.check_busy(given(facts=facts, local=True))) == [("b2", True)]


def test_one_machine_under_two_names_is_a_fault_of_the_second() -> None:
    facts = cluster(
        a1={"host_name": "x", "addresses": ["10.0.0.1", "172.17.0.1"]},
        c3={"host_name": "x", "addresses": ["172.17.0.1", "10.0.0.1"]},
    )
    fault = only(host_checks.check_machines(given(facts=facts)))
    assert fault.host == "c3" and "same machine as a1" in fault.message
    clones = {name: host(host_name="ubuntu", addresses=[f"10.0.0.{number}"]) for number, name in enumerate(HOSTS)}
    docker = {name: host(host_name=name, addresses=["172.17.0.1"]) for name in HOSTS}
    untold = {name: host(host_name="ubuntu", addresses=[]) for name in HOSTS}
    for healthy in (clones, docker, untold):
        assert list(host_checks.check_machines(given(facts=healthy))) == []


def test_a_torch_whose_metadata_already_shows_its_version_is_not_reported_twice() -> None:
    torch = {name: {"version": "2.13.0", "cuda": "", "devices": 8} for name in HOSTS} | {
        "b2": {"version": "2.12.0", "cuda": "", "devices": 8}
    }
    assert list(host_checks.check_torch(given(torch=torch, facts=cluster(b2={"packages": {"torch": "2.12.0"}})))) == []
    assert hosts_and_warnings(host_checks.check_torch(given(torch=torch, facts=cluster()))) == [("b2", False)]


# -- clocks and disks ------------------------------------------------------------------------------


def test_a_clock_is_compared_with_the_median_so_that_only_the_wrong_one_is_named() -> None:
    assert list(host_checks.check_clocks(given(clocks={"a1": (0.2, 0.1), "b2": (-0.3, 0.1)}))) == []
    fault = only(host_checks.check_clocks(given(clocks={"a1": (0.0, 0.01), "b2": (-90.0, 0.01), "c3": (0.0, 0.01)})))
    assert fault.host == "b2" and "90.0 s behind" in fault.message and not fault.warning
    # the launching host itself is wrong: every host looks skewed by the same, and none is
    assert (
        list(host_checks.check_clocks(given(clocks={"a1": (50.0, 0.01), "b2": (50.0, 0.01), "c3": (50.1, 0.01)}))) == []
    )


def test_a_small_skew_is_a_warning_and_a_slow_answer_is_none() -> None:
    assert only(host_checks.check_clocks(given(clocks={"a1": (2.0, 0.1), "b2": (0.0, 0.1)}))).warning
    assert list(host_checks.check_clocks(given(clocks={"a1": (2.0, 1.9), "b2": (0.0, 0.1)}))) == []


def disks(**changed: Any) -> dict[str, Any]:
    return {"disks": {**host()["disks"], **changed}}


def test_room_for_less_than_one_checkpoint_is_a_fault_and_little_room_for_caches_a_warning() -> None:
    little = {"path": "/r", "there": "/r", "free": 2 * GIB, "size": 9 * GIB, "device": 2}
    assert hosts_and_warnings(
        host_checks.check_disks(given(facts={"a1": host(**disks(**{"run folder": little}))}, checkpoint_bytes=3 * GIB))
    ) == [("a1", False)]
    assert (
        hosts_and_warnings(
            host_checks.check_disks(given(facts={"a1": host(**disks(**{"run folder": little}))}, checkpoint_bytes=GIB))
        )
        == []
    )
    assert hosts_and_warnings(
        host_checks.check_disks(given(facts={"a1": host(**disks(**{"index cache": little | {"free": GIB // 2}}))}))
    ) == [("a1", True)]


def test_what_cannot_be_written_on_one_disk_is_one_fault_with_all_its_folders() -> None:
    full = {"path": "/r", "there": "/r", "device": 3, "error": "No space left on device", "errno": errno.ENOSPC}
    fault = only(
        host_checks.check_disks(given(facts={"a1": host(**disks(**{"run folder": full, "temporary files": full}))}))
    )
    assert (
        "run folder (/r), temporary files (/r) cannot be written" in fault.message
        and "free space" in fault.remedy
        and not fault.warning
    )
    only_cache = only(
        host_checks.check_disks(
            given(
                facts={
                    "a1": host(**disks(**{"index cache": full | {"error": "Permission denied", "errno": errno.EACCES}}))
                }
            )
        )
    )
    assert only_cache.warning and "make /r writable on a1" in only_cache.remedy


def test_a_fact_that_could_not_be_had_is_a_warning_and_breaks_nothing() -> None:
    replaced = [name for name, fact in FACTS.items() if fact.harmless is not None]
    broken = {name: {"error": "OSError: no"} for name in replaced}
    facts, faults = host_checks.settled(cluster(b2=broken))
    assert (
        {fault.host for fault in faults} == {"b2"}
        and len(faults) == len(replaced) == len(FACTS) - 2
        and all(fault.warning for fault in faults)
    )
    for faults in (
        host_checks.check_disks(given(facts=facts, checkpoint_bytes=1)),
        host_checks.check_jobs(given(facts=facts)),
        host_checks.check_locks(given(facts=facts)),
    ):
        assert list(faults) == []
    list(host_checks.check_versions(given(facts=facts)))
    list(host_checks.check_devices(given(facts=facts)))


def test_a_host_with_an_older_jp_train_that_tells_less_is_a_warning_and_its_code_a_fault() -> None:
    older = {name: value for name, value in host().items() if name not in ("locks", "cores")} | {
        "code": {"train.py": "old"}
    }
    facts, faults = host_checks.settled({**cluster(), "b2": older})
    assert [fault.message for fault in faults] == [
        f"{name} could not be found out: b2 does not tell it: another version of jp_train"
        for name in ("cores", "locks")
    ]
    assert only(host_checks.check_code(given(facts=facts, code=host()["code"]))).host == "b2"


# -- data ------------------------------------------------------------------------------------------


def data(**changed: Any) -> dict[str, Any]:
    source = {"shards": 2, "digest": "d", "index": {"print": "i"}, "read": 10}
    return {
        "sources": {"text": source, "pictures": source, **changed.get("sources", {})},
        "files": {"tokenizer.path": {"path": "/t", "files": 1, "digest": "t"}, **changed.get("files", {})},
    }


def test_equal_data_has_no_fault_and_other_data_is_one_fault_a_host() -> None:
    assert list(host_checks.check_data(given(data={name: data() for name in HOSTS}))) == []
    other = data(
        sources={"text": {"shards": 2, "digest": "X", "index": {}, "read": 1}},
        files={"tokenizer.path": {"path": "/t", "files": 1, "digest": "X"}},
    )
    fault = only(host_checks.check_data(given(data={name: data() if name != "c3" else other for name in HOSTS})))
    assert fault.host == "c3" and "source text, tokenizer.path: names, sizes or contents" in fault.message


def test_data_that_cannot_be_read_is_one_fault_a_host_with_the_first_reason() -> None:
    broken = data(sources={name: {"error": f"{name} is not there"} for name in ("text", "pictures")})
    fault = only(host_checks.check_data(given(data={name: data() if name != "a1" else broken for name in HOSTS})))
    assert (
        "source text: text is not there; also source pictures" in fault.message
        and "mount or copy the data on a1" in fault.remedy
    )
    everywhere = list(host_checks.check_data(given(data=dict.fromkeys(HOSTS, broken))))
    assert [fault.remedy for fault in everywhere] == ["correct data.root and the paths in the configuration"] * 3


def test_another_index_is_a_fault_and_none_at_all_a_warning() -> None:
    other = data(
        sources={"text": {"shards": 2, "digest": "d", "index": {"print": "X", "another stage": "y"}, "read": 1}}
    )
    fault = only(host_checks.check_data(given(data={name: data() if name != "b2" else other for name in HOSTS})))
    assert fault.host == "b2" and "source text: the index differs" in fault.message and not fault.warning
    missing = only(
        host_checks.check_data(
            given(
                data=dict.fromkeys(HOSTS, data(sources={"text": {"shards": 2, "digest": "d", "index": {}, "read": 1}}))
            )
        )
    )
    assert missing.warning and "not indexed yet: source text" in missing.message


# -- what is left, ports, reach --------------------------------------------------------------------


def job(launch: str, *, runner: bool = False, own: bool = True, run_dir: str = "/runs/a") -> dict[str, Any]:
    whose = {"user": "ada", "own": own, "run_dir": run_dir}
    return {"launch": launch, "pid": 7, "command": "python -u train", "runner": runner, **whose}


def test_processes_of_a_launch_are_a_fault_when_its_launcher_is_gone_and_a_warning_while_it_lives() -> None:
    dead = cluster(b2={"jobs": [job("L1")]})
    fault = only(host_checks.check_jobs(given(facts=dead)))
    assert (
        fault.host == "b2"
        and "whose launcher is gone" in fault.message
        and "ssh b2 kill -9 7" in fault.remedy
        and not fault.warning
    )
    assert hosts_and_warnings(host_checks.check_jobs(given(facts=dead, jobs=[job("L1", runner=True)]))) == [
        ("b2", True)
    ]
    alive = cluster(b2={"jobs": [job("L1")]}, a1={"jobs": [job("L1", runner=True)]})
    assert hosts_and_warnings(host_checks.check_jobs(given(facts=alive))) == [("a1", True), ("b2", True)]
    assert hosts_and_warnings(host_checks.check_jobs(given(facts=dead, local=True))) == [("b2", True)]
    other = only(host_checks.check_jobs(given(facts=cluster(b2={"jobs": [job("preflight-0a1b")]}))))
    assert other.warning and "another preflight" in other.message and "kill" not in other.remedy


@pytest.mark.parametrize(
    ("own", "run_dir", "ends_with"),
    [
        (True, "/runs/b", "ssh b2 kill -9 7   (they are yours, ada's; if nobody trains there)"),
        (False, "/runs/a", "ssh b2 kill -9 7   (they are of this run folder; if nobody trains there)"),
        (False, "/runs/b", "not of this run, perhaps another person's: ask whose they are (processes 7)"),
        (False, "", "not of this run, perhaps another person's: ask whose they are (processes 7)"),
    ],
)
def test_how_to_kill_is_said_of_our_own_processes_only(own: bool, run_dir: str, ends_with: str) -> None:
    left = cluster(b2={"jobs": [job("L1", own=own, run_dir=run_dir)]})
    fault = only(host_checks.check_jobs(given(facts=left, run_dir="/runs/a")))
    assert fault.remedy == ends_with
    assert f"launch L1{' in ' * bool(run_dir)}{run_dir}, of user ada (python" in fault.message
    without_config = only(host_checks.check_jobs(given(facts=left)))
    assert ("kill" in without_config.remedy) == own


def test_an_old_lock_is_a_fault_and_a_young_one_may_be_a_build() -> None:
    facts = cluster(
        a1={"locks": [{"path": "/e/lock", "age_s": 4000.0}]}, c3={"locks": [{"path": "/e/lock", "age_s": 20.0}]}
    )
    assert hosts_and_warnings(host_checks.check_locks(given(facts=facts))) == [("a1", False), ("c3", True)]


# -- hosts that did not answer ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "check", "message", "remedy"),
    [
        (
            Answer("a1", 255, "", "ssh: connect: Connection refused", 0.1, Cause.REFUSED),
            "ssh",
            "connection refused",
            "systemctl start ssh",
        ),
        (
            Answer("a1", None, "", "no answer within 10 s when asked for the data", 9.0, Cause.TIMEOUT),
            "answer",
            "asked for the data",
            "log in to a1",
        ),
        (
            Answer("a1", 127, "", "env: '/v/python': No such file or directory", 0.1),
            "code",
            "/v/python",
            "at the same path",
        ),
        (Answer("a1", 1, "", "sh: 1: cd: can't cd to /w", 0.1), "code", "can't cd", "a1 needs /v/python and /w"),
        (
            Answer("a1", 1, "", "/v/python: No module named jp_train.cluster.probe", 0.1),
            "code",
            "No module named",
            "the same jp_train",
        ),
        (Answer("a1", 1, "", "SyntaxError: invalid syntax", 0.1), "answer", "SyntaxError", "run it by hand"),
    ],
)
def test_a_host_that_did_not_answer_gets_the_cause_and_its_own_remedy(
    answer: Answer, check: str, message: str, remedy: str
) -> None:
    fault = only(host_checks.check_answers({"a1": answer}, "/v/python", "/w"))
    assert (fault.check, message in fault.message, remedy in fault.remedy) == (check, True, True), fault
