"""A short chaos campaign (`make chaos` runs the long one): real ranks, real kills, and nothing lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.campaign import Campaign
from tests.chaos.host_faults import HOST_FAULTS

ROOT = Path(__file__).resolve().parents[2]

KINDS = (
    "kill_a_rank,kill_during_a_save,sigterm_to_all,flip_a_byte_of_a_checkpoint,change_the_world_size,fill_the_disk,"
    "truncate_a_shard"
)


@pytest.fixture(scope="module")
def campaign(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("chaos")
    options = [
        "--faults",
        "6",
        "--steps",
        "10",
        "--seed",
        "5",
        "--minutes",
        "15",
        "--collective-timeout",
        "45",
        "--out",
        str(out),
        "--kinds",
        KINDS,
        "--json",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos.run", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.strip(), done.stderr[-4000:]
    return json.loads(done.stdout) | {"exit_status": done.returncode, "log": done.stderr}


def test_a_campaign_of_faults_loses_repeats_and_hangs_nothing(campaign) -> None:
    assert campaign["problems"] == [], campaign["log"][-4000:]
    assert campaign["exit_status"] == 0
    assert campaign["faults_tried"] == campaign["faults_survived"] >= 6
    assert campaign["runs_compared"] >= 1


def test_kinds_that_cannot_be_injected_here_are_named(campaign) -> None:
    injected, impossible = set(campaign["kinds"]), set(campaign["kinds_not_possible_here"])
    assert injected | impossible <= set(KINDS.split(",")) and not injected & impossible
    assert impossible <= {"fill_the_disk"}


def test_every_kind_of_fault_is_dealt_before_one_is_dealt_again(tmp_path) -> None:
    chaos = Campaign(None, tmp_path, None, seed=3, small_disk=tmp_path, marker="x", known=HOST_FAULTS)
    ending = [fault for fault in HOST_FAULTS.values() if fault.ends]
    others = [fault for fault in HOST_FAULTS.values() if not fault.ends]
    dealt = [chaos._next(possible) for possible in (ending, others) for _ in possible]
    assert sorted(fault.name for fault in dealt) == sorted(HOST_FAULTS)


def test_a_campaign_notices_a_run_that_lost_a_step_or_trained_other_rows(tmp_path) -> None:
    lines = [{"step": n, "loss/total": 5.0 - n, "data/rows_digest": 100.0 + n} for n in (1, 2, 3)]

    def problems(entries: list[dict], *, same_world: bool = True) -> list[str]:
        run = tmp_path / "run"
        run.mkdir(exist_ok=True)
        (run / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        chaos = Campaign(None, tmp_path, None, seed=0, small_disk=None, marker="x")
        chaos._compare(
            0,
            run,
            tmp_path,
            {line["step"]: {k: v for k, v in line.items() if k != "step"} for line in lines},
            same_world=same_world,
        )
        return chaos.outcome.run_problems

    assert problems(lines) == []
    assert "missing" in problems(lines[:2])[0]
    assert "twice" in problems([*lines, lines[1]])[0]
    assert "rows_digest" in problems([lines[0], {**lines[1], "data/rows_digest": 7.0}, lines[2]], same_world=False)[0]
    nearly = [lines[0], {**lines[1], "loss/total": 3.0001}, lines[2]]
    assert problems(nearly, same_world=False) == [] and "loss/total" in problems(nearly)[0]
    assert "relative" in problems([lines[0], {**lines[1], "loss/total": 3.1}, lines[2]], same_world=False)[0]
