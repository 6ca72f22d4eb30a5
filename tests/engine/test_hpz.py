"""ZeRO++ secondary partitions (`engine.hpz_partition_size`), as most launch files use them: four real ranks, two
"hosts" of two, against the same run without them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed import Launch, Nursery

WORKER = Path(__file__).resolve().parent / "worker.py"
STEPS = 5


@pytest.fixture(scope="module")
def launches(data, runs) -> dict[str, Launch]:
    def scenario(name: str, **changes) -> dict:
        base = {
            "name": name, "kind": "train", "data": str(data), "run_dir": str(runs / name), "stage": 2, "steps": STEPS,
            "rows": 8, "model.vision.layers": 1, "model.language.layers": 2, "checkpoint.export_at_end": False,
        }  # fmt: skip
        return base | changes

    # `deterministic`, too, changes nothing on a CPU
    hpz = {"engine.hpz_partition_size": 2, "engine.deterministic": True, "checkpoint.every_steps": 2}
    killed = scenario("hpz", kill_at=4, **hpz)
    with Nursery(WORKER) as nursery:
        return {
            name: nursery.run(runs / f"launch-{name}", [one], world=4, timeout_s=300)
            for name, one in (("plain", scenario("plain")), ("killed", killed), ("resumed", scenario("hpz", **hpz)))
        }


def test_secondary_partitions_change_no_loss_and_no_gradient_also_after_a_kill(launches, runs):
    assert launches["plain"].result("plain")["code"] == 0
    assert launches["killed"].codes[1] == -9
    assert launches["resumed"].result("hpz")["code"] == 0
    plain, hpz = (
        {
            line["step"]: (line["loss/total"], line["optim/grad_norm"], line["data/rows_digest"])
            for line in map(json.loads, (runs / name / "metrics.jsonl").read_text().splitlines())
        }
        for name in ("plain", "hpz")
    )
    assert sorted(plain) == list(range(1, STEPS + 1))
    assert hpz == plain
    (resumed,) = (
        event
        for event in map(json.loads, (runs / "hpz" / "events.jsonl").read_text().splitlines())
        if event["event"] == "resume"
    )
    assert resumed["step"] == 2, "the rest was trained from a checkpoint"
