"""Optimizer and parameters offloaded to host memory, and a DeepSpeed user's file, on real ZeRO-3 ranks (gloo).

The same six steps: plain; by a file written for transformers' Trainer; offloaded in one go; killed and resumed; with
2, 1, 2 ranks; and with a step that is not finite.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from jp_train.config.deepspeed import with_file
from jp_train.engine.checkpoint.files import step_name
from jp_train.engine.checkpoint.rng import PREFIX
from tests.distributed import Launch, Nursery
from tests.engine.tiny_run import tiny_run

WORKER = Path(__file__).resolve().parent / "elastic_worker.py"
STEPS, ROWS, BAD_STEP = 6, 4, 3
BASE = {
    "kind": "train",
    "stage": 2,
    "steps": STEPS,
    "rows": ROWS,
    "model.vision.layers": 1,
    "model.language.layers": 1,
    "engine.activation_checkpointing": False,
    "compare": True,
}
OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}}


@pytest.fixture(scope="module")
def launches(data, runs) -> dict[str, Launch]:
    """Every launch, by the name of each scenario in it."""
    given = Path(__file__).parents[1] / "config" / "transformers_zero3.json"
    by_file = with_file(tiny_run(data, runs / "file", rows=ROWS), given)

    def run(name: str, raw: dict = OFFLOAD, folder: str = "", until: int = STEPS, **changes) -> dict:
        return {
            **BASE,
            "name": name,
            "data": str(data),
            "run_dir": str(runs / (folder or name)),
            "engine.deepspeed": raw,
            "stage.early_stop.at_step": until,
            **changes,
        }

    plans = {
        "two": (
            2,
            [
                run("plain", {}),
                run("file", by_file),
                run("whole"),
                run("elastic-1", folder="elastic", until=2),
                run("plain-bad", {}, nan_at=[BAD_STEP]),
                run("bad", nan_at=[BAD_STEP]),
            ],
        ),
        "killed": (2, [run("killed", kill_at=5, **{"checkpoint.every_steps": 2})]),
        "one": (1, [run("elastic-2", folder="elastic", until=4)]),
        "back": (2, [run("resumed", folder="killed"), run("elastic-3", folder="elastic")]),
    }
    made = {}
    with Nursery(WORKER) as nursery:
        for name, (world, scenarios) in plans.items():
            launch = nursery.run(runs / f"launch-{name}", scenarios, world=world, timeout_s=900)
            made |= dict.fromkeys([scenario["name"] for scenario in scenarios], launch)
    return made


def curves(run: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss/total"], line["optim/grad_norm"]) for line in lines if "loss/total" in line}


def weights(run: Path, step: int = STEPS) -> dict:
    """Every tensor of a checkpoint of two ranks, masters and moments included."""
    folder = run / "checkpoints" / step_name(step)
    return {
        f"{file.name} {name}": tensor
        for file in sorted(folder.glob("rank_*.safetensors"))
        for name, tensor in load_file(file).items()
        if not name.startswith(PREFIX)  # random states: not all runs are the first of their process
    }


def test_a_file_for_transformers_trainer_trains_as_the_run_without_it(launches, runs):
    assert launches["plain"].result("plain")["code"] == launches["file"].result("file")["code"] == 0
    assert curves(runs / "file") == curves(runs / "plain")
    expected, found = weights(runs / "plain"), weights(runs / "file")
    assert expected.keys() == found.keys() and all(expected[name].equal(found[name]) for name in expected)


def test_an_offloaded_run_equals_the_plain_one_but_for_rounding(launches, runs):
    assert launches["whole"].result("whole")["code"] == 0
    expected, found = curves(runs / "plain"), curves(runs / "whole")
    assert list(found) == list(expected) == list(range(1, STEPS + 1))
    worst = max(abs(a / b - 1) for step in found for a, b in zip(found[step], expected[step], strict=True))
    print(f"worst relative difference of loss and gradient norm: {worst:.1e}")
    assert worst < 1e-6
    assert expected[1][0] - expected[STEPS][0] > 0.01, "something must have been learnt"


@pytest.mark.parametrize("name", ["whole", "resumed", "elastic-1", "elastic-2", "elastic-3"])
def test_slices_in_host_memory_are_what_deepspeed_gathers(name, launches):
    """After training; and in the engine just after a resume."""
    result = launches[name].result(name)
    assert result["held"]["compared"] > 50 and not result["held"]["differ"] and not result["held"]["left over"]
    if result["restored"] is not None:
        assert result["restored"]["compared"] > 50 and not result["restored"]["differ"]
    assert (result["restored"] is None) == (name in ("whole", "elastic-1"))


def test_a_killed_offloaded_run_goes_on_bit_for_bit(launches, runs):
    assert any(code != 0 for code in launches["killed"].codes)
    assert launches["resumed"].result("resumed")["code"] == 0
    assert launches["resumed"].result("resumed")["restored"]["step"] in (2, 4), "the save of step 4 may be under way"
    assert curves(runs / "killed") == curves(runs / "whole")
    expected, found = weights(runs / "whole"), weights(runs / "killed")
    assert expected.keys() == found.keys() and all(expected[name].equal(found[name]) for name in expected)


def test_an_offloaded_run_goes_on_with_another_number_of_ranks(launches, runs):
    for name in ("elastic-1", "elastic-2", "elastic-3"):
        assert launches[name].result(name)["code"] == 0
    expected, found = curves(runs / "whole"), curves(runs / "elastic")
    assert list(found) == list(expected)
    worst = max(abs(a / b - 1) for step in found for a, b in zip(found[step], expected[step], strict=True))
    assert worst < 1e-6


def test_a_bad_step_of_an_offloaded_run_is_left_out_as_in_a_plain_one(launches, runs):
    assert launches["bad"].result("bad")["code"] == launches["plain-bad"].result("plain-bad")["code"] == 0
    expected, found = curves(runs / "plain-bad"), curves(runs / "bad")
    assert list(found) == list(expected)
    assert found[BAD_STEP] == expected[BAD_STEP] == (None, None)
    for step in found.keys() - {BAD_STEP}:
        assert found[step] == pytest.approx(expected[step], rel=1e-6)
    assert found[BAD_STEP + 1] != curves(runs / "whole")[BAD_STEP + 1], "the update was made"
