"""Ranks that stand still are named and ended, and ranks that only take their time are left alone; stop signals in
every phase. All on real processes."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from jp_train.data.processes import process_state
from jp_train.engine.watch.guard import Pace
from jp_train.engine.watch.stop import SignalFlag
from jp_train.engine.watch.watchdog import Watchdog
from jp_train.errors import JpTrainError
from jp_train.run.lock import read_holder, take
from tests.distributed import Launch, Nursery, wait_for
from tests.engine.tiny_run import tiny_run

SMALL = {"model.vision.layers": 1, "model.language.layers": 2, "engine.activation_checkpointing": False}
STALL_S = 4.0
COLLECTIVE_S = 240.0
"""tiny_run's engine.collective_timeout_s."""


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("watchdog")
    (made / "data").symlink_to(data)
    return made


@pytest.fixture(scope="module")
def nursery():
    with Nursery(Path(__file__).resolve().parents[1] / "guard_worker.py") as started:
        yield started


def launch(nursery: Nursery, folder: Path, scenarios: list[dict], **options) -> Launch:
    for scenario in scenarios:
        changes = {} if scenario["kind"] == "turns" else {**SMALL, "engine.stall_timeout_s": STALL_S}
        scenario |= {"run_dir": str(folder / scenario["name"]), "data": str(folder / "data"), **changes}
    return nursery.run(folder / f"launch-{scenarios[0]['name']}", scenarios, world=2, timeout_s=900, **options)


def events(run: Path, name: str) -> list[dict]:
    return [
        event for event in map(json.loads, (run / "events.jsonl").read_text().splitlines()) if event["event"] == name
    ]


def planted(nursery: Nursery, folder: Path, what: str, steps_done: int = 2, **changes) -> tuple[Launch, dict, Path]:
    """A launch with one planted fault at step 3, and the one event that names it."""
    last = {"name": what, "kind": "planted", "what": what, "steps": 6, "exit_with_code": True, **changes}
    # the ranks' loaders keep their fork server: a run whose worker is killed costs little before the one whose worker
    # is stopped
    first = (
        [{**last, "name": "kill-worker", "what": "kill-worker", "exit_with_code": False}] if what == "worker" else []
    )
    done = launch(nursery, folder, [*first, last], grace_s=1.0 if what == "stop" else 30.0)
    run = folder / what
    found = events(run, "stalled") + events(run, "failed")
    assert len(found) == 1, (found, done.errors)
    last_step = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in last_step] == list(range(1, steps_done + 1))
    took = found[0]["time"] - (run / "metrics.jsonl").stat().st_mtime
    print(f"{what}: named {took:.1f} s after the last good step: {found[0]['reason']}")
    assert took < COLLECTIVE_S, "by the watchdog, long before a collective gives up"
    told = json.loads((run / "status.json").read_text())
    assert told["state"] == "failed" and told["reason"].endswith(found[0]["reason"])
    return done, found[0], run


def test_an_unequal_module_sequence_that_gloo_does_not_see_is_named(nursery, folder):
    done, event, run = planted(nursery, folder, "skip")
    assert done.codes == [1, 1]
    assert (
        "rank 1 at step 3 micro-batch 0 entered model.language_model.norm where rank 0 entered "
        "model.language_model.layers.1.input_layernorm" in event["reason"]
    )
    stacks = {path.name: path.read_text() for path in (run / "stacks").iterdir()}
    assert stacks.keys() == {"rank_0000_step_3.txt", "rank_0001_step_3.txt"}
    assert all("in train_step" in text and "watchdog.py" in text for text in stacks.values()), "stacks of all threads"


def test_a_killed_rank_is_named_at_once_by_the_one_whose_collective_fails(nursery, folder):
    done, event, _ = planted(nursery, folder, "die")
    assert done.codes == [1, -signal.SIGKILL] and event["event"] == "failed"
    assert event["reason"].startswith("rank 1 (process ") and "is gone" in event["reason"].partition(";")[0], (
        "cause first"
    )
    assert "; so a collective failed on rank 0 at step 3, forward, micro-batch 0" in event["reason"]


def test_a_collective_that_only_one_rank_makes_is_named_by_the_rank_that_is_behind(nursery, folder):
    done, event, _ = planted(nursery, folder, "extra")
    assert done.codes == [1, 1] and event["kind"] == "behind" and event["ranks"] == [1]
    assert "rank(s) 1 are behind: step 3" in event["reason"]


def test_a_stopped_rank_is_named_by_the_other(nursery, folder):
    done, event, _ = planted(nursery, folder, "stop")
    assert done.codes == [5, -signal.SIGKILL], "the harness, like the launcher, kills what is left"
    assert "LaunchError" in event["error"] and "rank 1 (process " in event["reason"] and "is stopped" in event["reason"]


def test_a_killed_or_stopped_data_worker_is_named_with_row_and_document_and_no_process_is_left(nursery, folder):
    done, event, run = planted(nursery, folder, "worker", 3, **{"data.workers": 1, "data.prefetch_rows": 1})
    assert done.codes == [3, 3] and event["error"] == "DataError" and event["ranks"] == [1]
    assert (
        "rank 1 has waited" in event["reason"]
        and "first document: source '" in event["reason"]
        and "is stopped" in event["reason"]
    )
    beat = json.loads((run / "heartbeats" / "rank_0001.json").read_text())
    (worker,) = beat["awaited"]["workers"]
    wait_for(lambda: process_state(worker["pid"]) == "gone", timeout_s=60)
    for rank in (0, 1):
        result = done.result("kill-worker", rank)
        assert result["error"] == "DataError" and "a loader worker died while row " in result["message"], result
        assert "first document is source '" in result["message"]


def test_ranks_wait_for_rank_0_longer_than_for_any_collective_but_not_for_a_dead_one(nursery, folder):
    """However long an index takes, the run goes on; an error of rank 0 is everybody's; a rank 0 that is frozen is
    noticed."""
    done = launch(nursery, folder, [{"name": "turns", "kind": "turns"}])
    told = done.result("turns", 1)
    assert done.codes == [-signal.SIGKILL, 0], done.errors
    assert told["long"] == "found" and told["waited"] > 4.0 and told["failed"] == "shard x.tar: cannot be read"
    assert "rank 1 waited for rank 0, which is gone (timed out: no sign of life" in told["frozen"]


# -- no alarm, and signals -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calm(nursery, folder) -> Launch:
    """Runs that end well or on a signal, one after another; the last signal, during start-up, ends the ranks
    themselves."""

    def while_running(pids: list[int]) -> None:
        def at(name: str, phase: str) -> None:
            wait_for(lambda: all((folder / name / f"at-{phase}.{rank}").exists() for rank in (0, 1)), timeout_s=600)

        at("suspended", "save")
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in pids:
                os.kill(pid, number)
            time.sleep(8 if number == signal.SIGSTOP else 0)
        at("in-validation", "validation")
        os.kill(pids[1], signal.SIGTERM)  # one rank only
        at("in-save", "save")
        for pid in pids:
            os.kill(pid, signal.SIGUSR1)
        at("in-export", "export")
        for pid in pids:
            os.kill(pid, signal.SIGINT)
        # rank 1 waits for rank 0 in a collective
        wait_for(lambda: (folder / "in-indexing" / "at-indexing.0").exists(), timeout_s=600)
        for pid in pids:
            os.kill(pid, signal.SIGTERM)

    often = {"steps": 4, "checkpoint.every_steps": 2, "validation.every_steps": 2}
    lock = take(folder / "locked")  # by this very process, which lives
    done = launch(
        nursery,
        folder,
        [
            {
                "name": "slow",
                "kind": "signalled",
                "phase": "validation",
                "linger": 1.5 * STALL_S,
                "held_out": True,
                **often,
            },
            {"name": "suspended", "kind": "signalled", "phase": "save", "linger": 1.5 * STALL_S, **often, "steps": 2},
            {"name": "in-validation", "kind": "signalled", "phase": "validation", "held_out": True, **often},
            {"name": "in-save", "kind": "signalled", "phase": "save", **often},
            {"name": "in-export", "kind": "signalled", "phase": "export", **often},
            {"name": "locked", "kind": "train", "steps": 2},
            {"name": "in-indexing", "kind": "signalled", "phase": "indexing", "linger": 60.0, "steps": 2},
        ],
        while_running=while_running,
    )
    assert read_holder(folder / "locked").token == lock.holder.token
    lock.release()
    return done


def test_a_run_folder_in_which_another_job_trains_is_refused_on_every_rank_and_left_as_it_is(calm, folder):
    for rank in (0, 1):
        told = calm.result("locked", rank)
        assert told["error"] == "LaunchError" and told["exit_code"] == 5
        assert f"run_dir {folder / 'locked'} is in use: process {os.getpid()} on " in told["message"]
    assert [path.name for path in (folder / "locked").iterdir() if not path.name.startswith(".")] == []
    assert not [path for path in folder.glob("*/run.lock")], "runs that ended have given their folders back"


@pytest.mark.parametrize("name", ["slow", "suspended"])
def test_long_validations_saves_and_a_suspended_machine_raise_no_alarm(calm, folder, name):
    for rank in (0, 1):
        assert calm.result(name, rank)["code"] == 0
    assert not events(folder / name, "stalled")
    assert not list((folder / name / "stacks").iterdir())


@pytest.mark.parametrize(("name", "number"), [("in-validation", signal.SIGTERM), ("in-save", signal.SIGUSR1)])
def test_a_signal_during_a_validation_or_a_save_stops_without_another_step(calm, folder, name, number):
    for rank in (0, 1):
        result = calm.result(name, rank)
        assert result["code"] == 128 + number and list(result["hashes"]) == ["1", "2"]
    assert (folder / name / "checkpoints" / "latest").read_text() == "step_0000002\n"
    (stop,) = events(folder / name, "stop")
    assert stop["reason"] == f"signal {signal.Signals(number).name}" and len(events(folder / name, "save")) == 1


def test_a_signal_during_the_export_of_a_finished_stage_lets_it_finish(calm, folder):
    assert [calm.result("in-export", rank)["code"] for rank in (0, 1)] == [0, 0]
    assert (folder / "in-export" / "export" / "model.safetensors").is_file()


def test_a_signal_during_start_up_ends_the_ranks_at_once(calm, folder):
    assert calm.codes == [143, 143], calm.errors
    told = json.loads((folder / "in-indexing" / "status.json").read_text())
    assert told["state"] == "stopped_by_signal" and "before the first step" in told["reason"]
    assert not (folder / "in-indexing" / "checkpoints").exists()


# -- one rank, in this process ---------------------------------------------------------------------


def alone(
    run_dir: Path,
    ended: list[int],
    reports: list,
    *,
    rank: int = 0,
    world: int = 1,
    stall_s: float = 0.4,
    collective_s: float = 60.0,
) -> Watchdog:
    cfg = tiny_run(Path("unused"), run_dir)
    cfg.engine.stall_timeout_s, cfg.engine.collective_timeout_s = stall_s, collective_s
    return Watchdog(
        cfg, rank=rank, world=world, attempt="a", flag=SignalFlag(), report=lambda *told: reports.append(told),
        end=ended.append
    )  # fmt: skip


@pytest.mark.parametrize("writable", [True, False])
def test_a_rank_that_stands_still_ends_also_where_nothing_can_be_written(tmp_path, capfd, writable):
    run_dir = tmp_path / "run"
    if not writable:
        run_dir.write_text("a file where the run folder should be")
    ended, reports = [], []
    with alone(run_dir, ended, reports) as watchdog:
        watchdog.guard.begin_step(1)
        watchdog.guard.begin_step(2)
        watchdog.guard.enter("forward", 3)
        wait_for(lambda: bool(ended), timeout_s=120)
    ((error, details),) = reports
    assert ended[0] == 1 and isinstance(error, JpTrainError) and details["step"] == 2
    assert "rank 0 stands still at step 2, forward, micro-batch 3" in str(error) and "test_watchdog" not in str(error)
    output = capfd.readouterr().err
    assert "rank 0 stands still at step 2" in output
    stack = (run_dir / "stacks" / "rank_0000_step_2.txt").read_text() if writable else output
    assert "in wait_for" in stack and ("cannot use" in output) is not writable


def test_a_rank_that_cannot_read_the_others_heartbeats_waits_until_the_collectives_are_about_to_end(tmp_path, capfd):
    """A shared disk that hangs makes ranks wait, and hides which of them still work."""
    run_dir = tmp_path / "run"
    run_dir.write_text("a file where the run folder should be")
    ended, reports = [], []
    with alone(run_dir, ended, reports, world=2, collective_s=4.0) as watchdog:
        watchdog.guard.begin_step(1)
        watchdog.guard.begin_step(2)
        watchdog.guard.enter("forward", 3)
        began = time.monotonic()
        wait_for(lambda: bool(ended), timeout_s=120)
        assert time.monotonic() - began > 3.5
    ((error, _),) = reports
    assert "The heartbeats of the other ranks cannot be read" in str(error)
    assert capfd.readouterr().err.count("cannot use") == 1


def test_a_rank_that_waits_for_one_that_works_ends_nobody_until_both_stand_still(tmp_path, capfd):
    ended, reports = [], []
    options = {"world": 2, "stall_s": 1.5}
    with (
        alone(tmp_path, ended, reports, **options) as waiting,
        alone(tmp_path, ended, reports, rank=1, **options) as working,
    ):
        for watchdog in (waiting, working):
            watchdog.guard.begin_step(1)
            watchdog.guard.begin_step(2)
        waiting.guard.enter("the exchange of metrics")
        until = time.monotonic() + 4.0
        while time.monotonic() < until:
            working.guard.enter("forward", 0)
            time.sleep(0.05)
        assert not ended and not reports
        assert "rank 1 still works, at step 2, forward, micro-batch 0" in capfd.readouterr().err
        wait_for(lambda: len(ended) == 2, timeout_s=120)
    ((error, details),) = reports
    assert details["found_by"] == 0 and "step 2, forward, micro-batch 0" in str(error) and ended == [1, 1]


def test_a_slow_phase_ends_before_the_collective_in_which_the_other_ranks_wait_and_a_free_one_has_no_end(tmp_path):
    watchdog = alone(tmp_path, [], [], world=2, collective_s=100.0)
    watchdog.guard.enter("a save", pace=Pace.SLOW)
    assert watchdog.limit_s() == 90.0 and alone(tmp_path, [], []).limit_s() == 1800.0
    watchdog.guard.enter("indexing", pace=Pace.FREE)
    assert watchdog.limit_s() is None


@pytest.mark.parametrize("step", [-1, 7])
def test_a_signal_that_ends_the_process_at_once_is_told_first(tmp_path, step):
    """The first one before training begins, and a second one when the training thread is stuck and cannot answer it."""
    found, ended = [], []
    flag = SignalFlag()
    flag.must_exit = lambda *, starting: 130
    watchdog = Watchdog(
        tiny_run(Path("unused"), tmp_path),
        rank=0,
        world=1,
        attempt="a",
        flag=flag,
        report=print,
        stopped=lambda code: found.append((code, list(ended))),
        end=ended.append,
    )
    watchdog.guard.step = step
    watchdog._look(time.monotonic())
    assert ended[0] == 130 and found == [(130, [])]


def test_progress_and_free_phases_are_no_stall(tmp_path):
    ended, reports = [], []
    with alone(tmp_path, ended, reports, stall_s=1.0) as watchdog:
        watchdog.guard.begin_step(1)
        watchdog.guard.begin_step(2)
        for _ in range(20):
            watchdog.guard.enter("forward")
            time.sleep(0.1)
        watchdog.guard.enter("indexing", pace=Pace.FREE)
        time.sleep(1.5)
        watchdog.guard.enter("a checkpoint save", pace=Pace.SLOW)
        time.sleep(1.5)
    assert not ended and not reports
