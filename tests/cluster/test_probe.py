"""The probe that preflight runs on every host: its questions, and its end."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from jp_train.cluster.probe import Probe
from jp_train.data.stores import StoreRanges
from tests.cluster.test_conversation import talk
from tests.data.data_samples import text_samples, write_shard
from tests.data.store_server import BUCKET, StoreServer

PROBE = [sys.executable, "-m", "jp_train.cluster.probe"]


def test_a_marker_of_one_host_is_seen_by_another_and_removed(tmp_path: Path) -> None:
    probe, file = Probe(), {"folder": str(tmp_path), "name": "m", "text": "t"}
    assert probe.write_marker(file) == {"folder": str(tmp_path)}
    assert probe.has_marker({**file, "wait_s": 0}) == {"seen": True}
    probe.remove_marker(file)
    assert probe.has_marker({**file, "wait_s": 0}) == {"seen": False}
    assert "error" in probe.write_marker({**file, "folder": "/proc/self/none"})


def test_the_probe_answers_and_names_a_question_that_it_does_not_know() -> None:
    with talk(PROBE, ("a",)) as conversation:
        clock = conversation.ask({"a": {"ask": "clock"}}, timeout_s=30, what="x")["a"]["answer"]
        assert abs(clock["time"] - time.time()) < 10
        unknown = conversation.ask({"a": {"ask": "__init__"}}, timeout_s=30, what="x")["a"]
        assert (
            "does not know the question '__init__'" in unknown["error"]
            and "another version of the code" in unknown["error"]
        )


def test_the_probe_answers_one_question_while_another_one_waits() -> None:
    waits = {"ask": "has_marker", "folder": "/no/such/folder", "name": "x", "text": "y", "wait_s": 30}
    with talk(PROBE, ("a",)) as conversation:
        pipe = conversation._processes["a"].stdin
        assert pipe is not None
        pipe.write(json.dumps({"id": 999, **waits}) + "\n")
        assert "answer" in conversation.ask({"a": {"ask": "clock"}}, timeout_s=20, what="x")["a"]


def test_the_probe_ends_with_its_input_even_while_it_waits_for_something() -> None:
    with talk(PROBE, ("a",)) as conversation:
        process = conversation._processes["a"]
        assert process.stdin is not None
        process.stdin.write(
            json.dumps({"id": 1, "ask": "has_marker", "folder": "/no/such", "name": "x", "text": "y", "wait_s": 60})
            + "\n"
        )
        process.stdin.close()
        assert process.wait(20) == 0


def test_the_probe_ends_by_itself_when_nobody_ends_it() -> None:
    with talk(PROBE, ("a",), env={"JP_TRAIN_PROBE_LIFETIME_S": "1"}) as conversation:
        assert conversation._processes["a"].wait(30) in (-signal.SIGALRM, 128 + signal.SIGALRM)


def test_the_probe_closes_its_ports_before_an_all_reduce_needs_them() -> None:
    with talk(PROBE, ("a",), env={"GLOO_SOCKET_IFNAME": "lo"}) as conversation:
        opened = conversation.ask({"a": {"ask": "listen", "master_port": None}}, timeout_s=30, what="x")["a"]["answer"]
        target = {"a": [opened["fabric"]["address"], opened["fabric"]["port"], opened["greeting"]]}
        reach = {"ask": "reach", "targets": target, "timeout_s": 10}
        assert conversation.ask({"a": reach}, timeout_s=30, what="x")["a"]["answer"] == {"failed": {}}
        conversation.ask({"a": {"ask": "close"}}, timeout_s=30, what="x")
        assert "refused" in conversation.ask({"a": reach}, timeout_s=30, what="x")["a"]["answer"]["failed"]["a"]


def test_what_libraries_print_does_not_spoil_an_answer(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('a library says hello')\n")
    with talk(PROBE, ("a",), env={"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}) as conversation:
        assert "answer" in conversation.ask({"a": {"ask": "clock"}}, timeout_s=30, what="x")["a"]


@pytest.mark.parametrize("ask", ["write_marker", "reach"])
def test_a_question_that_fails_there_is_an_error_and_not_the_end(ask: str) -> None:
    with talk(PROBE, ("a",)) as conversation:
        assert "KeyError" in conversation.ask({"a": {"ask": ask}}, timeout_s=30, what="x")["a"]["error"]
        assert "answer" in conversation.ask({"a": {"ask": "clock"}}, timeout_s=30, what="x")["a"]


def test_a_probe_reads_the_data_of_a_store_with_the_credentials_of_its_question(
    store: StoreServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = write_shard(tmp_path / "a.tar", text_samples(3))
    StoreRanges().write(shard, f"s3://{BUCKET}/probed/a.tar")
    config = tmp_path / "run.yaml"
    source = f"{{kind: text, shards: 's3://{BUCKET}/probed/*.tar'}}"
    mixture = "{understanding: 0, text: 1, generation: 0}"
    config.write_text(
        f"preset: janus_pro_1b/stage2\ndata: {{sources: {{texts: {source}}}}}\nstage: {{mixture: {mixture}}}\n"
    )
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    credentials = {name: os.environ[name] for name in names}
    for name in names:
        monkeypatch.delenv(name)
    question = {"config": str(config), "overrides": [], "number": 0}
    assert "no credentials" in Probe().data(question)["sources"]["texts"]["error"]
    facts = Probe().data({**question, "credentials": credentials})["sources"]["texts"]
    assert facts["shards"] == 1 and facts["read"] > 0 and "error" not in facts
