"""Figures of a run that was killed and resumed, and of stages that ask differently."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jp_train.run.reading import RunData, read_run
from jp_train.run.summary import failures, settled, summarize, template_change, template_changes
from tests.run.synthetic_run import write_run

STEP_S = {1: 9.0, 2: 1.0, 3: 1.0, 4: 7.0, 5: 1.0}
"""Seconds of each step: the first of the run and the first after the resume wait for 8 and 6 of them."""


def write(folder: Path, *, template: str = "stage2", events: list[dict] | None = None) -> RunData:
    folder.mkdir(parents=True)
    lines = [
        {"step": step, "loss/total": 2.0, "time/step_s": s, "time/data_wait_s": s - 0.75, "perf/tokens_per_s": 100 / s}
        for step, s in STEP_S.items()
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(f"stage:\n  template: {template}\n")
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events or []))
    return read_run(folder)


@pytest.fixture
def killed(tmp_path: Path) -> RunData:
    """Killed after step 3 and resumed; a start with another learning rate was refused before."""
    events = [
        {"event": "start", "step": 0},
        {"event": "failed", "step": 3, "reason": "LaunchError: rank 1 is gone"},
        {"event": "failed", "step": 0, "reason": "CheckpointError: optimizer.lr differs"},
        {"event": "resume", "step": 3},
    ]
    return write(tmp_path / "run", events=events)


def test_rates_leave_out_the_first_step_after_a_start_and_after_a_resume(killed: RunData) -> None:
    series = settled(killed, "time/step_s")
    assert series is not None and series.steps.tolist() == [2, 3, 5]
    summary = summarize(killed)
    assert summary.step_s == 1.0 and summary.tokens_per_s == 100.0
    assert summary.data_wait_share == pytest.approx(0.25)
    assert summary.elapsed_s == sum(STEP_S.values())


def test_a_run_of_one_step_keeps_it(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time/step_s": 5.0}\n')
    assert summarize(read_run(tmp_path)).step_s == 5.0


def test_an_attempt_that_died_is_a_failure_and_one_that_was_refused_before_its_first_step_is_none(
    killed: RunData,
) -> None:
    summary = summarize(killed)
    assert (summary.failures, summary.resumes) == (1, 1)


def test_an_attempt_that_was_killed_without_a_word_died_where_the_next_one_resumes() -> None:
    events = [("start", 0), ("save", 50), ("resume", 50), ("stop", 76), ("resume", 76), ("stalled", 80), ("resume", 76)]
    assert failures([{"event": name, "step": step} for name, step in events]) == [50, 76]


def test_only_the_step_from_or_to_a_conversation_makes_held_out_losses_incomparable(tmp_path: Path) -> None:
    runs = [write(tmp_path / f"stage{n}", template=f"stage{n}") for n in (1, 2, 3)]
    changes = template_changes(runs)
    assert list(changes) == ["stage3"]
    assert (
        changes["stage3"].startswith("stage3: stage.template stage2 -> stage3: ") and "in stage2" in changes["stage3"]
    )
    assert template_change(None, "stage3", "x") == template_change("stage3", "stage3", "x") == ""
    assert template_change("stage3", "stage2", "x")


@pytest.mark.parametrize(("steps", "over"), [(10, 1), (400, 20), (3000, 50)])
def test_the_losses_of_the_table_are_means_over_so_many_steps_as_they_say(
    tmp_path: Path, steps: int, over: int
) -> None:
    run = read_run(write_run(tmp_path / "run", steps=steps))
    total = next(change for change in summarize(run).losses if change.name == "total")
    values = run.series["loss/total"].finite().values
    assert total.over == over and total.last == pytest.approx(values[-over:].mean())


def test_a_state_that_is_no_word_is_said_in_words(killed: RunData) -> None:
    assert summarize(killed).state_words == "unknown (no status.json)"
