"""`make gpu-check` on a CPU with tiny models, and that a broken check, or a broken model, fails it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from jp_train.model import attention
from tests.gpu.check import CHECKS, TOTAL_S, Check, main, run_checks
from tests.gpu.findings import Findings
from tests.gpu.scene import ROOT, Scene
from tests.gpu.speed import covered


@pytest.fixture(autouse=True)
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


QUICK = ["attention", "isolation", "profile", "packed_and_padded", "save_restore", "vq", "nan_step"]
"""In the usual order. `make gpu-check`, which CI runs beside the tests, runs all of them on a CPU in 45 s."""


def test_checks_of_each_kind_pass_on_a_cpu_and_stdout_is_their_json_lines() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.gpu.check", "--only", *QUICK]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    lines = lines_of(done.stdout)
    assert [line["name"] for line in lines] == QUICK, done.stderr[-5000:]
    assert [line["faults"] for line in lines if not line["ok"]] == [] and done.returncode == 0, done.stderr[-5000:]
    assert all(line["judged"] and line["measured"].keys() == line["expected"].keys() for line in lines)
    assert f"{len(QUICK)} checks on cpu, 0 failed" in done.stderr


def good(_scene: Scene, findings: Findings) -> None:
    findings.near("figure", 1.0, 1.001, 0.01)


def wrong(_scene: Scene, findings: Findings) -> None:
    findings.at_most("figure", 3.0, 2.0)


def raises(_scene: Scene, findings: Findings) -> None:
    findings.beside("before", 1)
    raise torch.OutOfMemoryError("CUDA out of memory\nand more")


def judges_nothing(_scene: Scene, findings: Findings) -> None:
    findings.beside("figure", float("nan"), 2.0)


def hangs(_scene: Scene, findings: Findings) -> None:
    findings.equal("begun", True, True)
    time.sleep(60)


def test_each_broken_check_has_its_line_and_the_exit_status_is_1(tmp_path: Path) -> None:
    lines = io.StringIO()
    checks = [Check(run, 1) for run in (raises, wrong, judges_nothing, hangs, good)]
    assert run_checks(checks, Scene("tiny", tmp_path), lines) == 1
    found = {line["name"]: line for line in lines_of(lines.getvalue())}
    assert {name: line["faults"] for name, line in found.items()} == {
        "raises": ["OutOfMemoryError: CUDA out of memory"],
        "wrong": ["figure is 3.0, expected <= 2.0"],
        "judges_nothing": ["the check judged nothing"],
        "hangs": ["TimeoutError: not done after 1 s"],
        "good": [],
    }
    assert [line["ok"] for line in found.values()] == [False] * 4 + [True]
    assert found["raises"]["measured"] == {"before": 1}, "what was measured before stays"


def test_the_exit_status_is_0_where_all_pass(tmp_path: Path) -> None:
    assert run_checks([Check(good, 1)], Scene("tiny", tmp_path), io.StringIO()) == 0


def leaks(query: Any, key: Any, value: Any, *_: Any) -> torch.Tensor:
    """All documents as one."""
    return F.scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True)[0].transpose(0, 1)


def not_causal(query: Any, key: Any, value: Any, bounds: torch.Tensor, *_: Any) -> torch.Tensor:
    parts = [x.split(bounds.diff().tolist(), 1) for x in (query, key, value)]
    return torch.cat([F.scaled_dot_product_attention(*qkv).transpose(0, 1) for qkv in zip(*parts, strict=True)])


@pytest.mark.parametrize(("broken", "failing"), [(leaks, {"attention", "isolation"}), (not_causal, {"attention"})])
def test_broken_attention_fails_its_checks(broken: Any, failing: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = io.StringIO()
    monkeypatch.setattr(attention, "_document_loop", broken)
    assert main(["--only", "attention", "isolation"], lines) == 1
    assert {line["name"] for line in lines_of(lines.getvalue()) if not line["ok"]} == failing


def test_the_time_limits_of_all_checks_fit_in_ten_minutes() -> None:
    assert sum(known.limit_s for known in CHECKS) < TOTAL_S <= 600


def test_the_list_names_every_check_with_its_purpose_and_a_misspelt_name_is_answered(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = io.StringIO()
    assert main(["--list"], lines) == 0
    listed = lines.getvalue().splitlines()
    assert [line.split()[0] for line in listed] == [known.name for known in CHECKS]
    assert all(len(line.split()) > 5 for line in listed)
    with pytest.raises(SystemExit) as ended:
        main(["--only", "isolaton"])
    assert ended.value.code == 2 and "isolation" in capsys.readouterr().err


def test_the_true_model_is_refused_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--size", "1b"])
    assert ended.value.code == 2 and "needs a GPU of 80 GB" in capsys.readouterr().err


def test_the_busy_time_is_the_union_of_overlapping_intervals() -> None:
    assert covered([(5, 6), (0, 2), (1, 3), (1.5, 1.7)]) == 4


@pytest.mark.parametrize("measured", [1.1, float("nan"), float("inf")])
def test_a_figure_that_is_not_near_is_a_fault(measured: float) -> None:
    findings = Findings()
    findings.near("figure", measured, 1.0, 0.05)
    assert len(findings.faults) == findings.judged == 1
    json.loads(json.dumps(findings.measured), parse_constant=pytest.fail)
