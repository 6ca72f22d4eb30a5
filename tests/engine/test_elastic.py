"""Runs that go on with another number of ranks, what a checkpoint holds against DeepSpeed's own view, and a disk that
fills up.

Real ZeRO-3 ranks (gloo). Three chains of launches, each a plain resume with the same run folder: 2 -> 1 -> 2 ranks
(fp32, stage 2), 1 -> 3 -> 2 (bf16, stage 3) and 1 -> 3 -> 2 (fp32, stage 1: most weights frozen), 6 rows a step, so
that accumulation and micro-batch change too.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from jp_train.config import batch_plan
from jp_train.data.index import index_sources
from jp_train.data.loader import StepLoader, build_plan, rows_hash
from jp_train.data.tokenizer import load_tokenizer
from jp_train.model.weight_files import open_weights
from jp_train.tools.export import convert
from jp_train.tools.inference import load_for_inference
from tests.distributed import Launch, Nursery
from tests.engine.tiny_run import tiny_run
from tests.small_disk import fill as fill_disk

WORKER = Path(__file__).resolve().parent / "elastic_worker.py"
STEPS, ROWS = 6, 6
BASE = {
    "kind": "train",
    "steps": STEPS,
    "rows": ROWS,
    "model.vision.layers": 1,
    "model.language.layers": 1,
    "engine.activation_checkpointing": False,
    "checkpoint.export_at_end": False,
}
CHAINS = {
    "fp32 stage 2": ("whole-a", ("a1", "a2", "a3"), (2, 1, 2)),
    "bf16 stage 3": ("whole-b", ("b1", "b2", "b3"), (1, 3, 2)),
    "fp32 stage 1": ("whole-c", ("c1", "c2", "c3"), (1, 3, 2)),
}
A = {"stage": 2}
B = {"stage": 3, "precision": "bf16", "engine.micro_batch_rows": 3}
C = {"stage": 1, "engine.persistence_threshold": 100_000, "engine.micro_batch_rows": 6}


@pytest.fixture(scope="module")
def launches(data, runs, small_disk) -> dict[str, Launch]:
    """Every launch, by name; a scenario's result is in the launch that ran it."""

    def part(name: str, until: int, **changes) -> dict:
        folder = runs / name[0]
        return {
            **BASE,
            "name": name,
            "run_dir": str(folder),
            "stage.early_stop.at_step": until,
            "compare": True,
            **changes,
        }

    def alone(name: str, **changes) -> dict:
        return {**BASE, "name": name, "run_dir": str(runs / name), "checkpoint.export_at_end": True, **changes}

    watched = {"held_out": True, "validation.every_steps": 1, "checkpoint.every_steps": 1, "checkpoint.keep_best": True}
    filling = []
    if small_disk is not None:
        for name, changes in (("full-then-free", {"free_space_at": 4}), ("full-at-the-end", {})):
            # the checkpoints of this run lie on the small disk, and something else fills it
            (runs / name).mkdir()
            (small_disk / name).mkdir()
            (runs / name / "checkpoints").symlink_to(small_disk / name)
            changes |= {"filler": str(small_disk / "filler")} if changes else {}
            filling.append(
                alone(
                    name,
                    steps=5,
                    **{
                        "checkpoint.every_steps": 2,
                        "checkpoint.on_error": "continue",
                        "checkpoint.export_at_end": False,
                    },
                    **{"engine.micro_batch_rows": 6},
                    **changes,
                )
            )

    def fill(_: list[int]) -> None:
        if small_disk is not None:
            fill_disk(small_disk, 300_000)

    plans = {
        "two": (
            2,
            [
                alone("whole-a", **A, **watched),
                part("a1", 2, **A),
                {"name": "one-rank-fails", "kind": "one_rank_fails", "folder": str(runs / "one-rank-fails")},
            ],
        ),
        "one": (
            1,
            [
                part("a2", 4, **A, **{"engine.micro_batch_rows": 2}),
                part("b1", 2, **B),
                part("c1", 2, **C),
                alone("whole-b", **B),
                alone("whole-c", **C),
                *filling[:1],
            ],
        ),
        "three": (3, [part("b2", 4, **B), part("c2", 4, **C)]),
        "back": (
            2,
            [
                part("a3", STEPS, **A, **{"engine.micro_batch_rows": 2, "checkpoint.export_at_end": True}),
                part("b3", STEPS, **B, **{"checkpoint.export_at_end": True}),
                part("c3", STEPS, **C, **{"checkpoint.export_at_end": True}),
                alone(
                    "from-checkpoint",
                    stage=2,
                    steps=2,
                    init_from=str(runs / "whole-a/checkpoints/step_0000006"),
                    dump_start=str(runs / "d.start"),
                ),
            ],
        ),
        "full": (1, filling[1:]),
    }
    made = {}
    with Nursery(WORKER) as nursery:
        for name, (world, scenarios) in plans.items():
            for scenario in scenarios:
                if scenario["kind"] == "train":
                    scenario["data"] = str(data)
            if scenarios:
                full = any(scenario["name"].startswith("full") for scenario in scenarios)
                if full:
                    fill([])
                made |= dict.fromkeys(
                    [scenario["name"] for scenario in scenarios],
                    nursery.run(runs / f"launch-{name}", scenarios, world=world, timeout_s=900),
                )
    return made


def metrics(run: Path) -> dict[int, dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines}), "every step once, in order"
    return {line["step"]: line for line in lines}


def events(run: Path, name: str) -> list[dict]:
    return [
        event for event in map(json.loads, (run / "events.jsonl").read_text().splitlines()) if event["event"] == name
    ]


@pytest.mark.parametrize("chain", CHAINS)
def test_a_run_goes_on_with_another_number_of_ranks_by_the_same_command(chain, launches, runs):
    whole, parts, worlds = CHAINS[chain]
    for name in (whole, *parts):
        assert launches[name].result(name)["code"] == 0, launches[name].result(name)
    expected, found = metrics(runs / whole), metrics(runs / parts[0][0])
    assert set(found) == set(expected) - {0} == set(range(1, STEPS + 1))
    worst = max(abs(found[step]["loss/total"] / expected[step]["loss/total"] - 1) for step in found)
    norms = max(abs(found[step]["optim/grad_norm"] / expected[step]["optim/grad_norm"] - 1) for step in found)
    print(
        f"{chain}, {' -> '.join(map(str, worlds))} ranks: worst relative difference of loss {worst:.1e}, "
        f"gradient norm {norms:.1e}"
    )
    assert worst <= 1e-3
    assert expected[1]["loss/total"] - expected[STEPS]["loss/total"] > 0.01, "something must have been learnt"
    told = [event["resized"] for event in events(runs / parts[0][0], "resume")]
    assert [text.split(" ranks")[0] for text in told] == [f"{a} -> {b}" for a, b in pairwise(worlds)]
    assert all(f"{ROWS} rows a step" in text for text in told)


def test_micro_batch_and_accumulation_follow_the_number_of_ranks(launches, runs):
    launches["b3"].result("b3"), launches["a3"].result("a3")
    batches = {
        run: [event["batch"] for event in (*events(runs / run, "start"), *events(runs / run, "resume"))] for run in "ab"
    }
    assert [text.split(" = ")[1].split(" ranks")[0] for text in batches["a"]] == [
        "1 micro-batch rows x 3 accumulation x 2",
        "2 micro-batch rows x 3 accumulation x 1",
        "1 micro-batch rows x 3 accumulation x 2",
    ]
    assert [text.split(" = ")[1].split(" ranks")[0] for text in batches["b"]] == [
        "3 micro-batch rows x 2 accumulation x 1",
        "2 micro-batch rows x 1 accumulation x 3",
        "3 micro-batch rows x 1 accumulation x 2",
    ]


@pytest.mark.parametrize("chain", CHAINS)
def test_rows_are_those_of_an_undisturbed_run(chain, launches, data, tmp_path):
    _, parts, worlds = CHAINS[chain]
    cfg = tiny_run(data, tmp_path, stage=int(chain[-1]), rows=ROWS, steps=STEPS)
    tokenizer = load_tokenizer(cfg.tokenizer)
    indexes = index_sources(cfg, tokenizer)
    plan = batch_plan(cfg, 1)
    hashes: dict[tuple[int, int], dict[int, str]] = {}
    for name, world in zip(parts, worlds, strict=True):
        for rank in range(world):
            for step, digest in launches[name].result(name, rank)["hashes"].items():
                hashes.setdefault((int(step), world), {})[rank] = digest
    assert [step for step, _ in sorted(hashes)] == list(range(1, STEPS + 1)), "every step once"
    loader = StepLoader(
        cfg, build_plan(cfg, indexes, plan, tokenizer), indexes, tokenizer, dp_rank=0, dp_world_size=1, batch_plan=plan
    )
    with loader as steps:
        for (_, world), found in sorted(hashes.items()):
            rows = [row for batch in next(steps).micro_batches for row in batch.provenance]
            share = ROWS // world
            assert [found[rank] for rank in range(world)] == [
                rows_hash(rows[rank * share : (rank + 1) * share]) for rank in range(world)
            ]


@pytest.mark.parametrize("name", [part for _, parts, _ in CHAINS.values() for part in parts])
def test_slices_are_what_deepspeed_gathers(name, launches):
    """Masters, moments and frozen weights after training; and in the engine just after a resume, working and
    persistent copies included."""
    result = launches[name].result(name)
    assert result["held"]["compared"] > 50 and not result["held"]["differ"] and not result["held"]["left over"]
    if name in ("b2", "c2"):
        assert result["held"]["padded"] > 10, "three ranks do not divide most sizes"
    if name[1] == "1":
        assert result["restored"] is None
        return
    assert result["restored"]["compared"] > 50 and not result["restored"]["differ"]
    assert result["restored"]["step"] == (2 if name[1] == "2" else 4)
    assert (result["restored"]["persistent"] > 10) == (name[0] == "c")


@pytest.mark.parametrize("chain", CHAINS)
def test_frozen_weights_survive_the_changes_bit_for_bit(chain, launches, runs):
    whole, parts, _ = CHAINS[chain]
    launches[parts[-1]].result(parts[-1])
    expected, found = (
        load_file(runs / whole / "export/model.safetensors"),
        load_file(runs / parts[0][0] / "export/model.safetensors"),
    )
    assert expected.keys() == found.keys()
    trained = {entry["name"] for entry in index_of(runs / whole) if entry["trained"]}
    for name, tensor in expected.items():
        if name in trained:
            assert torch.allclose(tensor.float(), found[name].float(), rtol=0.02, atol=2e-3), name
        else:
            assert torch.equal(tensor, found[name]), name


def index_of(run: Path) -> list[dict]:
    return json.loads((run / f"checkpoints/step_{STEPS:07d}/partitions.json").read_text())["parameters"]


def test_validation_and_saving_every_step_do_not_disturb_training(launches, runs):
    """Held-out losses and a background save at every step against none: bit-equal losses, norms and weights."""
    assert launches["a1"].result("a1")["code"] == launches["whole-a"].result("whole-a")["code"] == 0
    watched, alone = metrics(runs / "whole-a"), metrics(runs / "a")
    for step in (1, 2):
        assert "val/total" in watched[step] and "val/total" not in alone[step]
        for key in ("loss/total", "optim/grad_norm", "loss/text", "loss/generation"):
            assert watched[step][key] == alone[step][key], (step, key)


def test_the_best_checkpoint_is_kept_beside_the_last_ones(launches, runs):
    launches["whole-a"].result("whole-a")
    losses = {step: line["val/total"] for step, line in metrics(runs / "whole-a").items() if step}
    best = min(losses, key=losses.get)
    folder = runs / "whole-a" / "checkpoints"
    assert (folder / "best").read_text() == f"step_{best:07d}\n"
    assert {path.name for path in folder.glob("step_*")} == {f"step_{step:07d}" for step in (best, STEPS - 1, STEPS)}
    saves = events(runs / "whole-a", "save")
    assert [event["step"] for event in saves] == list(range(1, STEPS + 1))
    assert all(event["bytes"] > 100_000 and event["stall_s"] > 0 and event["total_s"] > 0 for event in saves)
    lines = metrics(runs / "whole-a")
    assert [step for step in range(1, STEPS + 1) if "checkpoint/stall_s" in lines[step]] == list(range(2, STEPS + 1))


def test_ranks_agree_when_one_of_them_cannot_write_is_slow_or_cannot_read(launches):
    told, other = (launches["one-rank-fails"].result("one-rank-fails", rank) for rank in (0, 1))
    assert told == other
    assert "rank 1: " in told["full"] and "No space left" in told["full"] and "rank 0" not in told["full"]
    assert told["left"] == ["latest", "step_0000100"]
    assert (told["whole"], told["slow"], told["slow, later"], told["no memory"]) == (100, None, 300, 400)
    assert told["problems"] == [
        "rank 1: no host memory for a copy (none left): training waited while step 400 was written"
    ]
    assert (
        "step_0000400 is there, but not every rank can read it: rank 1 on " in told["unseen"]
        and "all hosts share" in told["unseen"]
    )
    assert told["damaged"] == 300


# -- weights out of a checkpoint -------------------------------------------------------------------


@pytest.mark.parametrize(("run", "dtype"), (("whole-a", "fp32"), ("b", "bf16"), ("from-checkpoint", "fp32")))
def test_an_export_of_a_checkpoint_equals_the_runs_own(run, dtype, launches, runs, tmp_path):
    """Offline, in both layouts, from files of 2 ranks; the last run left its frozen weights in the checkpoint that
    it started from."""
    for name in ("whole-a", "b3", "from-checkpoint"):
        assert launches[name].result(name)["code"] == 0, launches[name].result(name)
    newest = max((runs / run / "checkpoints").glob("step_*"))
    convert(newest, tmp_path / "hf", dtype=dtype)
    expected, found = load_file(runs / run / "export/model.safetensors"), load_file(tmp_path / "hf/model.safetensors")
    assert expected.keys() == found.keys() and all(
        torch.equal(tensor, found[name]) for name, tensor in expected.items()
    )
    assert (tmp_path / "hf/config.json").read_text() == (runs / run / "export/config.json").read_text()
    convert(newest, tmp_path / "released", layout="deepseek", dtype=dtype)
    convert(runs / run / "export", tmp_path / "expected", layout="deepseek", dtype=dtype)
    expected, found = (
        load_file(tmp_path / "expected/model.safetensors"),
        load_file(tmp_path / "released/model.safetensors"),
    )
    assert expected.keys() == found.keys()
    differ = {name for name, tensor in expected.items() if not torch.equal(tensor, found[name])}
    assert differ <= {"gen_vision_model.quantize.embedding.weight"}, "an export holds the codebook with unit rows"
    ours, exported = (
        load_for_inference(path, dtype=torch.bfloat16).janus.state_dict() for path in (newest, runs / run / "export")
    )
    assert all(torch.equal(tensor, ours[name]) for name, tensor in exported.items()), "generate takes checkpoints too"


def test_a_stage_starts_from_a_checkpoint_as_from_the_export_beside_it(launches, runs):
    assert launches["from-checkpoint"].result("from-checkpoint")["code"] == 0
    exported, started = load_file(runs / "whole-a/export/model.safetensors"), load_file(runs / "d.start")
    assert exported.keys() == started.keys()
    differ = {name for name, tensor in exported.items() if not torch.equal(tensor, started[name])}
    assert differ <= {"model.vqmodel.quantize.embedding.weight"}, differ


def test_an_export_with_other_frozen_weights_than_the_run_had_is_refused(launches, runs, tmp_path):
    from jp_train.errors import CheckpointError

    launches["from-checkpoint"].result("from-checkpoint")
    source = max((runs / "from-checkpoint/checkpoints").glob("step_*"))
    copied = tmp_path / "step_0000002"
    copied.mkdir()
    for file in source.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((copied / "manifest.json").read_text())
    assert not manifest["with_frozen"]
    (copied / "manifest.json").write_text(json.dumps(manifest | {"frozen_checksum": "f" * 16}))
    with pytest.raises(CheckpointError, match="frozen weights"):
        convert(copied, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (copied / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        open_weights(copied)


# -- the disk --------------------------------------------------------------------------------------


def test_a_run_on_a_full_disk_goes_on_and_saves_when_there_is_room_again(launches, runs, small_disk):
    if small_disk is None:
        pytest.skip("mounting a small file system needs root")
    assert launches["full-then-free"].result("full-then-free")["code"] == 0
    (failed,) = events(runs / "full-then-free", "save_failed")
    assert (
        failed["step"] == 2
        and "needs" in failed["reason"]
        and "are free at" in failed["reason"]
        and failed["in_a_row"] == 1
    )
    assert [event["step"] for event in events(runs / "full-then-free", "save")] == [4, 5]
    assert json.loads((runs / "full-then-free" / "status.json").read_text())["failed_saves"] == 1
    assert sorted(metrics(runs / "full-then-free")) == [1, 2, 3, 4, 5]


def test_a_last_save_that_fails_ends_the_run_with_a_checkpoint_error(launches, runs, small_disk):
    if small_disk is None:
        pytest.skip("mounting a small file system needs root")
    result = launches["full-at-the-end"].result("full-at-the-end")
    assert result["error"] == "CheckpointError" and result["exit_code"] == 4 and "are free at" in result["message"]
    assert [event["step"] for event in events(runs / "full-at-the-end", "save_failed")] == [2, 4, 5]
    assert not list((runs / "full-at-the-end/checkpoints/").glob("step_*"))
