"""Bad steps on real ZeRO-3 ranks: what is skipped, that nothing of it is left, and what is kept for the person who
asks why."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jp_train.data.batch_file import load_batch
from jp_train.engine.forensics import Forensics, block_of
from jp_train.engine.init import Ranks
from jp_train.engine.outliers import UpdateDecision
from jp_train.engine.update_gate import UpdateGate
from jp_train.errors import JpTrainError
from jp_train.types import Kind, Provenance
from tests.distributed import Launch, Nursery
from tests.engine.tiny_run import tiny_run
from tests.model.janus_tiny import pack, random_docs

SMALL = {"model.vision.layers": 1, "model.language.layers": 1, "engine.activation_checkpointing": False}
JUDGED = {"guard.outlier_window": 8, "guard.outlier_action": "skip", **SMALL}


@pytest.fixture(scope="module")
def launch(data, tmp_path_factory) -> tuple[Launch, Path]:
    """All scenarios of this file in one launch of two ranks."""
    folder = tmp_path_factory.mktemp("bad-steps")
    scenarios = [
        {"name": "with", "kind": "gate", "steps": ["1", "2", "nan", "loud", "3", "4"]},
        {"name": "without", "kind": "gate", "steps": ["1", "2", "3", "4"]},
        {"name": "text-after-nan", "kind": "gate", "steps": ["nan", "0"], "dummy": False},
        {"name": "text", "kind": "gate", "steps": ["0"], "dummy": False},
        *({"name": f"lopsided{stage}", "kind": "lopsided", "stage": stage, "steps": 100} for stage in (1, 2, 3)),
        *({"name": f"write{stage}", "kind": "leaked", "stage": stage, "what": "write", "steps": 3, **SMALL}
          for stage in (1, 2, 3)),
        {"name": "optimizer2", "kind": "leaked", "stage": 2, "what": "optimizer", "steps": 3, **SMALL},
        {"name": "spiked", "kind": "spiked", "loud": {"9": 1e4, "11": 1e4}, "steps": 12, "guard.max_dumps": 1,
         "guard.dump_tensors": True, **JUDGED},
    ]  # fmt: skip
    for scenario in scenarios:
        scenario |= {"run_dir": str(folder / scenario["name"]), "data": str(data)}
    with Nursery(Path(__file__).resolve().parent / "guard_worker.py") as nursery:
        return nursery.run(folder / "launch", scenarios, world=2, timeout_s=900), folder


def events(run: Path, name: str) -> list[dict]:
    return [
        event for event in map(json.loads, (run / "events.jsonl").read_text().splitlines()) if event["event"] == name
    ]


def test_a_skipped_step_leaves_weights_moments_and_buffers_as_if_it_had_never_been(launch):
    for rank in (0, 1):
        found, without = launch[0].result("with", rank), launch[0].result("without", rank)
        assert [(action, applied) for _, action, applied in found["verdicts"][2:4]] == [("skip", False)] * 2
        digests = found["digests"]
        assert digests[1] == digests[2] == digests[3], "the skipped steps themselves changed something"
        assert [*digests[:2], *digests[4:]] == without["digests"], "what follows must be bit-equal"
        assert [*found["norms"][:2], *found["norms"][4:]] == without["norms"]
        assert found["left"][2:4] == [0, 0]
        assert len(set(without["digests"])) == 4, "the other steps must have changed something"
    assert launch[0].result("with", 0)["verdicts"][3] == launch[0].result("with", 1)["verdicts"][3], (
        "all ranks decide alike"
    )


def test_a_finite_spike_is_told_with_its_own_norm(launch):
    norms = launch[0].result("with")["norms"]
    assert norms[2] == float("inf") and 1e3 < norms[3] < 1e6


def test_gradients_that_are_not_finite_do_not_come_back_in_a_step_that_does_not_reach_them(launch):
    """Without the pass over empty pictures, text alone leaves the towers' gradient buffers as they are: here
    cleared, not NaN."""
    after, alone = launch[0].result("text-after-nan"), launch[0].result("text")
    assert after["norms"][1] == alone["norms"][0] and after["digests"][1] == alone["digests"][0]


def test_norms_per_block_are_those_of_the_whole_model(launch):
    found = launch[0].result("with")
    blocks = found["blocks"]
    assert blocks == launch[0].result("with", 1)["blocks"]
    assert sum(block["gradients"] ** 2 for block in blocks.values()) ** 0.5 == pytest.approx(
        found["norms"][3], rel=1e-5
    )
    assert {"vision_model.layers.0", "language_model.layers.0", "aligner", "gen_head"} <= blocks.keys()
    whole = launch[0].result("without")["weights"]
    assert whole.keys() == blocks.keys()
    first = launch[0].result("text-after-nan")["blocks"]
    assert all(first[name]["gradients_not_finite"] > 0 for name in first)


def test_a_block_is_a_layer_or_a_module():
    assert block_of("model.language_model.layers.11.mlp.up_proj.weight") == "language_model.layers.11"
    assert block_of("lm_head.weight") == "language_model" and block_of("model.aligner.fc1.bias") == "aligner"


def test_another_deepspeed_without_the_hook_is_refused():
    with pytest.raises(JpTrainError, match="has no _get_norm_groups"):
        UpdateGate(object(), lambda loss, norm: None)


# -- a whole run -----------------------------------------------------------------------------------


def test_a_bad_step_is_dumped_with_rows_losses_and_norms_and_dumps_are_bounded(launch):
    result, run = launch[0].result("spiked"), launch[1] / "spiked"
    assert result["code"] == 0, result
    spikes = events(run, "spike")
    assert [spike["step"] for spike in spikes] == [9, 11]
    assert "loss" in spikes[0]["reason"] and spikes[0]["reason"].endswith("the update was skipped")
    assert spikes[0]["dump"] == str(run / "forensics" / "step_0000009") and "guard.max_dumps 1" in spikes[1]["dump"]
    assert [path.name for path in (run / "forensics").iterdir()] == ["step_0000009"]
    report = json.loads((run / "forensics/step_0000009/report.json").read_text())
    assert report["loss"] > 1e4 and report["action"] == "skip" and report["applied"] is False
    ninth = json.loads((run / "metrics.jsonl").read_text().splitlines()[8])
    assert report["losses"] == {key: value for key, value in ninth.items() if key.startswith("loss/")}
    assert report["usual"]["loss"]["limit"] < report["loss"] and report["losses"]["loss/source/text"] > 0
    assert (
        report["blocks"]["language_model"]["gradients"] > 100 and report["blocks"]["vision_model"]["gradients"] is None
    )
    assert [(row["rank"], row["row"], row["step"]) for row in report["rows"]] == [
        (0, 0, 9),
        (0, 1, 9),
        (1, 2, 9),
        (1, 3, 9),
    ]
    assert json.loads((run / "status.json").read_text())["skipped_steps"] == 2


def test_a_dump_that_cannot_be_written_is_told_and_ends_nothing(tmp_path):
    cfg = tiny_run(Path("unused"), tmp_path)
    cfg.guard.dump_tensors = True
    dumps = Forensics(cfg, Ranks(0, 1, 0, torch.device("cpu")), None, torch.nn.Linear(1, 1), None)
    batch = pack(random_docs(1, [Kind.TEXT]))
    document = Provenance(
        source="s",
        shard="s.tar",
        key="not UTF-8: \udcff",
        kind=Kind.TEXT,
        start=0,
        length=int(batch.document_lengths[0]),
    )
    batch = replace(batch, provenance=((document,),))
    decision = UpdateDecision(9.0, 1.0, "skip", "loss 9")

    path = dumps.dump(3, decision, [batch], {})
    assert isinstance(path, Path)
    report = json.loads((path / "report.json").read_text())
    assert report["rows"][0]["documents"][0]["key"] == document.key, report["rows"]
    tensors = path / "rank_0000_0.safetensors"
    tensors.unlink()
    tensors.mkdir()
    assert "rank 0: cannot write the batch to" in dumps.dump(3, decision, [batch], {}), (
        "the report is written, the tensors are not"
    )
    (tmp_path / "forensics" / "step_0000005").write_text("a file")
    assert "step_0000005 cannot be written" in dumps.dump(5, decision, [batch], {})


def test_the_dumped_rows_are_those_that_were_trained(launch):
    run = launch[1] / "spiked"
    report = json.loads((run / "forensics/step_0000009/report.json").read_text())
    for rank in (0, 1):
        documents = []
        for number in (0, 1):
            batch = load_batch(run / f"forensics/step_0000009/rank_{rank:04d}_{number}.safetensors")
            documents += [document.key for row in batch.provenance for document in row]
        assert documents == [
            document["key"] for row in report["rows"] if row["rank"] == rank for document in row["documents"]
        ]


# -- the freeze, and unequal ranks -----------------------------------------------------------------


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_one_changed_bit_of_a_frozen_weight_on_one_rank_stops_the_run_at_step_1(launch, stage):
    """In stages 1 and 2 of a frozen partition that only rank 1 holds; in stage 3, where the whole model learns, of
    rank 1's VQ tokenizer."""
    for rank in (0, 1):
        result = launch[0].result(f"write{stage}", rank)
        assert result["error"] == "FreezeProofError" and list(result["hashes"]) == ["1"], result
        module = {1: ("model.language_model.", "lm_head."), 2: ("model.vision_model.",), 3: ("model.vqmodel.",)}[stage]
        assert result["message"].startswith(
            tuple(f"1 frozen parameter(s) changed in step 1: {name}" for name in module)
        )


@pytest.mark.parametrize("stage", (2,))
def test_an_optimizer_that_also_holds_a_frozen_weight_stops_the_run_before_step_1(launch, stage):
    result = launch[0].result(f"optimizer{stage}")
    assert (
        result["error"] == "FreezeProofError"
        and "1 frozen parameter(s) are open to training, in the optimizer or by requires_grad: model.vision_model."
        in result["message"]
    )
    assert not events(launch[1] / f"optimizer{stage}", "freeze_proof")


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_a_rank_without_pictures_for_100_steps_has_the_gradients_of_one_process(launch, stage):
    """Rank 0 has three pictures in each of them; real updates; every partition of every gradient, and the norm, in
    16 of the steps."""
    for rank in (0, 1):
        result = launch[0].result(f"lopsided{stage}", rank)
        print(
            f"stage {stage}, rank {rank}: worst of {result['compared']} of 100 steps: "
            f"gradient {result['grad']:.1e}, norm {result['norm']:.1e}"
        )
        assert (result["steps"], result["compared"]) == (100, 16) and result["grad"] < 1e-3 and result["norm"] < 1e-4, (
            result
        )
