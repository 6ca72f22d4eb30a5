"""`data explain` against a real ZeRO-3 run of two ranks, interrupted and resumed, with bad samples in its stream."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import jp_train.data.plan as plan_module
from jp_train.cli.main import main
from jp_train.config import RunConfig, batch_plan, load_config
from jp_train.config.schema import WandbMode
from jp_train.data.batch_file import load_batch
from jp_train.data.loader import rows_hash
from jp_train.data.snapshots import SNAPSHOTS_FILE
from jp_train.errors import ConfigError, DataError
from jp_train.run.log import RunLog
from jp_train.tools.explain.replay import Replay
from jp_train.tools.explain.step import compare_with_metrics, explain_step, open_replay
from jp_train.types import PackedBatch
from tests.distributed import Nursery
from tests.engine.tiny_run import write_data

STEPS, WORLD, ROWS = 9, 2, 8


class Trained:
    """The run folder, where the ranks kept their micro-batches, and the row hashes that they computed, by rank and
    step."""

    def __init__(self, folder: Path, kept: Path, hashes: list[dict[int, str]]) -> None:
        self.folder, self.kept, self.hashes = folder, kept, hashes

    def batches(self, step: int, rank: int) -> list[PackedBatch]:
        return [load_batch(path) for path in sorted(self.kept.glob(f"step{step:03d}.rank{rank}.*.safetensors"))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    """Nine steps in two attempts, the second from the checkpoint of step 5; only the last checkpoint is left."""
    root = tmp_path_factory.mktemp("explain")
    data, folder, kept = write_data(root / "data"), root / "run", root / "kept"
    attempt = {
        "kind": "train",
        "data": str(data),
        "run_dir": str(folder),
        "keep": str(kept),
        "rows": ROWS,
        "broken": True,
        "engine.micro_batch_rows": 2,
        "engine.activation_checkpointing": False,
        "data.skip_minimum": 1000,
        "data.skip_consecutive": 1000,
        "data.snapshot_steps": 2,
        "checkpoint.keep_last": 1,
        "checkpoint.export_at_end": False,
        "model.vision.layers": 1,
        "model.language.layers": 1,
    }
    with Nursery(Path(__file__).resolve().parent / "explain_worker.py") as nursery:
        launch = nursery.run(
            root / "launch",
            [{"name": "first", **attempt, "steps": 5}, {"name": "second", **attempt, "steps": STEPS}],
            world=WORLD,
            timeout_s=900,
        )
    hashes: list[dict[int, str]] = []
    for rank in range(WORLD):
        results = [launch.result(name, rank) for name in ("first", "second")]
        assert [result.get("code") for result in results] == [0, 0], results
        assert [len(result["hashes"]) for result in results] == [5, STEPS - 5]
        hashes.append({int(step): digest for result in results for step, digest in result["hashes"].items()})
    return Trained(folder, kept, hashes)


def different(batch: PackedBatch, other: PackedBatch) -> list[str]:
    names = []
    for field in fields(PackedBatch):
        mine, theirs = getattr(batch, field.name), getattr(other, field.name)
        equal = (
            torch.equal(mine, theirs) and mine.dtype == theirs.dtype
            if isinstance(mine, torch.Tensor)
            else mine == theirs
        )
        names += [] if equal else [field.name]
    return names


def test_every_step_is_rebuilt_bit_equal_to_what_the_ranks_trained_also_after_the_resume(trained):
    skipped = 0
    with open_replay(None, [], trained.folder) as replay:
        for step in (6, 1, 9, 5, 2, 3, 4, 7, 8):
            for rank in range(WORLD):
                again = list(replay.micro_batches(step, replay.rows_of_rank(rank, WORLD)))
                batches = trained.batches(step, rank)
                assert len(batches) == len(again) == ROWS // WORLD // 2
                assert [different(micro.batch, batch) for micro, batch in zip(again, batches, strict=True)] == [[], []]
                assert rows_hash(micro.batch for micro in again) == trained.hashes[rank][step]
                skipped += sum(len(batch.skipped) for batch in batches)
    assert skipped, "the run met no bad sample"
    ledger = [json.loads(line) for line in (trained.folder / "ledger.jsonl").read_text().splitlines()]
    assert skipped == len(ledger)


def test_an_explained_step_counts_what_the_metrics_count_and_names_what_the_ledger_names(trained):
    ledger = [json.loads(line) for line in (trained.folder / "ledger.jsonl").read_text().splitlines()]
    metrics = {
        line["step"]: line for line in map(json.loads, (trained.folder / "metrics.jsonl").read_text().splitlines())
    }
    with open_replay(None, [], trained.folder) as replay:
        for step in (4, 7):
            explained = explain_step(replay, step)
            assert len(explained["rows"]) == ROWS and explained["plan_step"] == step - 1
            assert explained["totals"]["tokens"] == metrics[step]["tokens/total"]
            assert explained["rows_digest"] == metrics[step]["data/rows_digest"]
            for kind in ("understanding", "text", "generation"):
                assert explained["totals"]["kinds"][kind]["tokens"] == metrics[step].get(f"tokens/{kind}", 0)
            named = [(entry["key"], entry["reason"]) for entry in ledger if entry["step"] == step]
            assert sorted(
                (skip["key"], skip["reason"]) for row in explained["rows"] for skip in row["skipped"]
            ) == sorted(named)
            assert "metrics.jsonl of the run agrees" in compare_with_metrics(explained, trained.folder)
            with pytest.raises(DataError, match="was not rebuilt as it was trained.*data/rows_digest is"):
                compare_with_metrics({**explained, "rows_digest": explained["rows_digest"] ^ 1}, trained.folder)
        assert compare_with_metrics(explain_step(replay, 4, row=0), trained.folder) is None


def test_the_run_keeps_a_snapshot_for_every_stretch_of_steps_though_its_checkpoints_are_gone(trained, monkeypatch):
    steps = [json.loads(line)["step"] for line in (trained.folder / SNAPSHOTS_FILE).read_text().splitlines()]
    assert [path.name for path in (trained.folder / "checkpoints").glob("step_*")] == [f"step_{STEPS:07d}"]
    assert steps == sorted(steps) and set(steps) == {2, 4, 5, 6, 8, 9}, (
        "every 2 steps, and at the saves of steps 5 and 9"
    )
    counted = []
    plain = plan_module._Fold.advance
    monkeypatch.setattr(
        plan_module._Fold,
        "advance",
        lambda self, *args, **kwargs: counted.append(self.step) or plain(self, *args, **kwargs),
    )
    cfg = load_config(trained.folder / "config.yaml")
    for step in range(1, STEPS + 1):
        with Replay(cfg, trained.folder) as replay:
            counted.clear()
            replay.specs(step)
            assert len(counted) <= 2, f"step {step} took {counted}"


def test_a_resumed_run_drops_the_snapshots_of_steps_that_it_trains_again_and_torn_lines(tmp_path):
    for resumed_step, kept in ((4, [2, 4]), (None, [])):
        (tmp_path / SNAPSHOTS_FILE).write_text(
            "".join(json.dumps({"step": step}) + "\n" for step in (2, 4, 6)) + '{"step": 8, "po'
        )
        cfg = RunConfig(run_dir=str(tmp_path))
        cfg.logging.wandb.mode = WandbMode.disabled
        log = RunLog(cfg, active=True, dp_world_size=1)
        log.begin()
        log.open(batch=batch_plan(cfg, 1), resumed_step=resumed_step, checkpoint=None)
        log.snapshot({"step": 5})
        log.close()
        lines = (tmp_path / SNAPSHOTS_FILE).read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [*kept, 5]


def test_changed_data_are_refused_and_changed_code_is_noted(trained, tmp_path):
    with (
        open_replay(None, ["data.pool_size=16"], trained.folder) as replay,
        pytest.raises(DataError, match="pool_size: the state has 32, this run has 16"),
    ):
        explain_step(replay, 7)
    other = tmp_path / "run"
    shutil.copytree(trained.folder, other, ignore=shutil.ignore_patterns("checkpoints"))
    events = (other / "events.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in events]
    for line in lines:
        if "git_commit" in line:
            line["git_commit"] = "0123456789abcdef-dirty"
    (other / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"torn')
    with open_replay(None, [], other) as replay:
        (note,) = replay.notes
    assert "trained by 0123456789ab-dirty" in note


def test_the_command_prints_an_object_and_saves_the_micro_batch_of_a_row(trained, tmp_path, capsys):
    out = tmp_path / "row.safetensors"
    assert (
        main(
            ["data", "explain", "--run", str(trained.folder), "--step", "7", "--row", "5", "--save", str(out), "--json"]
        )
        == 0
    )
    explained = json.loads(capsys.readouterr().out)
    assert explained["saved"] == [str(out)] and [row["row"] for row in explained["rows"]] == [5]
    assert different(load_batch(out), trained.batches(7, 1)[0]) == []
    config = str(trained.folder / "config.yaml")
    assert (
        main(
            [
                "data",
                "explain",
                "--step",
                "7",
                "--rank",
                "1",
                "--world",
                "2",
                "--save",
                str(out),
                "data.workers=1",
                config,
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert trained.hashes[1][7] in printed and "plan step 6" in printed
    names = ["row_rows_0004-0005.safetensors", "row_rows_0006-0007.safetensors"]
    assert [
        different(load_batch(tmp_path / name), batch) for name, batch in zip(names, trained.batches(7, 1), strict=True)
    ] == [[], []]


def test_wrong_arguments_are_named(trained, tmp_path, capsys):
    run = ["data", "explain", "--run", str(trained.folder)]
    for arguments, message in (
        ([*run, "--step", "0"], "the first optimizer step is 1, got 0"),
        ([*run, "--step", "1", "--row", "8"], "8 rows, numbered from 0 to 7"),
        ([*run, "--step", "1", "--rank", "1"], "--rank and --world go together"),
        ([*run, "--step", "1", "--row", "0", "--save", str(tmp_path / "x.pt")], "ends with .safetensors"),
        (["data", "explain", "--step", "1"], "name a configuration"),
        (["data", "explain", "--step", "1", "--run", str(tmp_path)], "it has no config.yaml"),
        (["data", "explain", "a.yaml", "b.yaml", "--step", "1"], "one configuration is expected"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def test_a_run_of_a_recipe_is_explained_by_its_configuration_alone(trained):
    """config.yaml names preset and recipe files for people; what they hold now must not matter."""
    config = trained.folder / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("preset: null", "preset: no/such").replace("recipe: null", "recipe: /no/such.yaml"))
    try:
        with pytest.raises(ConfigError, match="no/such"), open_replay(config, [], None):
            pass
        with open_replay(None, [], trained.folder) as replay:
            assert replay.cfg.preset is None and explain_step(replay, 2, row=0)["rows"]
    finally:
        config.write_text(text)


def test_a_step_that_was_not_trained_is_said_to_be_so(trained, tmp_path):
    with open_replay(None, [], trained.folder) as replay:
        assert explain_step(replay, STEPS, row=0)["notes"] == []
        (note,) = explain_step(replay, STEPS + 1, row=0)["notes"]
        assert note.startswith(f"the stage ends after step {STEPS}: step {STEPS + 1} is what")
    with open_replay(None, ["stage.training_steps=20"], trained.folder) as replay:
        (note,) = explain_step(replay, STEPS + 1, row=0)["notes"]
        assert note == f"{trained.folder} has trained {STEPS} steps: step {STEPS + 1} is still to come"


@pytest.mark.parametrize(
    ("options", "words"), [(["--step", "1", "--row", "77"], "--row 77: a step has"), (["--step", "0"], "--step counts")]
)
@pytest.mark.parametrize("command", ["explain", "inspect"])
def test_a_step_or_row_that_cannot_be_is_refused_before_the_data_are_opened(trained, command, options, words, capsys):
    if command == "inspect" and "--row" in options:
        options, words = ["--rows", "0"], "--rows 0: show at least one row"
    assert main(["data", command, "--run", str(trained.folder), "data.root=/absent", *options]) == ConfigError.exit_code
    assert words in capsys.readouterr().err
