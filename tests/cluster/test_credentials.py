"""Credentials of object stores in a host's memory; over ssh to ranks and probes: tests/multinode."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path

import pytest

from jp_train.cluster import credentials
from jp_train.cluster.credentials import file_of, hand_over, received

GIVEN = {"AWS_SECRET_ACCESS_KEY": 'a/b+c="d" $x\n', "HF_TOKEN": "hf_模型"}


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(credentials, "MEMORY", tmp_path)
    return tmp_path


def stored(path: Path) -> int:
    """Run on this host what ssh runs on another."""
    argv = ["sh", "-c", credentials._STORE, "sh", str(path)]
    return subprocess.run(argv, input=json.dumps(GIVEN), text=True, stderr=subprocess.DEVNULL, check=False).returncode


def test_a_rank_gets_every_value_unchanged_from_a_file_that_only_this_user_reads(memory: Path) -> None:
    assert received("launch") == {}
    for _ in range(2):  # hosts that share their memory store it twice
        assert stored(file_of("launch")) == 0
    assert received("launch") == GIVEN and received("another") == {}
    assert [path.name for path in memory.iterdir()] == ["jp_train-launch"]
    assert stat.S_IMODE(file_of("launch").stat().st_mode) == 0o600


def test_a_file_that_another_user_has_laid_there_is_not_believed(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stored(file_of("launch")) == 0
    another = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: another)
    assert received("launch") == {}


def test_a_host_that_does_not_take_them_is_named_with_the_cause_and_no_value() -> None:
    failed = hand_over(["no-such-host.invalid"], "launch", GIVEN)
    assert list(failed) == ["no-such-host.invalid"] and "no-such-host.invalid" in failed["no-such-host.invalid"]
    assert not any(value in str(failed) for value in GIVEN.values())
