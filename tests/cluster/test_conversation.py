"""The conversation with programs on hosts: answers, noise, silence, ends."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from jp_train.cluster import conversation as conversation_module
from jp_train.cluster.conversation import MARK, Conversation
from jp_train.cluster.remote import Cause

ECHO = f"""
import json, sys
for line in sys.stdin:
    question = json.loads(line)
    print("welcome to this host")
    print('{MARK}' + json.dumps({{"id": 0, "answer": "to a question of before"}}))
    print('{MARK}no json')
    print('{MARK}' + json.dumps({{"id": question["id"], "answer": question["word"]}}), flush=True)
"""


def talk(argv: list[str], hosts: tuple[str, ...] = ("a", "b"), **options: object) -> Conversation:
    return Conversation(list(hosts), argv, limit_s=60, local=hosts, **options)  # type: ignore[arg-type]


def test_each_host_answers_its_own_question_and_noise_is_left_out() -> None:
    with talk([sys.executable, "-c", ECHO]) as conversation:
        for round_number in range(3):
            answers = conversation.ask({"a": {"word": f"A{round_number}"}, "b": {"word": "B"}}, timeout_s=20, what="x")
            assert {host: reply["answer"] for host, reply in answers.items()} == {"a": f"A{round_number}", "b": "B"}
            assert 0 <= time.monotonic() - answers["a"]["came"] < 5
    assert conversation.lost == {}


def test_a_silent_host_is_lost_and_the_others_go_on() -> None:
    code = ECHO.replace(
        "    question = json.loads(line)\n",
        "    question = json.loads(line)\n    if question['word'] == 'hang': __import__('time').sleep(60)\n",
    )
    with talk([sys.executable, "-c", code]) as conversation:
        answers = conversation.ask({"a": {"word": "hang"}, "b": {"word": "B"}}, timeout_s=3.0, what="the weather")
        assert set(answers) == {"b"} and conversation.hosts == ["b"]
        assert (
            conversation.lost["a"].cause is Cause.TIMEOUT and "asked for the weather" in conversation.lost["a"].summary
        )
        assert set(conversation.ask({"a": {"word": "A"}, "b": {"word": "B"}}, timeout_s=20, what="x")) == {"b"}


def test_a_program_that_ends_is_reported_with_its_code_and_last_words() -> None:
    with talk(["sh", "-c", "echo it broke >&2; exit 9"], ("a",)) as conversation:
        assert conversation.ask({"a": {"ask": "clock"}}, timeout_s=20, what="x") == {}
        lost = conversation.lost["a"]
    assert (lost.returncode, lost.cause) == (9, None) and "it broke" in lost.summary


def test_a_python_that_is_not_there_is_reported() -> None:
    with talk(["/no/such/python", "-m", "jp_train.cluster.probe"], ("a",)) as conversation:
        conversation.ask({"a": {"ask": "clock"}}, timeout_s=20, what="x")
        assert conversation.lost["a"].returncode == 127 and "/no/such/python" in conversation.lost["a"].stderr


def test_the_end_of_the_conversation_ends_programs_that_do_not_listen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation_module, "LEAVE_S", 0.3)
    with talk(["sh", "-c", "trap '' TERM HUP; while :; do sleep 0.1; done"]) as conversation:
        pids = [process.pid for process in conversation._processes.values()]
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []
