"""One sentence from the heartbeats of a run that stands still."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from jp_train.engine.watch.diagnosis import diagnose, moving
from jp_train.engine.watch.guard import WAITING_FOR_DATA
from jp_train.engine.watch.heartbeat import Beat, HeartbeatFolder
from jp_train.errors import DataError, JpTrainError, LaunchError

NAMES = ("embed", "vision", "layers.0", "layers.1", "norm", "head")


def beat(rank: int, **values) -> Beat:
    """A rank in the forward pass of step 7 that has entered all of NAMES, idle for as long as it may be."""
    known = {
        "attempt": "a", "rank": rank, "pid": 100 + rank, "host": f"host{rank // 8}", "beat": 5, "time": 0.0,
        "monotonic": 0.0, "step": 7,
        "phase": "forward", "micro_batch": 0, "trail": NAMES, "progress": 90, "idle_s": 300.0, "limit_s": 300.0,
    }  # fmt: skip
    values = {**known, **values}
    values.setdefault("entered", len(values["trail"]))
    values.setdefault("module", values["trail"][-1] if values["trail"] else "")
    return Beat(**values)


def ask(beats: list[Beat], world: int, *, silent: tuple[int, ...] = (), state: str = "running"):
    before = {item.rank: item for item in beats}
    after = {item.rank: item if item.rank in silent else replace(item, beat=item.beat + 1) for item in beats}
    return diagnose(before, after, world, "host0", state=lambda pid: state)


def test_the_first_unequal_module_is_named_with_both_ranks_and_the_micro_batch():
    result = ask([beat(0), beat(1, trail=("embed", "layers.0", "layers.1", "norm"))], 2)
    assert result.kind == "sequence" and result.ranks == (1,) and result.error is JpTrainError
    assert (
        "rank 1 at step 7 micro-batch 0 entered layers.0 where rank 0 entered vision (module call 2 of the step)"
        in result.text
    )


def test_trails_that_begin_at_different_calls_are_compared_by_their_place_in_the_step():
    """Only the last modules are kept: rank 0 has entered 1003, rank 1 1001."""
    shared = tuple(f"m{n}" for n in range(990, 1001))
    result = ask(
        [beat(0, trail=(*shared, "a", "b", "c"), entered=1003), beat(1, trail=("x", *shared, "z"), entered=1001)], 2
    )
    assert "entered z where rank 0 entered a (module call 1001 of the step)" in result.text


def test_among_256_ranks_the_odd_one_is_named_even_when_it_is_rank_0():
    odd = ("embed", "layers.0")
    result = ask([beat(rank, trail=odd if rank == 0 else NAMES) for rank in range(256)], 256)
    assert (
        result.ranks == (0,)
        and "rank 0 at step 7 micro-batch 0 entered layers.0 where rank 1 entered vision" in result.text
    )
    assert len(result.text) < 600


def test_a_rank_whose_trail_only_ends_earlier_is_behind():
    result = ask([beat(0), beat(1, trail=NAMES[:3], frame="model/janus_pro.py:80 in forward"), beat(2)], 3)
    assert result.kind == "behind" and result.ranks == (1,)
    assert (
        "rank(s) 1 are behind: step 7, forward, micro-batch 0, last module layers.0 (3 entered) [model/janus_pro.py:80 "
        "in forward]" in result.text
    )
    assert "rank(s) 0, 2 are at step 7" in result.text


def test_a_rank_in_an_earlier_step_is_behind():
    result = ask(
        [beat(0, step=8, trail=(), phase="the count of supervised tokens"), beat(1, phase="the exchange of metrics")], 2
    )
    assert result.ranks == (1,) and "behind: step 7, the exchange of metrics" in result.text


@pytest.mark.parametrize(
    ("state", "told"), [("gone", "is gone"), ("stopped", "is stopped"), ("running", "its watchdog does not")]
)
def test_a_silent_rank_of_this_host_is_named_with_what_the_kernel_says(state, told):
    result = ask([beat(0), beat(1)], 2, silent=(1,), state=state)
    assert (
        result.kind == "missing"
        and result.error is LaunchError
        and "rank 1 (process 101 on host0)" in result.text
        and told in result.text
    )
    assert "last seen at step 7, forward, micro-batch 0" in result.text


def test_silent_ranks_of_another_host_are_counted():
    result = ask([beat(rank) for rank in range(16)], 16, silent=tuple(range(8, 16)))
    assert (
        result.ranks == tuple(range(8, 16))
        and "rank 8 (process 108 on host1) does not answer" in result.text
        and "and 4 more" in result.text
    )


def test_a_rank_without_any_heartbeat_is_missing():
    assert "rank 1 has left no heartbeat" in ask([beat(0)], 2).text


def test_an_error_with_which_a_rank_ended_explains_the_rest():
    result = ask([beat(0), beat(1, ended="DataError: shard x.tar is broken")], 2, silent=(1,))
    assert result.text == "rank 1 ended with DataError: shard x.tar is broken"


def test_a_rank_without_data_is_named_with_row_document_and_worker():
    awaited = {
        "row": 5,
        "step": 7,
        "document": "source 'text', shard t.tar, key 'k'",
        "workers": [{"pid": 9, "state": "stopped"}],
    }
    result = ask([beat(0, phase="the count of supervised tokens"), beat(1, phase=WAITING_FOR_DATA, awaited=awaited)], 2)
    assert result.error is DataError and result.ranks == (1,)
    assert (
        "rank 1 has waited 300 s for row 5 of step 7 (first document: source 'text', shard t.tar, key 'k'): "
        "loader worker 9 is stopped" in result.text
    )


def test_when_all_stand_at_the_same_place_it_is_the_collective():
    result = ask([beat(rank) for rank in range(3)], 3)
    assert (
        result.kind == "collective"
        and result.ranks == ()
        and "all 3 ranks stand still at step 7, forward" in result.text
    )
    assert "rank 0 stands still" in ask([beat(0)], 1).text


def test_a_rank_that_works_or_has_time_left_counts_as_moving():
    before = {rank: beat(rank) for rank in range(5)}
    after = {
        0: beat(0, beat=6),  # idle
        1: beat(1, beat=6, progress=91),
        2: beat(2, beat=6, idle_s=100.0),
        3: beat(3, beat=6, phase="a checkpoint save", limit_s=1620.0),
        4: beat(4, progress=95),  # its watchdog does not write: whatever the file says
    }
    assert moving(before, after) == [1, 2, 3]


def test_files_of_another_attempt_and_foreign_content_are_not_read(tmp_path):
    files = HeartbeatFolder(tmp_path, "a")
    files.create(2, clear=True)
    files.write_beat(beat(1))
    assert files.read_beat(1) == beat(1) and files.read_beat(0) is None
    assert HeartbeatFolder(tmp_path, "b").read_beat(1) is None
    for text in ("", "{", "[]", '{"attempt": "a"}', json.dumps({**asdict(beat(0)), "unknown": 1})):
        (files.folder / "rank_0000.json").write_text(text)
        assert files.read_beat(0) == (beat(0) if "unknown" in text else None)
    files.ask("q", 1, "why")
    files.announce_end({"text": "x", "exit_code": 1, "rank": 0})
    (files.folder / "rank_0007.json").write_text("{}")
    assert files.requested() == "q" and files.announced_end()["exit_code"] == 1
    half_written = files.folder / ".rank_0001.json.1.tmp"
    half_written.touch()
    files.create(2, clear=True)
    assert half_written.exists(), "rank 1 may be about to rename it"
    assert files.requested() == "" and files.announced_end() is None and not (files.folder / "rank_0007.json").exists()
