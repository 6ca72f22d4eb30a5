"""Run-folder files that survive kills, and one console line a step."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path

import pytest

from jp_train.errors import ConfigError
from jp_train.files import drop_later_lines
from jp_train.run.sinks import Console, Events, MetricsFile, Progress, StatusFile, TensorBoard
from jp_train.types import KINDS, Kind

VALUES = {
    "loss/total": 2.5,
    "loss/text": 3.0,
    "loss/generation": 2.0,
    "optim/lr": 1e-4,
    "optim/grad_norm": 0.5,
    "packing/fill": 0.998,
    "perf/tokens_per_s": 12345.0,
    "time/step_s": 2.0,
    "time/data_wait_s": 0.01,
    "data/skipped": 0.0,
}


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_resumed_metrics_file_has_every_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, None)
    for step in range(7):
        first.log(step, {"loss/total": float(step)})
    first.close()
    path.write_text(path.read_text() + '{"step": 7, "loss/to')  # killed in the middle of a line
    resumed = MetricsFile(path, 4)
    assert steps(path) == [0, 1, 2, 3, 4]
    for step in (5, 6, 7):
        resumed.log(step, {"loss/total": -1.0})
    assert steps(path) == list(range(8)) and json.loads(path.read_text().splitlines()[5])["loss/total"] == -1.0


def test_a_run_that_starts_anew_starts_an_empty_metrics_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "val/total": 1}\n{"step": 1, "loss/total": 1}\n')
    MetricsFile(path, None).log(1, {"loss/total": float("nan")})
    assert path.read_text() == '{"step": 1, "loss/total": null}\n'


def test_later_ledger_lines_are_dropped_and_lines_without_a_step_stay(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"step": null, "key": "a"}\n{"step": 3, "key": "b"}\n{"step": 5, "key": "c"}\n{"st')
    drop_later_lines(path, 3)
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "b"]
    drop_later_lines(tmp_path / "absent.jsonl", 3)
    assert not (tmp_path / "absent.jsonl").exists()


def test_events_follow_a_torn_line_on_a_line_of_their_own(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "sta')
    Events(path).write("resume", 4, loss=float("inf"))
    event = json.loads(path.read_text().splitlines()[1])
    assert (event["event"], event["step"], event["loss"]) == ("resume", 4, None) and event["time"] > 1.7e9


def test_status_keeps_earlier_values_and_is_never_half_written(tmp_path):
    status = StatusFile(tmp_path / "status.json", stage="stage2")
    status.update(state="running", step=3)
    status.update(step=4)
    values = json.loads((tmp_path / "status.json").read_text())
    assert (values["stage"], values["state"], values["step"]) == ("stage2", "running", 4)
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_eta_is_the_smoothed_step_time_times_the_steps_left():
    times = iter([100.0, 102.0, 104.0, 116.0])
    progress = Progress(10, clock=lambda: next(times))
    assert progress.eta_s(0) is None
    progress.tick()
    assert progress.eta_s(1) is None, "one step has no length yet"
    progress.tick(), progress.tick()
    assert progress.eta_s(3) == pytest.approx(7 * 2.0)
    progress.tick()
    assert progress.eta_s(4) == pytest.approx(6 * 3.0)


def test_the_console_prints_one_line_every_n_steps_and_every_validation():
    stream = io.StringIO()
    console = Console(10, Progress(25), stream)
    console.log(0, {"val/text-source": 4.5, "val/text": 4.0, "val/generation": 5.0, "val/total": 4.5})
    for step in range(1, 26):
        console.log(step, VALUES)
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["0/25", "1/25", "10/25", "20/25", "25/25"]
    assert lines[0] == "step  0/25  held out  total 4.5000 text 4.0000 gen 5.0000"
    losses = "loss 2.500 (text 3.000 gen 2.000)"
    assert lines[1] == f"step  1/25  {losses}  lr 1e-4  norm 0.50  12.3k tok/s  ETA --"
    assert "ETA" in lines[3] and lines[4].endswith(" tok/s"), "nothing is left after the last step"


def test_a_console_line_has_means_since_the_line_before_and_losses_weighted_by_their_tokens():
    stream = io.StringIO()
    console = Console(3, Progress(100), stream)
    console.log(1, VALUES)
    text_steps = ((10, 1.0), (30, 3.0), (0, None))
    for step, (tokens, loss) in enumerate(text_steps, start=2):
        console.loss_tokens = {Kind.TEXT: tokens, Kind.GENERATION: 5}
        values = {**VALUES, "loss/total": float(step), "time/step_s": float(step), "perf/tokens_per_s": 600.0 / step}
        values |= {"time/data_wait_s": 0.5 * step, "optim/grad_norm": float(step), "data/skipped": 1.0}
        if loss is None:
            del values["loss/text"]
        else:
            values["loss/text"] = loss
        console.log(step, values)
    second = stream.getvalue().splitlines()[1]
    # steps 2 and 3: the third line of the loop belongs to the next print
    assert "loss 2.500 (text 2.500 gen 2.000)" in second, "text: (10 x 1 + 30 x 3) / 40"
    assert f"{2 * 600 / 5:.0f} tok/s" in second and "wait 50%" in second and "skipped 2" in second
    console.loss_tokens = {Kind.TEXT: 7, Kind.GENERATION: 5}
    console.log(5, {**VALUES, "loss/total": 6.0, "optim/grad_norm": 1.0})
    console.log(6, {**VALUES, "loss/total": 8.0, "optim/grad_norm": 1.0})
    third = stream.getvalue().splitlines()[2]
    assert "loss 6.000 (text 3.000 " in third, "steps 4 to 6, of which step 4 had no text"


@pytest.mark.parametrize("planned", [9, 420, 500_000])
@pytest.mark.parametrize("loss", [0.05, 11.5])
def test_no_console_line_is_longer_than_100_columns(planned, loss):
    now = [0.0]
    progress = Progress(planned, clock=lambda: now[0])
    for _ in range(2):
        progress.tick()
        now[0] += 45_000 / planned
    stream = io.StringIO()
    values = {**VALUES, "perf/tokens_per_s": 1_234_567.0, "optim/grad_norm": 123.4, "data/skipped": 12.0}
    values |= {f"loss/{kind}": loss for kind in ("total", *KINDS)} | {f"val/{kind}": loss for kind in ("total", *KINDS)}
    values["time/data_wait_s"] = 1.0
    Console(1, progress, stream).log(1, values)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2 and max(map(len, lines)) <= 100
    for text in ("(und ", " text ", " gen ", "wait 50%", "ETA "):
        assert text in lines[0]


def test_a_step_that_is_not_finite_is_not_in_the_means_and_ends_no_run():
    stream = io.StringIO()
    console = Console(2, Progress(100), stream)
    nowhere_finite = dict.fromkeys(("loss/total", "loss/text", "loss/generation", "optim/grad_norm"), math.nan)
    console.log(1, {**VALUES, **nowhere_finite})
    for step, loss in ((2, 4.0), (3, math.inf), (4, 2.0)):
        console.log(step, {**VALUES, "loss/total": loss})
    first, second, third = stream.getvalue().splitlines()
    assert "loss nan" in first and "norm nan" in first
    assert "loss 4.000" in second and "loss 2.000" in third


def test_a_missing_tensorboard_is_a_clear_error(tmp_path, monkeypatch):
    for module in ("tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        TensorBoard(tmp_path, None)
