"""What the end of a start means, which hosts go on, and what it cost: decided from records, answers and the run
folder alone."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest

from jp_train.cluster.outcome import Outcome, explain, judge
from jp_train.cluster.records import RankRecord, culprits
from jp_train.cluster.remote import Answer, Cause
from jp_train.cluster.restarts import Progress, largest_usable, plan_restart, standing, worth_starting
from jp_train.cluster.running import Ending
from jp_train.cluster.supervision import Verdict


def ended(rank: int, code: int | None, *, at: float = 1.0, reason: str = "", host: str = "") -> RankRecord:
    tail = ["what all say", f"last words of {rank}"]
    return RankRecord(rank, host or f"node{rank}", 0, 100 + rank, 0.0, code, None if code is None else at, reason, tail)


def test_the_hosts_that_go_on_are_the_most_slots_that_fit_and_their_order_is_kept() -> None:
    generator = random.Random(5)
    for _ in range(200):
        everything = {f"h{i}": tuple(range(generator.randint(1, 5))) for i in range(generator.randint(1, 7))}
        rows = generator.choice([12, 16, 30])
        chosen = largest_usable(everything, lambda world, rows=rows: rows % world == 0)
        every = [names for n in range(1, len(everything) + 1) for names in itertools.combinations(everything, n)]
        totals = [sum(len(everything[name]) for name in names) for names in every]
        assert sum(map(len, chosen.values())) == max((total for total in totals if rows % total == 0), default=0)
        assert list(chosen) == [name for name in everything if name in chosen] and all(
            chosen[name] == everything[name] for name in chosen
        )


def test_of_32_hosts_without_one_the_largest_power_of_two_goes_on() -> None:
    left = {f"node{i:02d}": tuple(range(8)) for i in range(1, 33) if i != 1}
    assert list(largest_usable(left, lambda world: 512 % world == 0)) == [f"node{i:02d}" for i in range(2, 18)]


def test_a_killed_rank_is_the_cause_although_others_ended_before_it_was_written_down() -> None:
    records = [ended(0, 1, at=1.0), ended(1, 1, at=2.0), ended(2, -9, at=9.0), ended(3, 0)]
    assert [record.rank for record in culprits(records)] == [2, 0, 1]
    outcome = judge(Ending(1), records, None, "JpTrainError: connection closed by peer")
    assert (
        (outcome.code, outcome.again, outcome.killed_on) == (5, "yes", ("node2",))
        and "rank 2 on node2" in outcome.cause
        and "SIGKILL" in outcome.cause
    )
    lines = explain(records, 4)
    assert lines[0].startswith("rank 2 on node2")
    assert [line for line in lines if line.startswith("[")] == ["[node2 rank 2] last words of 2"], (
        "what rank 0 said, too, is on the terminal already"
    )


STUCK = Ending(-9, Verdict("rank 1 did not end"))


@pytest.mark.parametrize(
    ("ending", "records", "stopped_by", "failure", "expected"),
    [
        (Ending(0), [ended(0, 0)], None, "", (0, "no")),
        (Ending(3), [ended(0, 3)], None, "", (3, "no")),
        (Ending(1), [ended(0, 1)], None, "DataError: shard", (3, "no")),
        (Ending(1), [ended(0, 1), ended(1, 4)], None, "", (4, "no")),
        (Ending(1), [ended(0, 1)], None, "ValueError: x", (1, "if_advanced")),
        (Ending(5), [ended(0, 5)], None, "LaunchError: rank 1 is gone", (5, "if_advanced")),
        (Ending(247), [], None, "", (5, "yes")),
        (Ending(137), [], None, "", (5, "yes")),
        (Ending(139), [ended(0, None)], None, "", (5, "yes")),
        (Ending(255), [], None, "", (5, "if_advanced")),
        (Ending(-9), [], None, "", (5, "yes")),
        (Ending(143), [ended(0, 143)], None, "", (143, "no")),
        (Ending(143), [ended(0, 143), ended(1, 143, reason="the launcher of its host died")], None, "", (5, "yes")),
        (Ending(1), [ended(0, -9)], 15, "", (143, "no")),
        (Ending(0), [ended(0, 0)], 15, "", (0, "no")),
        (
            Ending(-9, Verdict("all ranks have ended, but not their launcher")), [ended(0, 0), ended(1, 0)], None, "",
            (0, "no"),
        ),
        (STUCK, [ended(0, 5), ended(1, None)], None, "LaunchError: stalled", (5, "yes")),
        (STUCK, [ended(0, 3), ended(1, None)], None, "DataError: worker", (3, "no")),
        (Ending(-9, Verdict("cannot be reached", ("node2",))), [], None, "", (5, "yes")),
    ],
)  # fmt: skip
def test_the_code_tells_configuration_data_checkpoint_host_and_code_faults_apart(
    ending: Ending, records: list[RankRecord], stopped_by: int | None, failure: str, expected: tuple[int, str]
) -> None:
    outcome = judge(ending, records, stopped_by, failure)
    assert (outcome.code, outcome.again) == expected


def test_an_exception_is_repeated_where_the_run_got_further_and_once_where_a_restart_fell_short() -> None:
    def again(
        what: str = "if_advanced",
        *,
        first: bool = False,
        advanced: bool = False,
        fell_short: bool = False,
        before: bool = False,
    ) -> bool:
        return worth_starting(what, first=first, advanced=advanced, fell_short=fell_short, before=before)

    assert again(advanced=True, first=True) and again(advanced=True, before=True)
    assert not again(first=True, fell_short=True), "at the very first start it is the code or the cluster"
    assert not again(), "the same step again"
    assert again(fell_short=True) and not again(fell_short=True, before=True)
    assert again("yes", first=True) and not again("no", advanced=True)


def test_what_the_ranks_diagnosed_themselves_is_the_cause_that_is_reported() -> None:
    outcome = judge(
        Ending(-9, Verdict("rank 1 did not end")),
        [ended(0, 5), ended(1, None)],
        None,
        "LaunchError: rank 1 does not answer",
    )
    assert outcome.cause == "LaunchError: rank 1 does not answer"


def test_a_host_that_does_not_answer_is_named_with_what_ssh_said() -> None:
    answer = Answer("node7", 255, "", "ssh: connect to host node7 port 22: Connection timed out", 5.0, Cause.NO_ANSWER)
    outcome = judge(Ending(-9, Verdict("x"), {"node7": answer}), [ended(0, 1)], None, "")
    assert outcome == Outcome(5, f"host node7 does not answer: {answer.summary}", "yes", (), {"node7": answer.summary})


def test_the_time_lost_is_work_since_the_checkpoint_and_the_time_without_progress(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_0000040").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".saving_step_0000045").mkdir()
    (tmp_path / "status.json").write_text(
        json.dumps({"state": "failed", "reason": "E: x", "step": 47, "step_s": 3.0, "updated": 1000.0})
    )
    last = standing(tmp_path)
    assert (last.step, last.checkpoint_step, last.state) == (47, 40, "failed")
    hosts = {"a": (0, 1), "b": (0, 1), "c": (0, 1)}
    restart = plan_restart(1, 3, "why", hosts, {"a": (0, 1), "b": (0, 1)}, {"b": (0, 1)}, last, down_s=90.0)
    assert (restart.lost_steps, restart.lost_steps_s, restart.down_s) == (7, 21.0, 90.0)
    assert (restart.left_out, restart.ranks_before, restart.ranks, restart.resumes_at_step) == (["a", "c"], 4, 2, 40)

    now = [5.0]
    progress = Progress(tmp_path, restart, clock=lambda: now[0])
    (tmp_path / "status.json").write_text(json.dumps({"state": "starting", "updated": 3.0}))
    now[0] = 20.0
    assert progress.look() is None and progress.moved
    now[0] = 30.0
    write_status(tmp_path, 41, updated=-86400.0)
    assert progress.look() == {"step": 41, "start_s": 25.0, "lost_s": 136.0}
    assert progress.look() is None, "told once"


def write_status(run_dir: Path, step: int, *, updated: float, state: str = "running") -> None:
    """`updated`: by the clock of another host, whatever that says."""
    (run_dir / "status.json").write_text(
        json.dumps({"state": state, "step": step, "step_s": 3.0, "updated": updated, "reason": "E: x"})
    )


@pytest.mark.parametrize("wrong_by_s", [-86400.0, 0.0, 86400.0])
def test_what_a_start_made_of_the_run_is_known_whatever_the_clock_of_rank_0_says(tmp_path, wrong_by_s) -> None:
    write_status(tmp_path, 40, updated=1000.0, state="failed")
    now = [500.0]
    progress = Progress(tmp_path, clock=lambda: now[0])
    now[0] = 560.0
    assert progress.look() is None and not progress.moved, "what stands there is the start's before"
    assert progress.quiet_s == 60.0
    write_status(tmp_path, 43, updated=1060.0 + wrong_by_s)
    now[0] = 570.0
    assert (progress.now().step, progress.moved) == (43, True)
    now[0] = 600.0
    assert progress.look() is None and progress.quiet_s == 30.0
    (tmp_path / "status.json").unlink()
    assert progress.now().step == 0 and not progress.moved and progress.quiet_s == 30.0, "unreadable is no progress"


def test_a_run_folder_without_anything_stands_at_the_beginning(tmp_path: Path) -> None:
    assert (standing(tmp_path).step, standing(tmp_path).checkpoint_step) == (0, None)
    (tmp_path / "status.json").write_text("[1")
    assert standing(tmp_path).state == ""
