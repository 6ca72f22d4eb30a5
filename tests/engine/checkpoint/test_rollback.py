"""Going back to a chosen checkpoint: what is moved, that nothing is lost, and that it happens once."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import jp_train.engine.checkpoint.rollback as rollback
from jp_train.engine.checkpoint.files import checkpoint_names
from jp_train.errors import CheckpointError
from jp_train.run.reading import read_run
from jp_train.run.status import format_status, status
from tests.distributed import Launch, Nursery
from tests.engine.checkpoint.test_store import save, store

WORKER = Path(__file__).resolve().parents[1] / "worker.py"
STEPS, BACK_TO = 12, 4
IDENTITY = {"seed": 7}


class Crash(BaseException):
    """The process ends here."""


def run_folder(tmp_path: Path) -> Path:
    """Checkpoints of steps 2, 4, 6, 8 with the lines and the export that belong to them."""
    made = store(tmp_path, keep_last=9)
    for step in (2, 4, 6, 8):
        save(made, step)
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 10)))
    for name in ("export", "wandb"):
        (tmp_path / name).mkdir()
    (tmp_path / "export" / "config.json").write_text("{}")
    (tmp_path / "wandb" / "run_id").write_text("abcd\n")
    return tmp_path


def assert_complete(folder: Path, run: Path) -> None:
    assert checkpoint_names(folder / "checkpoints") == ["step_0000006", "step_0000008"]
    assert store(folder).newest().step == 8 and (folder / "config.yaml").read_text() == "seed: 7\n"
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 9
    assert (folder / "export" / "config.json").is_file() and (folder / "wandb" / "run_id").is_file()
    assert checkpoint_names(run / "checkpoints") == ["step_0000002", "step_0000004"]
    assert not (run / "export").exists() and not (run / "wandb" / "run_id").exists()
    assert (run / "checkpoints" / "latest").read_text() == "step_0000004\n"


@pytest.mark.parametrize("moved", range(5))
def test_a_crash_between_any_two_moves_loses_nothing_and_going_back_once_more_completes_the_folder(
    moved, tmp_path, monkeypatch
):
    run, done = run_folder(tmp_path), []
    plain = os.rename

    def rename(source, target):
        if len(done) == moved:
            raise Crash
        done.append(target)
        plain(source, target)

    monkeypatch.setattr(rollback.os, "rename", rename)
    if moved < 4:
        with pytest.raises(Crash):
            rollback.abandon_after(run, 4)
        assert store(run).newest().step == 8, "without going back, the run goes on where it was"
        monkeypatch.undo()
    aside = rollback.abandon_after(run, 4)
    assert aside.from_step == 8
    assert_complete(aside.folder, run)
    assert rollback.abandon_after(run, 4) is None and len(list((run / "abandoned").iterdir())) == 1


def test_going_back_to_the_same_step_again_keeps_both_branches(tmp_path):
    run = run_folder(tmp_path)
    folders = [rollback.abandon_after(run, 4).folder]
    made = store(run, keep_last=9)
    save(made, 6), save(made, 8)
    folders.append(rollback.abandon_after(run, 4).folder)
    assert [folder.name for folder in folders] == ["step_0000008_back_to_0000004", "step_0000008_back_to_0000004_2"]
    assert all(store(folder).newest().step == 8 for folder in folders)


def test_a_step_without_a_whole_checkpoint_is_refused_with_those_that_there_are(tmp_path):
    made = store(run_folder(tmp_path))
    (tmp_path / "checkpoints/step_0000006/state.json").unlink()
    (tmp_path / "checkpoints/step_0000002/state.json").write_text('{"step": 3}')
    for step, reason in ((5, "no such checkpoint"), (6, "state.json is missing"), (2, "state.json is damaged")):
        with pytest.raises(CheckpointError, match=rf"resume_from {step}: .*{reason}.*Complete .* steps 2, 4, 8"):
            made.at_step(step)
    with pytest.raises(CheckpointError, match="Complete checkpoints: none"):
        store(tmp_path / "new").at_step(4)


def test_going_back_is_done_when_the_newest_checkpoint_was_made_after_it_with_the_same_settings(tmp_path):
    made = store(run_folder(tmp_path), keep_last=9)
    assert not made.went_back_to(4, IDENTITY)
    assert made.set_aside(4).from_step == 8 and not made.has_later(4)
    assert not made.went_back_to(4, IDENTITY), "nothing was saved since: it is the same to do it again"
    save(made, 6, about={"resume_from": 4})
    assert made.went_back_to(4, IDENTITY)
    assert not made.went_back_to(2, IDENTITY) and not made.went_back_to(4, {"seed": 8})


def test_best_names_a_checkpoint_that_the_run_has_after_going_back_and_without_keep_best_none(tmp_path):
    made = store(tmp_path, keep_last=9, keep_best=True)
    for step, loss in ((2, 3.0), (4, 2.0), (6, 1.0)):
        save(made, step, about={"val/total": loss})
    best = tmp_path / "checkpoints" / "best"
    assert best.read_text() == "step_0000006\n"
    assert made.set_aside(4).from_step == 6 and best.read_text() == "step_0000004\n"
    save(store(tmp_path, keep_last=1), 6)
    assert not best.exists() and checkpoint_names(tmp_path / "checkpoints") == ["step_0000006"]


# -- whole runs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def launches(data: Path, runs: Path) -> dict[str, Launch]:
    """`whole` runs to step 12; each other scenario goes back to step 4 in a copy of its folder."""
    base = {
        "kind": "train", "data": str(data), "steps": STEPS, "checkpoint.every_steps": 2, "checkpoint.keep_last": 9,
        "checkpoint.background": False,
        "model.vision.layers": 1, "model.language.layers": 1, "engine.activation_checkpointing": False,
    }  # fmt: skip

    def part(name: str, folder: str, **changes: Any) -> dict[str, Any]:
        if folder != "whole" and not (runs / folder).exists():
            shutil.copytree(runs / "whole", runs / folder)
        return {**base, "name": name, "run_dir": str(runs / folder), **changes}

    made = {}

    def launch(world: int, *scenarios: dict[str, Any]) -> None:
        launched = nursery.run(runs / f"launch-{scenarios[0]['name']}", scenarios, world=world, timeout_s=900)
        made.update({scenario["name"]: launched for scenario in scenarios})

    back = {"checkpoint.resume_from": BACK_TO}
    slower = {**back, "optimizer.lr": 1e-3}
    with Nursery(WORKER) as nursery:
        launch(2, part("whole", "whole"))
        launch(
            2,
            part("missing", "same", **{"checkpoint.resume_from": 5}),
            part("same", "same", **back),
            part("same-again", "same", **back),
            part("refused", "lr", **slower),
            part("lr", "lr", **slower, **{"checkpoint.accept": ["optimizer.lr"]}),
            part("lr-2", "lr", **slower | {"optimizer.lr": 2e-3}, **{"checkpoint.accept": ["optimizer.lr"]}),
            part("as-the-end", "end", **back, steps=BACK_TO),
        )
        launch(2, part("killed", "killed", **back, kill_at=9))
        launch(2, part("killed-again", "killed", **back))
        launch(1, part("fewer", "fewer", **back))
    return made


def metrics(run: Path) -> dict[int, dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1)), "every step once, in order"
    return {line["step"]: line for line in lines}


def events(run: Path, name: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [event for event in lines if event["event"] == name]


TRAINED = ("loss/", "optim/", "tokens/", "mixture/", "packing/", "data/rows_digest")


def assert_same_as_whole(runs: Path, run: Path) -> None:
    expected, result = metrics(runs / "whole"), metrics(run)
    for step, line in expected.items():
        assert {k: v for k, v in line.items() if k.startswith(TRAINED)} == {
            k: v for k, v in result[step].items() if k.startswith(TRAINED)
        }
    weights, again = (load_file(folder / "export/model.safetensors") for folder in (runs / "whole", run))
    assert weights.keys() == again.keys() and all(torch.equal(again[name], weights[name]) for name in weights)


def test_going_back_from_12_to_4_trains_the_same_again_bit_for_bit(launches, runs):
    for rank in (0, 1):
        result = launches["same"].result("same", rank)
        assert result["code"] == 0, result
        whole = launches["whole"].result("whole", rank)["hashes"]
        assert result["hashes"] == {step: value for step, value in whole.items() if int(step) > BACK_TO}
    assert_same_as_whole(runs, runs / "same")


def test_what_came_after_is_a_run_folder_of_its_own_and_the_run_says_so(launches, runs):
    launches["same"].result("same")
    (event,) = events(runs / "same", "rolled_back")
    aside = Path(event["path"])
    assert (event["step"], event["from_step"]) == (BACK_TO, STEPS)
    assert aside == runs / "same/abandoned/step_0000012_back_to_0000004"
    assert [path.name for path in sorted((aside / "checkpoints").iterdir())] == [
        f"step_{step:07d}" for step in (6, 8, 10, 12)
    ]
    assert_same_as_whole(runs, aside)
    assert read_run(aside).last_step == STEPS and read_run(runs / "same").repeated_steps == 0
    shown = format_status(status(runs / "end"))
    assert "rolled_back" in shown and "2 on disk, 4 in abandoned/" in shown


def test_a_step_that_is_not_there_changes_nothing(launches):
    result = launches["missing"].result("missing", 1)
    assert (result["error"], result["exit_code"]) == ("CheckpointError", 4)
    assert "Complete checkpoints: steps 2, 4, 6, 8, 10, 12" in result["message"] and not result["hashes"]


def test_the_same_command_again_does_not_go_back_again(launches, runs):
    again = launches["same-again"].result("same-again")
    assert again["code"] == 0 and again["hashes"] == {} and len(events(runs / "same", "rolled_back")) == 1


def test_after_a_kill_the_same_command_goes_on_from_the_newest_checkpoint_of_the_new_branch(launches, runs):
    again = launches["killed-again"].result("killed-again")
    assert again["code"] == 0 and list(again["hashes"]) == ["9", "10", "11", "12"]
    assert [event["step"] for event in events(runs / "killed", "resume")] == [BACK_TO, 8]
    assert_same_as_whole(runs, runs / "killed")


def test_a_changed_setting_is_refused_before_anything_is_moved_and_accepted_goes_back_each_time(launches, runs):
    assert "checkpoint.accept=[optimizer.lr]" in launches["refused"].result("refused")["message"]
    assert [launches[name].result(name)["code"] for name in ("lr", "lr-2")] == [0, 0]
    first, second = events(runs / "lr", "rolled_back")
    assert first["path"] != second["path"]
    results = [metrics(folder) for folder in (runs / "whole", Path(second["path"]), runs / "lr")]
    for step in range(1, STEPS + 1):
        losses = [lines[step]["loss/total"] for lines in results]
        assert len(set(losses)) == (1 if step <= BACK_TO + 1 else 3), f"step {step}: {losses}"


def test_a_finished_run_may_end_at_an_earlier_step_and_exports_that(launches, runs):
    result = launches["as-the-end"].result("as-the-end")
    assert result["code"] == 0 and result["hashes"] == {}
    exported, whole = (load_file(runs / name / "export/model.safetensors") for name in ("end", "whole"))
    assert any(not torch.equal(exported[name], whole[name]) for name in whole)


def test_another_number_of_ranks_goes_back_to_the_same_rows(launches, runs):
    assert launches["fewer"].result("fewer")["code"] == 0
    expected, result = metrics(runs / "whole"), metrics(runs / "fewer")
    for step, line in expected.items():
        assert result[step]["data/rows_digest"] == line["data/rows_digest"]
        assert result[step]["loss/total"] == pytest.approx(line["loss/total"], rel=1e-3)
