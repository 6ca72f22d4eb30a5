"""What a run of five steps writes at which step, and what its resumption adds: `jp-train train` on one rank."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jp_train.config import load_config, save_config
from jp_train.config.choices import SourceKind
from jp_train.config.schema import SourceConfig
from jp_train.engine.watch.stop import Stop
from jp_train.train import session
from jp_train.train.callbacks import Callback, StepEnd, standard_callbacks
from jp_train.train.preparation import Parts
from jp_train.train.trainer import Trainer
from tests.engine.tiny_run import tiny_run, write_data

STOPPED, STEPS = 5, 7
"""The first attempt is ended by a callback, the second one goes on to the planned end."""


@dataclass(frozen=True)
class Ran:
    """The run folder after both attempts, what the first left in it, and what each printed."""

    folder: Path
    first: list[dict[str, Any]]
    printed: tuple[str, str]

    def lines(self, name: str) -> list[dict[str, Any]]:
        return json_lines(self.folder / name)


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def start(module: str, *arguments: str) -> str:
    """Run a module on one rank in another process; what it printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", module, *arguments]
    environment = {**os.environ, **place, "DS_ACCELERATOR": "cpu"}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 0, process.stderr
    return process.stderr


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Held-out losses every 2 steps, a checkpoint every 3, a snapshot of the plan every 2."""
    root = tmp_path_factory.mktemp("ran")
    cfg = tiny_run(write_data(root / "data"), root / "run", steps=STEPS)
    cfg.model.vision.layers = cfg.model.language.layers = 1
    cfg.validation.sources = {"held": SourceConfig(kind=SourceKind.generation, shards="held-gen.tar")}
    cfg.validation.every_steps, cfg.checkpoint.every_steps, cfg.data.snapshot_steps = 2, 3, 2
    cfg.logging.every_steps = 4
    cfg.checkpoint.export_at_end = False
    save_config(cfg, root / "run.yaml")
    printed = start("tests.train.test_trainer", str(root / "run.yaml"))
    first = json_lines(root / "run" / "metrics.jsonl")
    again = start("jp_train", "train", str(root / "run.yaml"))
    return Ran(root / "run", first, (printed, again))


def test_held_out_losses_come_before_the_first_step_every_two_steps_and_at_the_planned_end(ran: Ran) -> None:
    measured = [line["step"] for line in ran.lines("metrics.jsonl") if "val/total" in line]
    assert measured == [0, 2, 4, 6, STEPS]


def test_a_checkpoint_is_made_every_three_steps_and_at_the_end_and_the_plan_is_kept_once_a_step(ran: Ran) -> None:
    saves = [event["step"] for event in ran.lines("events.jsonl") if event["event"] == "save"]
    assert saves == [3, STOPPED, 6, STEPS]
    snapshots = [line["step"] for line in ran.lines("plan_snapshots.jsonl")]
    assert sorted(set(snapshots)) == [2, 3, 4, STOPPED, 6, STEPS]
    assert [snapshots.count(step) for step in (2, 3, 4, 6, STEPS)] == [1] * 5


def test_the_tokens_seen_add_up_over_a_resume(ran: Ran) -> None:
    trained = [line for line in ran.lines("metrics.jsonl") if line["step"]]
    assert [line["step"] for line in trained] == list(range(1, STEPS + 1))
    total = 0.0
    for line in trained:
        total += line["tokens/total"]
        assert line["tokens/seen"] == total


def test_a_resume_leaves_the_lines_of_the_steps_before_as_they_were(ran: Ran) -> None:
    assert ran.lines("metrics.jsonl")[: len(ran.first)] == ran.first


def test_the_console_has_a_line_every_four_steps_with_the_means_since_the_line_before(ran: Ran) -> None:
    pattern = re.compile(r"step (\d)/\d  loss ([\d.]+) \((.+?)\)  ")
    lines = [match.groups() for text in ran.printed for match in map(pattern.match, text.splitlines()) if match]
    assert [int(step) for step, *_ in lines] == [1, 4, 6, STEPS], "and the first of an attempt and the last planned"
    loss = {line["step"]: line["loss/total"] for line in ran.lines("metrics.jsonl") if line["step"]}
    assert float(lines[1][1]) == pytest.approx(sum(loss[step] for step in (2, 3, 4)) / 3, abs=6e-4)
    assert re.fullmatch(r"und [\d.]+ text [\d.]+ gen [\d.]+", lines[1][2]), "three steps have all kinds"
    about_steps = [line for line in ran.printed[0].splitlines() if line.startswith("step ")]
    assert len(about_steps) == 2 + 3 and max(map(len, about_steps)) <= 100, "steps 1 and 4, held out at 0, 2 and 4"


class StopAfterFive(Callback):
    """Leaves `before_first_step` as it is."""

    def after_step(self, end: StepEnd) -> None:
        if end.step == STOPPED:
            end.stop = Stop("five steps are enough", "stopped_early")


class NotingTrainer(Trainer):
    """Writes down the rows of every step."""

    def train_step(self, micro_batches, totals, **times):
        with (Path(self.cfg.run_dir) / "rows.txt").open("a") as file:
            print(sum(batch.rows for batch in micro_batches), file=file)
        return super().train_step(micro_batches, totals, **times)


def test_a_callback_that_sets_stop_ends_the_run_after_a_last_checkpoint(ran: Ran) -> None:
    assert [line["step"] for line in ran.first] == [0, 1, 2, 3, 4, STOPPED]
    (stop,) = [event for event in ran.lines("events.jsonl") if event["event"] == "stopped_early"]
    assert (stop["step"], stop["reason"], stop["exit_code"]) == (STOPPED, "five steps are enough", 0)
    (resume,) = [event for event in ran.lines("events.jsonl") if event["event"] == "resume"]
    assert resume["step"] == STOPPED


def test_an_optimizer_step_has_all_rows_of_the_batch(ran: Ran) -> None:
    assert (ran.folder / "rows.txt").read_text().split() == ["4"] * STOPPED


def main(config: str) -> int:
    """Train with one more callback, between the step's line and its checkpoint."""

    def with_stop(parts: Parts) -> list[Callback]:
        grace, validation, metrics, *after = standard_callbacks(parts)
        return [grace, validation, metrics, StopAfterFive(), *after]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "standard_callbacks", with_stop)
        patch.setattr(session, "Trainer", NotingTrainer)
        return session.train(load_config(config))


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
