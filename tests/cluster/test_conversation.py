"""The conversation with the probes: answers, noise, silence, ends; with the real probe and with programs that
misbehave."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from jp_train.cluster import conversation as conversation_module
from jp_train.cluster.conversation import MARK, Conversation
from jp_train.cluster.remote import Cause

PROBE = [sys.executable, "-m", "jp_train.cluster.probe"]
ECHO = f"""
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    print("welcome to this host")
    print('{MARK}' + json.dumps({{"id": 0, "answer": "to a question of before"}}))
    print('{MARK}no json')
    print('{MARK}' + json.dumps({{"id": asked["id"], "answer": asked["word"]}}), flush=True)
"""


def talk(argv: list[str], hosts: tuple[str, ...] = ("a", "b"), **options: object) -> Conversation:
    return Conversation(list(hosts), argv, limit_s=60, local=hosts, **options)  # type: ignore[arg-type]


def test_each_host_answers_its_own_question_and_noise_is_left_out() -> None:
    with talk([sys.executable, "-c", ECHO]) as conversation:
        for round_number in range(3):
            answers = conversation.ask({"a": {"word": f"A{round_number}"}, "b": {"word": "B"}}, timeout_s=20, what="x")
            assert {host: said["answer"] for host, said in answers.items()} == {"a": f"A{round_number}", "b": "B"}
            assert abs(answers["a"]["came"] - time.time()) < 5
    assert conversation.lost == {}


def test_a_silent_host_is_lost_and_the_others_go_on() -> None:
    code = ECHO.replace(
        "    asked = json.loads(line)\n",
        "    asked = json.loads(line)\n    if asked['word'] == 'hang': __import__('time').sleep(60)\n",
    )
    with talk([sys.executable, "-c", code]) as conversation:
        answers = conversation.ask({"a": {"word": "hang"}, "b": {"word": "B"}}, timeout_s=3.0, what="the weather")
        assert set(answers) == {"b"} and conversation.hosts == ["b"]
        assert (
            conversation.lost["a"].cause is Cause.TIMEOUT and "asked for the weather" in conversation.lost["a"].summary
        )
        assert set(conversation.ask({"a": {"word": "A"}, "b": {"word": "B"}}, timeout_s=20, what="x")) == {"b"}


def test_a_program_that_ends_is_told_with_its_code_and_last_words() -> None:
    with talk(["sh", "-c", "echo it broke >&2; exit 9"], ("a",)) as conversation:
        assert conversation.ask({"a": {"ask": "clock"}}, timeout_s=20, what="x") == {}
        lost = conversation.lost["a"]
    assert (lost.returncode, lost.cause) == (9, None) and "it broke" in lost.summary


def test_a_python_that_is_not_there_is_told() -> None:
    with talk(["/no/such/python", "-m", "jp_train.cluster.probe"], ("a",)) as conversation:
        conversation.ask({"a": {"ask": "clock"}}, timeout_s=20, what="x")
        assert conversation.lost["a"].returncode == 127 and "/no/such/python" in conversation.lost["a"].stderr


def test_the_end_of_the_conversation_ends_programs_that_do_not_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation_module, "LEAVE_S", 0.3)
    with talk(["sh", "-c", "trap '' TERM HUP; while :; do sleep 0.1; done"]) as conversation:
        pids = [process.pid for process in conversation._processes.values()]
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []


# -- the probe itself ------------------------------------------------------------------------------


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
        told = conversation.ask({"a": {"ask": "listen", "master_port": None}}, timeout_s=30, what="x")["a"]["answer"]
        target = {"a": [told["fabric"]["address"], told["fabric"]["port"], told["greeting"]]}
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
