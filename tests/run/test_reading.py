"""Reading run folders: whole, running, killed, damaged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jp_train.errors import DataError
from jp_train.run.reading import read_run
from jp_train.run.summary import smooth, summarize
from tests.run.synthetic_run import write_run


def write_lines(folder: Path, records: list[object], name: str = "metrics.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return folder


def test_a_torn_last_line_is_counted_and_the_rest_is_read(tmp_path: Path) -> None:
    run = read_run(
        write_lines(
            tmp_path / "r", [{"step": 1, "loss/total": 3.0}, {"step": 2, "loss/total": 2.5}, '{"step": 3, "loss/to']
        )
    )
    assert run.series["loss/total"].values.tolist() == [3.0, 2.5]
    assert run.unreadable_lines == {"metrics.jsonl": 1}


def test_a_line_appended_to_a_torn_line_is_recovered(tmp_path: Path) -> None:
    run = read_run(
        write_lines(tmp_path / "r", [{"step": 1, "loss/total": 3.0}, '{"step": 2, "lo{"step": 2, "loss/total": 2.0}'])
    )
    assert run.series["loss/total"].steps.tolist() == [1, 2] and run.unreadable_lines == {"metrics.jsonl": 1}


def test_an_object_inside_a_torn_ledger_line_is_no_bad_sample(tmp_path: Path) -> None:
    write_lines(tmp_path / "r", [{"step": 1, "loss/total": 3.0}])
    run = read_run(
        write_lines(
            tmp_path / "r",
            ['{"step": 4, "source": "a", "reason": "x", "document": {"source": 0, "epoch": 1}'],
            "ledger.jsonl",
        )
    )
    assert run.ledger.total == 0 and run.unreadable_lines == {"ledger.jsonl": 1}


def test_steps_trained_again_after_a_resume_count_once_and_nothing_of_the_lost_attempt_stays(tmp_path: Path) -> None:
    first = [{"step": s, "loss/total": 10.0 + s, "loss/text": 1.0} for s in range(1, 9)]
    again = [{"step": s, "loss/total": 20.0 + s} for s in range(5, 7)]
    run = read_run(write_lines(tmp_path / "r", first + again))
    assert run.series["loss/total"].steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert run.series["loss/total"].values.tolist() == [11.0, 12.0, 13.0, 14.0, 25.0, 26.0]
    assert run.series["loss/text"].steps.tolist() == [1, 2, 3, 4] and run.repeated_steps == 4


def test_a_validation_line_of_the_same_step_takes_nothing_away(tmp_path: Path) -> None:
    run = read_run(
        write_lines(
            tmp_path / "r", [{"step": 0, "val/text": 5.0}, {"step": 1, "loss/total": 3.0}, {"step": 1, "val/text": 4.0}]
        )
    )
    assert run.series["val/text"].values.tolist() == [5.0, 4.0] and run.series["loss/total"].values.tolist() == [3.0]
    assert run.repeated_steps == 0


def test_numbers_that_are_not_finite_are_counted_and_not_drawn(tmp_path: Path) -> None:
    records = [
        {"step": 1, "loss/total": 3.0},
        {"step": 2, "loss/total": None},
        '{"step": 3, "loss/total": NaN}',
        {"step": 4, "loss/total": 2.0},
    ]
    run = read_run(write_lines(tmp_path / "r", records))
    assert summarize(run).non_finite_steps == 2
    assert run.series["loss/total"].finite().steps.tolist() == [1, 4]


@pytest.mark.parametrize("lines", [None, [], ["", "not json"], [{"no_step": 1}]])
def test_a_folder_without_metrics_is_a_data_error_that_names_it(tmp_path: Path, lines: list[object] | None) -> None:
    folder = tmp_path / "empty_run"
    folder.mkdir()
    if lines is not None:
        write_lines(folder, lines)
    with pytest.raises(DataError, match="empty_run"):
        read_run(folder)


def test_every_missing_file_of_a_run_is_said_and_none_is_fatal(tmp_path: Path) -> None:
    run = read_run(write_lines(tmp_path / "r", [{"step": 1, "loss/total": 3.0}]))
    assert set(run.missing) == {"config", "status", "events"}
    summary = summarize(run)
    assert (
        summary.state == "unknown"
        and summary.steps_done == 1
        and summary.steps_planned is None
        and summary.fill is None
    )


def test_damaged_side_files_are_said_and_not_fatal(tmp_path: Path) -> None:
    folder = write_lines(tmp_path / "r", [{"step": 1, "loss/total": 3.0}])
    (folder / "config.yaml").write_text("stage: [unclosed")
    (folder / "status.json").write_text("[1, 2]")
    (folder / "evaluation.json").write_text('[{"name": "x", "value": "high"}, {"name": "y", "value": 0.5}]')
    (folder / "samples").mkdir()
    (folder / "samples" / "fake.png").write_bytes(b"<script>not a picture</script>")
    (folder / "metrics.jsonl").open("ab").write(b"\xff\xfe\n")
    run = read_run(folder)
    assert "YAML" in run.missing["config"] and "status" in run.missing and "1 of 2" in run.missing["evaluation"]
    assert [row.name for row in run.evaluation] == ["y"] and run.samples == () and "fake.png" in run.samples_left_out[0]


def test_the_summary_says_what_the_files_say(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "stage2", steps=200, schedule=300, state="stopped_early", killed_at=120)
    summary = summarize(read_run(folder))
    lines = [
        json.loads('{"step"' + line.rpartition('{"step"')[2])
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    by_step = {r["step"]: r for r in lines if "loss/text" in r}  # the last attempt wins
    texts = [by_step[s]["loss/text"] for s in sorted(by_step)]
    change = next(c for c in summary.losses if c.name == "text")
    assert change.first == pytest.approx(np.mean(texts[:10])) and change.last == pytest.approx(np.mean(texts[-10:]))
    assert change.held_out_first == pytest.approx(lines[0]["val/text"]) and change.held_out_last == pytest.approx(
        by_step[200]["val/text"]
    )
    assert [share.configured for share in summary.shares] == pytest.approx([0.2, 0.3, 0.5])
    realised = [
        np.mean([by_step[s][f"mixture/{kind}"] for s in by_step]) for kind in ("understanding", "text", "generation")
    ]
    assert [share.realised for share in summary.shares] == pytest.approx(realised)
    assert (summary.steps_done, summary.steps_planned, summary.schedule_steps) == (200, 200, 300)
    assert summary.state == "stopped_early" and "at_step 200" in summary.reason
    assert summary.resumes == 1 and summary.spikes == 1 and summary.skipped == 62 and summary.world_size == 2
    assert summary.checkpoints[-1] == "step_0000200"


def test_smoothing_keeps_a_constant_and_follows_a_step(tmp_path: Path) -> None:
    run = read_run(write_lines(tmp_path / "r", [{"step": s, "a": 2.0, "b": float(s > 100)} for s in range(1, 201)]))
    assert np.allclose(smooth(run.series["a"], 20).values, 2.0)
    followed = smooth(run.series["b"], 20).values
    assert followed[99] == 0.0 and 0.99 < followed[-1] <= 1.0
