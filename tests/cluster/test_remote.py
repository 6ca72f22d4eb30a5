"""Commands on hosts: what ssh is given, how its failures are told apart, and that nothing stays when time is over or
a person interrupts."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jp_train.cluster.remote import REMEDIES, Cause, classify, command_for, run_on_hosts
from jp_train.errors import LaunchError


def alive(mark: str) -> list[str]:
    """Command lines of this machine's processes that contain `mark`."""
    alive = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if mark in line:
                alive.append(line)
    return alive


def wait_until_gone(mark: str) -> list[str]:
    deadline = time.monotonic() + 5
    while (left := alive(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def test_every_word_reaches_the_remote_shell_quoted(tmp_path: Path) -> None:
    words = ["printf", "%s|", "a b", "$HOME", "`id`", "x;y", "it's", '"', "", "\n", "*"]
    command = command_for("node1", words, cwd=str(tmp_path), env={"A": "1 $B"}, limit_s=5)
    assert command[-3:-1] == ["--", "node1"] and "BatchMode=yes" in command
    # what the remote shell does with it
    done = subprocess.run(["sh", "-c", command[-1]], capture_output=True, text=True, check=True)
    assert done.stdout == "".join(f"{word}|" for word in words[2:])


def test_the_remote_command_runs_in_the_folder_with_the_variables(tmp_path: Path) -> None:
    command = command_for("node1", ["sh", "-c", "echo $A; pwd"], cwd=str(tmp_path), env={"A": "x y"})
    done = subprocess.run(["sh", "-c", command[-1]], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["x y", str(tmp_path)]


@pytest.mark.parametrize("name", ["-oProxyCommand=id", "a b", "a;b", "", "a$(id)", "me@-oX", "a@b@c", "a\n"])
def test_a_host_name_that_could_be_an_option_or_shell_text_is_rejected(name: str) -> None:
    with pytest.raises(LaunchError, match="is none"):
        command_for(name, ["true"])


def test_words_for_ssh_come_before_ours_and_a_user_and_an_ipv6_address_are_hosts() -> None:
    for host in ("me@node1", "fd00::1"):
        command = command_for(host, ["true"], ssh_args=["-p", "2222", "-o", "BatchMode=no"])
        assert command[:6] == ["ssh", "-T", "-p", "2222", "-o", "BatchMode=no"]
        assert command[-3:] == ["--", host, "exec true"]


def test_a_variable_that_is_no_name_is_rejected() -> None:
    with pytest.raises(LaunchError, match="is not a name"):
        command_for("node1", ["true"], env={"A;id": "1"})


@pytest.mark.parametrize(
    ("stderr", "cause"),
    [
        ("ssh: Could not resolve hostname x: Name or service not known", Cause.UNKNOWN_HOST),
        ("ssh: connect to host x port 22: Connection refused", Cause.REFUSED),
        ("ssh: connect to host x port 22: No route to host", Cause.NO_ROUTE),
        ("ssh: connect to host x port 22: Connection timed out", Cause.NO_ANSWER),
        ("Connection timed out during banner exchange\nConnection to 10.0.0.2 port 22 timed out", Cause.HUNG),
        ("@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.", Cause.KEY_CHANGED),
        (
            "No ED25519 host key is known for x and you have requested strict checking.\nHost key verification failed.",
            Cause.KEY_UNKNOWN,
        ),
        ("root@x: Permission denied (publickey).", Cause.LOGIN),
        ("kex_exchange_identification: Connection closed by remote host", Cause.LOST),
    ],
)
def test_failures_of_ssh_are_distinguished(stderr: str, cause: Cause) -> None:
    assert classify(255, stderr) is cause
    assert classify(1, stderr) is None  # the command's own failure, whatever it prints


def test_every_cause_has_a_remedy() -> None:
    assert set(REMEDIES) == set(Cause)


def test_an_unknown_host_name_gets_its_cause_and_a_remedy_with_its_name() -> None:
    answer = run_on_hosts(["no-such-host.invalid"], ["true"], timeout_s=10)["no-such-host.invalid"]
    assert answer.cause is Cause.UNKNOWN_HOST and not answer.ok and "no-such-host.invalid" in answer.remedy


def test_answers_carry_output_and_code_and_keep_the_order_of_the_hosts() -> None:
    names = [f"h{number}" for number in range(9)]
    answers = run_on_hosts(names, ["sh", "-c", "cat; printf hello; echo oops >&2; exit 3"], timeout_s=20, local=names)
    assert list(answers) == names
    assert {(a.returncode, a.stdout, a.stderr, a.cause, a.ok) for a in answers.values()} == {
        (3, "hello", "oops\n", None, False)
    }


def test_a_command_past_its_time_is_ended_with_its_children() -> None:
    mark = f"61{os.getpid()}"
    answer = run_on_hosts(
        ["here"], ["sh", "-c", f"trap '' TERM; sleep {mark} & sleep {mark}"], timeout_s=0.5, local=["here"]
    )["here"]
    assert answer.cause is Cause.TIMEOUT and "time-out" in answer.summary
    assert wait_until_gone(f"sleep {mark}") == []


def test_the_remote_side_ends_too_when_only_the_local_ssh_is_killed() -> None:
    mark = f"62{os.getpid()}"
    command = command_for("node1", ["sleep", mark], limit_s=0.3)
    # stands for the shell on the host: nobody kills it
    remote = subprocess.Popen(["sh", "-c", command[-1]], start_new_session=True)
    assert remote.wait(10) == 124 and alive(f"sleep {mark}") == []


def test_an_interrupt_ends_what_runs_and_starts_no_more() -> None:
    mark = f"63{os.getpid()}"
    code = (
        "from jp_train.cluster.remote import run_on_hosts\n"
        f"run_on_hosts([f'h{{n}}' for n in range(70)], ['sleep', '{mark}'], timeout_s=60, "
        f"local=[f'h{{n}}' for n in range(70)])"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 20
    while not alive(f"sleep {mark}") and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert "KeyboardInterrupt" in stderr
    assert wait_until_gone(f"sleep {mark}") == []


def test_no_ssh_here_is_a_cause_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    answer = run_on_hosts(["node1"], ["true"], timeout_s=5)["node1"]
    assert answer.cause is Cause.NO_SSH and "openssh-client" in answer.remedy


def test_what_was_found_is_one_line_with_the_last_words_of_the_host() -> None:
    answer = run_on_hosts(
        ["here"], ["sh", "-c", "echo first >&2; echo last >&2; exit 4"], timeout_s=20, local=["here"]
    )["here"]
    assert (
        answer.summary.startswith("exit code 4 after ")
        and answer.summary.endswith(": last")
        and shlex.split(answer.summary)
    )
