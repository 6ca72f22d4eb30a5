"""Whole runs on real DeepSpeed ZeRO-3 ranks (gloo), against plain PyTorch and against themselves after a crash.

Five launches serve all tests of this file (tests/distributed.py); each runs its scenarios one after another.
"""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from jp_train.config import RunConfig, batch_plan
from jp_train.data.index import index_sources
from jp_train.data.loader import StepLoader, build_plan, rows_hash
from jp_train.data.tokenizer import load_tokenizer
from jp_train.model.freeze import set_trainable
from jp_train.model.janus_pro import JanusPro
from jp_train.model.pretrained import prepare_weights
from jp_train.model.vq import VQTokenizer, fill_pending
from tests.distributed import Launch, Nursery, wait_for
from tests.engine.tiny_run import tiny_run

WORKER = Path(__file__).resolve().parent / "worker.py"
STEPS = 20
SMALL = {"model.vision.layers": 1, "model.language.layers": 1, "engine.activation_checkpointing": False}
RESUMED = {
    "steps": 8,
    "precision": "bf16",
    "held_out": True,
    "checkpoint.every_steps": 2,
    "model.vision.layers": 1,
    "model.language.layers": 1,
}


@pytest.fixture(scope="module")
def nursery():
    with Nursery(WORKER) as started:
        yield started


def launch(
    nursery: Nursery, runs: Path, data: Path, name: str, scenarios: list[dict], *, world: int, **options
) -> Launch:
    for scenario in scenarios:
        scenario.setdefault("run_dir", str(runs / scenario["name"]))
        scenario["data"] = str(data)
    return nursery.run(runs / f"launch-{name}", scenarios, world=world, timeout_s=900, **options)


@pytest.fixture(scope="module")
def two_ranks(nursery, data, runs) -> Launch:
    def stop_rank_0(pids):
        wait_for(lambda: (runs / "stopped" / "waiting").exists(), timeout_s=800)
        # the launcher signals one rank after the other: the flag must reach rank 1 by itself
        os.kill(pids[0], signal.SIGTERM)

    curve = {"kind": "train", "steps": STEPS, "held_out": True, "validation.every_steps": 7, **SMALL}
    return launch(
        nursery,
        runs,
        data,
        "two",
        [
            {"name": "ranks2-gas2", **curve},
            {"name": "ranks2-gas1", **curve, "engine.micro_batch_rows": 2},
            {"name": "ranks2-several", **curve, "several": True},
            *({"name": f"presence{stage}", "kind": "presence", "stage": stage} for stage in (1, 2, 3)),
            {"name": "whole", "kind": "train", **RESUMED},
            {"name": "data-error", "kind": "train", "steps": 4, "data_error_at": 2, **SMALL},
            {"name": "skips", "kind": "train", "steps": 8, "broken": True, **SMALL},
            {"name": "stopped", "kind": "train", "steps": 50, "wait_in_step": 3, "exit_with_code": True},
        ],
        world=2,
        while_running=stop_rank_0,
    )


@pytest.fixture(scope="module")
def one_rank(nursery, data, runs) -> Launch:
    curve = {"kind": "train", "steps": STEPS, **SMALL}
    short = {"kind": "train", "steps": 6, "engine.micro_batch_rows": 4, **SMALL}
    return launch(
        nursery,
        runs,
        data,
        "one",
        [
            {"name": "ranks1-gas4", **curve},
            {"name": "ranks1-gas1", **curve, "engine.micro_batch_rows": 4},
            {"name": "leak-write", "kind": "leak", "what": "write", "steps": 2, **SMALL},
            {"name": "leak-skip", "kind": "leak", "what": "skip", "steps": 2, "stage": 3, **SMALL},
            {"name": "nan-once", **short, "nan_at": [2]},
            {"name": "nan-thrice", **short, "nan_at": [2, 3, 4]},
            {"name": "early", **short, "stage.early_stop.at_step": 2},
            {
                "name": "early-again",
                "kind": "train",
                "run_dir": str(runs / "early"),
                "steps": 6,
                **SMALL,
                "stage.early_stop.at_step": 2,
            },
            {"name": "early-other", "kind": "train", "run_dir": str(runs / "early"), "steps": 6, **SMALL, "seed": 8},
        ],
        world=1,
    )


@pytest.fixture(scope="module")
def after_crashes(nursery, data, runs, two_ranks) -> Launch:
    """Resumes of two killed runs, the chain of stages, and the negative control, which ends the launch."""
    step = random.SystemRandom().choice((4, 5, 6, 7, 8))
    killed = {"kind": "train", **RESUMED}
    launch(
        nursery,
        runs,
        data,
        "kill-step",
        [{"name": "killed", **killed, "kill_at": step, "kill_rank": step % 2}],
        world=2,
    )
    launch(
        nursery,
        runs,
        data,
        "kill-save",
        [{"name": "killed-saving", **killed, "kill_at": 6, "kill_in_save": True}],
        world=2,
    )
    assert not (runs / "killed" / "export").exists() and not (runs / "killed-saving" / "export").exists()
    assert not (runs / "killed-saving" / "checkpoints" / "step_0000006").exists()
    stages = [
        {
            "name": f"stage{stage}",
            "kind": "train",
            "stage": stage,
            "steps": 2,
            "precision": "bf16",
            "dump_start": str(runs / f"stage{stage}.start"),
            **({"init_from": str(runs / f"stage{stage - 1}")} if stage > 1 else {}),
            **SMALL,
        }
        for stage in (1, 2, 3)
    ]
    return launch(
        nursery,
        runs,
        data,
        "after",
        [
            {"name": "resumed", **killed, "run_dir": str(runs / "killed")},
            {"name": "resumed-saving", **killed, "run_dir": str(runs / "killed-saving")},
            *stages,
            *(
                {
                    "name": name,
                    "kind": "train",
                    "run_dir": str(runs / folder),
                    "steps": steps,
                    "init_from": str(runs / "stage1"),
                    **SMALL,
                }
                for name, folder, steps in (("split-1", "split", 2), ("split-2", "split", 4), ("unsplit", "unsplit", 4))
            ),
            {"name": "no-dummy", "kind": "presence", "stage": 3, "negative": True},
        ],
        world=2,
    )


# -- the oracle ------------------------------------------------------------------------------------


def metrics(run: Path) -> dict[int, dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines}), "every step once, in order"
    return {line["step"]: line for line in lines}


def events(run: Path, name: str) -> list[dict]:
    return [
        event for event in map(json.loads, (run / "events.jsonl").read_text().splitlines()) if event["event"] == name
    ]


def small(data: Path, run_dir: Path, steps: int) -> RunConfig:
    cfg = tiny_run(data, run_dir, steps=steps)
    cfg.model.vision.layers = cfg.model.language.layers = 1
    cfg.engine.micro_batch_rows = 4
    return cfg


@pytest.fixture(scope="module")
def reference(data, tmp_path_factory) -> Callable[[bool], tuple[list[float], list[float]]]:
    """Losses and gradient norms of 20 steps of plain PyTorch AdamW in one process, each step's rows in one batch;
    `several`: of samples with up to five images."""
    return cache(lambda several: plain_run(data, tmp_path_factory.mktemp("reference"), several))


def plain_run(data: Path, folder: Path, several: bool) -> tuple[list[float], list[float]]:
    cfg = small(data, folder, STEPS)
    if several:
        cfg.data.sources["und"].shards = "several.tar"
    tokenizer = load_tokenizer(cfg.tokenizer)
    indexes = index_sources(cfg, tokenizer)
    plan = batch_plan(cfg, 1)
    model = JanusPro(cfg.model, cfg.loss, 3, False, tokenizer.special.image_placeholder)
    vq = VQTokenizer(cfg.model.vq, cfg.model.vision.image_size)
    prepare_weights(model, vq, cfg.model, trainable=cfg.stage.trainable, seed=cfg.seed)
    set_trainable(model, cfg.stage.trainable)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.ndim >= 2]},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=3e-3,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.1,
    )
    losses, norms = [], []
    with StepLoader(
        cfg, build_plan(cfg, indexes, plan, tokenizer), indexes, tokenizer, dp_rank=0, dp_world_size=1, batch_plan=plan
    ) as steps:
        for _ in range(STEPS):
            (batch,) = next(steps).micro_batches
            terms = model(fill_pending(batch, vq))
            loss = (terms.text_sum + terms.image_sum) / (terms.text_tokens + terms.image_tokens)
            for p in trained:
                p.grad = torch.zeros_like(p)
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(trained, 1.0)))
            optimizer.step()
            losses.append(float(loss))
    return losses, norms


CURVES = {"ranks1-gas1": 1, "ranks1-gas4": 1, "ranks2-gas1": 2, "ranks2-gas2": 2, "ranks2-several": 2}


@pytest.mark.parametrize("name", CURVES)
def test_20_zero3_steps_equal_plain_pytorch_adamw(name, reference, runs, one_rank, two_ranks):
    """1 and 2 ranks, with and without accumulation, with one image a sample and with up to five; validation every 7
    steps (2 ranks) disturbs nothing."""
    result = (one_rank if CURVES[name] == 1 else two_ranks).result(name)
    assert result["code"] == 0, result
    lines = metrics(runs / name)
    losses, norms = reference("several" in name)
    worst = max(abs(lines[n + 1]["loss/total"] - losses[n]) / losses[n] for n in range(STEPS))
    worst_norm = max(abs(lines[n + 1]["optim/grad_norm"] - norms[n]) / norms[n] for n in range(STEPS))
    print(f"{name}: loss {worst:.1e}, gradient norm {worst_norm:.1e} (relative, worst of {STEPS} steps)")
    assert worst < 1e-4 and worst_norm < 1e-3
    assert losses[-1] < losses[0] - 0.3, "the oracle itself must have learnt something"


def test_rows_are_the_same_for_one_and_two_ranks(one_rank, two_ranks, data, tmp_path):
    cfg = small(data, tmp_path, STEPS)
    tokenizer = load_tokenizer(cfg.tokenizer)
    indexes = index_sources(cfg, tokenizer)
    plan = batch_plan(cfg, 1)
    halves = [two_ranks.result("ranks2-gas2", rank)["hashes"] for rank in (0, 1)]
    with StepLoader(
        cfg, build_plan(cfg, indexes, plan, tokenizer), indexes, tokenizer, dp_rank=0, dp_world_size=1, batch_plan=plan
    ) as steps:
        for number in range(1, STEPS + 1):
            (batch,) = next(steps).micro_batches
            assert rows_hash([batch]) == one_rank.result("ranks1-gas4")["hashes"][str(number)]
            rows = list(batch.provenance)
            assert [rows_hash(rows[:2]), rows_hash(rows[2:])] == [half[str(number)] for half in halves]


# -- conditional compute ---------------------------------------------------------------------------


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_every_presence_of_kinds_on_two_ranks_gives_the_gradients_of_one_process(stage, two_ranks):
    for rank in (0, 1):
        result = two_ranks.result(f"presence{stage}", rank)
        assert result["pairs"] == (64 if stage == 3 else 36)
        assert result["loss"] < 1e-5 and result["grad"] < 1e-4, result


def test_without_the_dummy_pass_the_same_check_fails(after_crashes):
    """The negative control: with one rank's picture branch skipped, gloo aborts (NCCL would wait for its timeout)."""
    found = [after_crashes.folder / f"no-dummy.rank{rank}.json" for rank in (0, 1)]
    told = [json.loads(path.read_text()) for path in found if path.exists()]
    assert any(after_crashes.codes) or all("error" in result or result["grad"] > 1e-2 for result in told), (
        after_crashes.codes,
        told,
    )


# -- resume ----------------------------------------------------------------------------------------


def assert_same_run(runs: Path, resumed: str, launches: list[Launch], names: list[str], whole: Launch) -> None:
    expected, found = metrics(runs / "whole"), metrics(runs / resumed)
    assert expected.keys() == found.keys()
    for step, line in expected.items():
        for key, value in line.items():
            if key.startswith(("loss/", "val/", "optim/", "tokens/", "mixture/", "packing/")):
                assert found[step][key] == value, (
                    f"step {step}, {key}: {found[step][key]!r} is not bit-equal to {value!r}"
                )
    for rank in (0, 1):
        resumed_hashes = launches[-1].result(names[-1], rank)["hashes"]
        assert resumed_hashes, "some steps were trained again"
        assert resumed_hashes == {
            step: h for step, h in whole.result("whole", rank)["hashes"].items() if step in resumed_hashes
        }
    assert (
        load_file(runs / "whole/export/model.safetensors").keys()
        == load_file(runs / resumed / "export/model.safetensors").keys()
    )
    for name, tensor in load_file(runs / "whole/export/model.safetensors").items():
        assert torch.equal(tensor, load_file(runs / resumed / "export/model.safetensors")[name]), name


def test_a_run_killed_at_a_random_step_resumes_bit_identical(runs, two_ranks, after_crashes):
    assert after_crashes.result("resumed")["code"] == 0
    (resume,) = events(runs / "killed", "resume")
    print(f"resumed after step {resume['step']}")
    assert_same_run(runs, "killed", [after_crashes], ["resumed"], two_ranks)


def test_a_rank_killed_while_writing_its_shard_leaves_the_previous_checkpoint(runs, two_ranks, after_crashes):
    assert after_crashes.result("resumed-saving")["code"] == 0
    (resume,) = events(runs / "killed-saving", "resume")
    assert resume["step"] == 4, "step 6's checkpoint was never completed"
    assert_same_run(runs, "killed-saving", [after_crashes], ["resumed-saving"], two_ranks)


def test_retention_keeps_the_last_two(runs, two_ranks):
    two_ranks.result("whole")
    folder = runs / "whole" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_0000006", "step_0000008"]
    assert (folder / "latest").read_text() == "step_0000008\n"


def test_sigterm_on_one_rank_saves_and_all_exit_with_143(runs, two_ranks):
    assert two_ranks.codes == [143, 143], two_ranks.errors[0][-3000:]
    assert (runs / "stopped" / "checkpoints" / "latest").read_text() == "step_0000003\n"
    assert not (runs / "stopped" / "export").exists()
    (stop,) = events(runs / "stopped", "stop")
    assert stop["reason"] == "signal SIGTERM" and stop["exit_code"] == 143
    assert json.loads((runs / "stopped" / "status.json").read_text())["state"] == "stopped_by_signal"


# -- stages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", (2, 3))
def test_a_stage_starts_from_exactly_the_tensors_of_the_export_before(stage, runs, after_crashes):
    assert after_crashes.result(f"stage{stage}")["code"] == 0
    exported = load_file(runs / f"stage{stage - 1}" / "export" / "model.safetensors")
    started = load_file(runs / f"stage{stage}.start")
    assert exported.keys() == started.keys()
    differ = [name for name, tensor in exported.items() if not torch.equal(tensor, started[name])]
    print(f"stage {stage}: {len(exported)} tensors, {len(differ)} differ")
    assert not differ


def test_training_moves_what_the_stage_lists_and_nothing_else(runs, after_crashes):
    before = load_file(runs / "stage1.start")
    after = load_file(runs / "stage1" / "export" / "model.safetensors")
    moved = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"aligner", "generation_embeddings", "generation_aligner", "generation_head"}


def test_transformers_loads_the_export_with_every_key_accounted_for(runs, after_crashes):
    from transformers import JanusForConditionalGeneration

    after_crashes.result("stage3")
    _, report = JanusForConditionalGeneration.from_pretrained(runs / "stage3" / "export", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]


def test_a_checkpoint_without_the_frozen_weights_resumes_from_the_input_weights(runs, after_crashes):
    assert [after_crashes.result(name)["code"] for name in ("split-1", "split-2", "unsplit")] == [0, 0, 0]
    manifest = json.loads((runs / "split" / "checkpoints" / "step_0000004" / "manifest.json").read_text())
    assert manifest["with_frozen"] is False
    split, whole = metrics(runs / "split"), metrics(runs / "unsplit")
    for step in (3, 4):
        assert (split[step]["loss/total"], split[step]["optim/grad_norm"]) == (
            whole[step]["loss/total"],
            whole[step]["optim/grad_norm"],
        )


# -- stop rules and proofs -------------------------------------------------------------------------


def test_the_freeze_proof_is_stored_and_names_both_kinds_of_leak(runs, one_rank):
    written = one_rank.result("leak-write")
    assert (
        written["error"] == "FreezeProofError"
        and "1 frozen parameter(s) changed in step 1: model.vision_model." in written["message"]
    )
    skipped = one_rank.result("leak-skip")
    assert (
        skipped["error"] == "FreezeProofError" and "got no gradient in some micro-batch of step 1" in skipped["message"]
    )
    assert events(runs / "leak-write", "failed")[0]["error"] == "FreezeProofError"
    (proof,) = events(runs / "ranks1-gas4", "freeze_proof")
    assert proof["gradients_per_parameter"] == 4 and proof["frozen_parameters"] > 0
    manifest = json.loads((runs / "ranks1-gas4" / "checkpoints" / f"step_{STEPS:07d}" / "manifest.json").read_text())
    assert manifest["freeze_proof"]["frozen_checksum"] == proof["frozen_checksum"] == manifest["frozen_checksum"]


def test_the_frozen_checksum_does_not_depend_on_the_number_of_ranks(runs, one_rank, two_ranks):
    one_rank.result("ranks1-gas4"), two_ranks.result("ranks2-gas2")
    proofs = [events(runs / name, "freeze_proof")[0] for name in ("ranks1-gas4", "ranks2-gas2")]
    assert proofs[0]["frozen_checksum"] == proofs[1]["frozen_checksum"]


def test_an_error_of_one_ranks_data_is_raised_by_all_ranks_at_the_same_step(two_ranks):
    for rank in (0, 1):
        result = two_ranks.result("data-error", rank)
        assert (
            result["error"] == "DataError" and result["exit_code"] == 3 and "x.tar: cannot be read" in result["message"]
        )
        assert list(result["hashes"]) == ["1"]


def test_undecodable_pictures_are_named_in_the_ledger_and_counted_once(runs, two_ranks):
    assert two_ranks.result("skips")["code"] == 0
    named = [json.loads(line) for line in (runs / "skips" / "ledger.jsonl").read_text().splitlines()]
    counted = sum(line["data/skipped"] for line in metrics(runs / "skips").values())
    assert (
        named and counted == len(named) == json.loads((runs / "skips" / "status.json").read_text())["skipped_documents"]
    )
    assert {line["key"] for line in named} <= {"g0003", "g0008"}


def test_one_non_finite_step_is_skipped_and_logged_with_its_rows(runs, one_rank):
    assert one_rank.result("nan-once")["code"] == 0
    (spike,) = events(runs / "nan-once", "spike")
    report = json.loads((Path(spike["dump"]) / "report.json").read_text())
    assert spike["step"] == report["step"] == 2 and [row["row"] for row in report["rows"]] == [0, 1, 2, 3]
    lines = metrics(runs / "nan-once")
    assert lines[2]["loss/total"] is None and lines[3]["loss/total"] > 0 and lines[6]["optim/grad_norm"] < 100
    assert json.loads((runs / "nan-once" / "status.json").read_text())["skipped_steps"] == 1


def test_three_non_finite_steps_in_a_row_stop_the_run(runs, one_rank):
    result = one_rank.result("nan-thrice")
    assert result["exit_code"] == 1 and "3 updates in a row were left out" in result["message"]
    assert [event["step"] for event in events(runs / "nan-thrice", "spike")] == [2, 3, 4]
    assert json.loads((runs / "nan-thrice" / "status.json").read_text())["state"] == "failed"


def test_an_early_stop_saves_exports_marks_its_reason_and_exits_0(runs, one_rank):
    assert one_rank.result("early")["code"] == 0
    (stop,) = events(runs / "early", "stopped_early")
    assert stop["step"] == 2 and "early_stop.at_step 2 of 6" in stop["reason"]
    assert json.loads((runs / "early" / "status.json").read_text())["state"] == "stopped_early"
    assert (runs / "early" / "checkpoints" / "step_0000002").is_dir() and (
        runs / "early" / "export" / "model.safetensors"
    ).is_file()


def test_a_finished_run_started_again_returns_0_without_training(runs, one_rank):
    again = one_rank.result("early-again")
    assert again["code"] == 0 and again["hashes"] == {}
    assert json.loads((runs / "early" / "status.json").read_text())["state"] == "stopped_early"


def test_a_run_folder_of_another_configuration_is_refused_with_what_differs(one_rank):
    other = one_rank.result("early-other")
    assert other["error"] == "CheckpointError" and other["exit_code"] == 4
    assert "seed: 7 -> 8" in other["message"]
