"""What a launch notices by itself: driven by a clock and answers of the test's own, over the real files of a run
folder."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from jp_train.cluster.records import RankRecord
from jp_train.cluster.remote import Answer, Cause
from jp_train.cluster.supervision import Supervision, Verdict

GONE = Answer("node2", 255, "", "ssh: connect to host node2 port 22: No route to host", 3.0, Cause.NO_ROUTE)
BUSY = Answer("node2", 0, "welcome to node2\njp_train: reached 3 processes\n", "", 0.1)
EMPTY = Answer("node2", 0, "jp_train: reached 0 processes\n", "", 0.1)


class Scene:
    """Three hosts with a rank each; `pass_time` lets the seconds go by while the ranks in `beating` write
    heartbeats."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.now = folder, 100.0
        self.asked: list[tuple[tuple[str, ...], int]] = []
        self.answer = BUSY
        self.logs = folder / "logs"
        (folder / "heartbeats").mkdir()
        self.watch = Supervision(
            self.logs,
            folder,
            "id",
            ["node1", "node2", "node3"],
            patience_s=60.0,
            grace_s=600.0,
            ask=self.ask,
            clock=lambda: self.now,
        )

    def ask(self, hosts: Sequence[str], launch_id: str, number: int) -> dict[str, Answer]:
        assert launch_id == "id"
        self.asked.append((tuple(hosts), number))
        return {
            host: Answer(host, self.answer.returncode, self.answer.stdout, self.answer.stderr, 1.0, self.answer.cause)
            for host in hosts
        }

    def record(self, rank: int, code: int | None = None) -> None:
        RankRecord(rank, f"node{rank + 1}", 0, 10 + rank, 0.0, code, None if code is None else self.now).write(
            self.logs
        )

    def pass_time(self, seconds: float, beating: Sequence[int] = ()) -> Verdict | None:
        until = self.now + seconds
        while self.now < until:
            self.now += 2.0
            for rank in beating:
                path = self.folder / "heartbeats" / f"rank_{rank:04d}.json"
                path.write_text("{}")
                os.utime(path, (self.now, self.now))
            before = len(self.asked)
            verdict = self.watch.look()
            deadline = time.monotonic() + 10
            while self.watch._pending is not None and not self.watch._pending.done():
                assert time.monotonic() < deadline
                time.sleep(0.001)
            if verdict is not None:
                return verdict
            assert len(self.asked) <= before + 1
        return None


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    made = Scene(tmp_path)
    yield made
    made.watch.close()


def test_a_run_whose_ranks_all_give_signs_of_life_is_asked_nothing(scene: Scene) -> None:
    for rank in (0, 1, 2):
        scene.record(rank)
    assert scene.pass_time(1000, beating=(0, 1, 2)) is None and scene.asked == []


def test_a_silent_host_is_asked_and_lost_only_when_it_does_not_answer_twice(scene: Scene) -> None:
    for rank in (0, 1, 2):
        scene.record(rank)
    scene.pass_time(10, beating=(0, 1, 2))
    scene.answer = BUSY
    assert scene.pass_time(300, beating=(0, 2)) is None, (
        "it answers: what stands still there is the ranks' own watchdog's business"
    )
    assert scene.asked and set(scene.asked) == {(("node2",), 0)}
    scene.answer = GONE
    verdict = scene.pass_time(130, beating=(0, 2))
    assert verdict is not None and verdict.lost == ("node2",) and "No route to host" in verdict.cause


def test_two_questions_without_an_answer_count_only_when_no_sign_of_life_came_between(scene: Scene) -> None:
    for rank in (0, 1, 2):
        scene.record(rank)
    scene.pass_time(10, beating=(0, 1, 2))
    scene.answer = GONE
    for _ in range(3):
        queries = len(scene.asked)
        while len(scene.asked) == queries:
            assert scene.pass_time(2, beating=(0, 2)) is None
        assert scene.pass_time(1000, beating=(0, 1, 2)) is None, "it was slow, and is back"
        assert len(scene.asked) == queries + 1


def test_records_are_read_when_their_folder_changes_and_after_a_while_in_any_case(scene: Scene) -> None:
    for rank in (0, 1, 2):
        scene.record(rank)
    scene.pass_time(20, beating=(0, 1, 2))
    folder = scene.logs.stat()
    for rank in (0, 1, 2):
        scene.record(rank, 0)
    os.utime(scene.logs, ns=(folder.st_atime_ns, folder.st_mtime_ns))  # as on a file system with coarse times
    assert scene.pass_time(100) is None
    verdict = scene.pass_time(30)
    assert verdict is not None and "their launcher" in verdict.cause, "60 s until they are read, and 60 s of patience"


def test_a_question_that_could_not_be_asked_here_is_an_error_once_and_is_asked_again(scene: Scene) -> None:
    scene.record(0)
    scene.record(2)
    scene.pass_time(118)
    ask, scene.watch._ask = scene.watch._ask, lambda *_: os.listdir("/nowhere")  # type: ignore[assignment,return-value]
    with pytest.raises(FileNotFoundError):
        scene.pass_time(10)
    scene.watch._ask, scene.answer = ask, BUSY
    assert scene.pass_time(100) is None and scene.asked


def test_a_host_on_which_nothing_of_the_run_is_left_ends_it_but_is_not_lost(scene: Scene) -> None:
    for rank in (0, 1, 2):
        scene.record(rank)
    scene.pass_time(10, beating=(0, 1, 2))
    scene.answer = EMPTY
    verdict = scene.pass_time(130, beating=(0, 2))
    assert verdict is not None and verdict.lost == () and "node2" in verdict.cause


def test_a_file_system_that_stands_still_for_all_accuses_nobody(scene: Scene) -> None:
    for rank in (0, 1, 2):
        scene.record(rank)
    scene.pass_time(10, beating=(0, 1, 2))
    scene.answer = GONE
    assert scene.pass_time(2000) is None and scene.asked == []


def test_a_host_that_never_started_its_rank_is_asked(scene: Scene) -> None:
    scene.answer = GONE
    assert scene.pass_time(1000) is None and scene.asked == [], (
        "nothing at all is known yet: the launcher itself is still at work"
    )
    scene.record(0)
    scene.record(2)
    assert scene.pass_time(110) is None and scene.asked == []
    verdict = scene.pass_time(100)
    assert verdict is not None and verdict.lost == ("node2",)


def test_ranks_that_outlive_a_failed_one_end_the_run_in_bounded_time(scene: Scene) -> None:
    for rank in (0, 1, 2):
        scene.record(rank)
    scene.record(0, 5)
    assert scene.pass_time(58, beating=(1, 2)) is None
    verdict = scene.pass_time(10, beating=(1, 2))
    assert (
        verdict is not None
        and "rank 0 on node1" in verdict.cause
        and "rank 1 on node2, rank 2 on node3 did not end" in verdict.cause
    )


def test_ranks_that_finish_after_each_other_are_given_the_grace_time(scene: Scene) -> None:
    for rank, code in ((0, None), (1, 0), (2, 143)):
        scene.record(rank, code)
    assert scene.pass_time(590, beating=(0,)) is None
    assert scene.pass_time(20, beating=(0,)) is not None


def test_a_launcher_that_outlives_all_ranks_is_noticed(scene: Scene) -> None:
    for rank in (0, 1, 2):
        scene.record(rank, 0)
    assert scene.pass_time(58) is None
    assert scene.pass_time(10) == Verdict("all ranks have ended, but not their launcher")
