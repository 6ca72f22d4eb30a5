"""Facts of a host, from planted files and from this very machine."""

from __future__ import annotations

import errno
import os
import platform
import pwd
import shutil
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest

from jp_train.cluster import facts
from jp_train.cluster.command import LOGS
from jp_train.run.lock import LAUNCH_ID


def test_every_fact_of_this_machine_can_be_had_and_torch_is_not_loaded() -> None:
    code = (
        "import json, sys; from jp_train.cluster.facts import Query, host_facts; "
        "print(json.dumps(host_facts(Query()))); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    text, loaded = done.stdout.splitlines()
    assert loaded == "False" and '"error"' not in text.replace('"jobs": [{', "")


def test_versions_are_those_that_are_installed() -> None:
    assert facts.packages()["torch"] == metadata.version("torch")
    values = facts.host_facts(facts.Query())
    assert values["python"] == platform.python_version() and values["host_name"] == socket.gethostname()


def test_one_fact_that_fails_does_not_hide_the_others(tmp_path: Path) -> None:
    values = facts.host_facts(facts.Query(proc=tmp_path / "nothing", devices=tmp_path / "nothing"))
    assert "FileNotFoundError" in values["devices"]["error"] and values["cores"] >= 1


@pytest.mark.parametrize(
    ("names", "count"),
    [
        (("null", "nvidiactl", "nvidia-uvm"), 0),
        (("nvidia0", "nvidia1", "nvidia10", "nvidiactl", "nvidia-modeset"), 3),
        (("kfd", "dri/renderD128", "dri/renderD129", "dri/card0"), 2),
        (("dri/renderD128",), 0),
    ],
)
def test_gpus_are_counted_by_the_drivers_device_files(tmp_path: Path, names: tuple[str, ...], count: int) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert facts.device_count(tmp_path) == count


def test_the_driver_version_is_read_from_the_kernels_own_line(tmp_path: Path) -> None:
    assert facts.driver_version(tmp_path) == ""
    (tmp_path / "driver/nvidia").mkdir(parents=True)
    line = (
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.90.07  Release Build  (x@y)  Fri May 31\n"
        "GCC version: 12\n"
    )
    (tmp_path / "driver/nvidia/version").write_text(line)
    assert facts.driver_version(tmp_path) == "550.90.07"


def test_code_digests_change_with_a_file_and_with_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a/__pycache__").mkdir(parents=True)
    (tmp_path / "a/b.py").write_text("x = 1")
    (tmp_path / "c.yaml").write_text("k: 1")
    before = facts.code_digests(tmp_path)
    assert set(before) == {"a/b.py", "c.yaml"}
    (tmp_path / "a/__pycache__/b.py").write_text("x")
    (tmp_path / "notes.txt").write_text("x")
    os.utime(tmp_path / "a/b.py", (1, 1))
    assert facts.code_digests(tmp_path) == before
    (tmp_path / "a/b.py").write_text("x = 2")
    assert {name for name, digest in facts.code_digests(tmp_path).items() if digest != before[name]} == {"a/b.py"}
    assert "cluster/facts.py" in facts.code_digests()


def test_caches_lie_where_the_libraries_look_for_them() -> None:
    folders = facts.cache_folders({"XDG_CACHE_HOME": "/c", "HF_HOME": "/hf"})
    assert (folders["torch extensions"], folders["Hugging Face cache"], folders["index cache"]) == (
        "/c/torch_extensions",
        "/hf",
        "/c/jp_train",
    )
    assert (folders["temporary files"], facts.cache_folders({"TMPDIR": "/t"})["temporary files"]) == ("/tmp", "/t")
    assert facts.cache_folders({"TORCH_EXTENSIONS_DIR": "/e"})["torch extensions"] == "/e"


def test_a_folder_that_will_be_made_counts_as_the_disk_it_will_lie_on(tmp_path: Path) -> None:
    disk = facts.disk(tmp_path / "not/yet/there")
    assert (
        disk["there"] == str(tmp_path) and "error" not in disk and disk["free"] <= shutil.disk_usage(tmp_path).free * 2
    )
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_takes_no_file_is_reported_with_the_reason() -> None:
    assert facts.disk(Path("/proc/self"))["errno"] in (errno.ENOENT, errno.EACCES, errno.EPERM)


def test_a_folder_of_which_nobody_can_tell_whether_it_is_there_is_an_error_of_this_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert facts.disk(tmp_path / ("x" * 300) / "run")["errno"] == errno.ENAMETOOLONG
    disk = facts.disk(tmp_path / "loop/run")
    assert (disk["errno"], disk["there"]) == (errno.ELOOP, str(tmp_path / "loop/run"))


def test_a_link_to_a_disk_that_is_not_mounted_is_an_error_and_not_the_disk_of_the_link(tmp_path: Path) -> None:
    (tmp_path / "runs").symlink_to(tmp_path / "not_mounted")
    assert facts.disk(tmp_path / "runs/one")["errno"] == errno.ENOENT
    assert list(tmp_path.iterdir()) == [tmp_path / "runs"]


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo '0, 412, 40960'; echo '1, 39000, 40960'", [[0, 412, 40960], [1, 39000, 40960]]),
        ("echo '0, [N/A], [N/A]'", []),
        ("echo", []),
    ],
)
def test_the_memory_in_use_is_read_from_nvidia_smi_and_what_has_no_number_is_left_out(
    script: str, expected: list
) -> None:
    assert facts.gpu_memory(("sh", "-c", script)) == expected


def test_an_nvidia_smi_that_fails_or_hangs_is_an_error_and_none_at_all_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="code 9: Unable to determine the device handle"):
        facts.gpu_memory(("sh", "-c", "echo Unable to determine the device handle; exit 9"))
    monkeypatch.setattr(facts, "NVIDIA_SMI_S", 0.2)
    with pytest.raises(RuntimeError, match="no answer within 0.2 s"):
        facts.gpu_memory(("sh", "-c", "exec sleep 20"))
    assert facts.gpu_memory(("/no/such/nvidia-smi",)) == []


def test_gpus_whose_processes_have_just_been_killed_are_given_time(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([[[0, 39000, 40960]], [[0, 400, 40960]]])
    assert facts.gpu_memory_at_rest(lambda: next(readings)) == [[0, 400, 40960]]
    monkeypatch.setattr(facts, "GPU_REST_S", 0.2)
    assert facts.gpu_memory_at_rest(lambda: [[0, 39000, 40960]]) == [[0, 39000, 40960]]


def test_locks_of_both_layouts_are_found_with_their_age(tmp_path: Path) -> None:
    for name in ("fused_adam/lock", "py311_cpu/async_io/lock", "py311_cpu/async_io/build.ninja"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    os.utime(tmp_path / "fused_adam/lock", (time.time() - 100,) * 2)
    locks = facts.build_locks(tmp_path)
    assert [Path(lock["path"]).parent.name for lock in locks] == ["fused_adam", "async_io"]
    assert 99 < locks[0]["age_s"] < 200 and locks[1]["age_s"] < 50
    assert facts.build_locks(tmp_path / "nothing") == []


def test_jobs_are_found_by_the_mark_of_their_launch_and_our_own_are_left_out() -> None:
    mark = f"test{os.getpid()}"
    job = subprocess.Popen(["sleep", "60"], env={**os.environ, LAUNCH_ID: mark, LOGS: f"/runs/a/logs/{mark}"})
    runner = subprocess.Popen(
        [sys.executable, "-c", "input()", "deepspeed.launcher.runner"],
        env={**os.environ, LAUNCH_ID: mark},
        stdin=subprocess.PIPE,
    )
    try:
        deadline = time.monotonic() + 10
        while (
            len(jobs := [j for j in facts.launched_jobs([]) if j["launch"] == mark]) < 2 and time.monotonic() < deadline
        ):
            time.sleep(0.05)
        assert [(j["pid"], j["runner"]) for j in jobs] == sorted([(job.pid, False), (runner.pid, True)])
        assert jobs[0]["command"] == "sleep 60"
        assert [j["run_dir"] for j in jobs] == ["/runs/a", ""]
        me = {"user": pwd.getpwuid(os.geteuid()).pw_name, "own": os.geteuid() != 0}
        assert all(j | me == j for j in jobs)
        assert not [j for j in facts.launched_jobs([mark]) if j["launch"] == mark]
    finally:
        for process in (job, runner):
            process.kill()
            process.wait()
        assert runner.stdin is not None
        runner.stdin.close()


def test_the_holder_of_a_port_is_found_by_its_socket() -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        assert facts.port_holder(held.getsockname()[1]).startswith(f"pid {os.getpid()} (")
        free = held.getsockname()[1]
    assert facts.port_holder(free) == ""


def test_a_placed_file_is_seen_and_taken_away_and_no_folder_is_made_for_it(tmp_path: Path) -> None:
    there = Path(facts.write_marker(tmp_path / "runs/one", "nonce", "word"))
    assert there == tmp_path and [path.name for path in tmp_path.iterdir()] == ["nonce"]
    assert facts.has_marker(there, "nonce", "word", wait_s=0) and not facts.has_marker(
        there, "nonce", "another", wait_s=0
    )
    assert not facts.has_marker(tmp_path / "runs/one", "nonce", "word", wait_s=0)
    facts.remove_marker(there, "nonce")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "runs/one").mkdir(parents=True)
    assert facts.write_marker(tmp_path / "runs/one", "nonce", "word") == str(tmp_path / "runs/one")


def test_a_file_that_appears_late_is_waited_for(tmp_path: Path) -> None:
    late = subprocess.Popen(["sh", "-c", f"sleep 0.6; printf word > '{tmp_path}/nonce'"])
    assert facts.has_marker(tmp_path, "nonce", "word", wait_s=20)
    late.wait()


def test_a_folder_for_the_index_is_looked_at_in_place_of_the_cache(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("preset: janus_pro_1b/stage2\ndata: {index_dir: index}\n")
    assert facts.Query(config=str(config)).folders()["index cache"] == os.path.abspath("index")
    plain = facts.Query(config=str(config), overrides=("data.index_dir=''",))
    assert plain.folders()["index cache"].endswith("jp_train")
