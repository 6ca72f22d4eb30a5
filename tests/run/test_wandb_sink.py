"""wandb, online and offline, through its own client and files: its troubles end no run, and no curve is lost."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
import pytest

from jp_train.config import RunConfig, batch_plan
from jp_train.config.schema import WandbConfig, WandbMode
from jp_train.engine.checkpoint.rollback import abandon_after
from jp_train.errors import ConfigError
from jp_train.run import wandb_sink
from jp_train.run.log import RunLog
from jp_train.run.wandb_sink import Wandb, kept_run_id, wandb_mode, without_secrets
from tests.run.wandb_server import KEY

VALUES = {
    "loss/total": 2.0,
    "loss/text": float("nan"),
    "optim/lr": 1e-4,
    "optim/grad_norm": 0.5,
    "packing/fill": 1.0,
    "perf/tokens_per_s": 1.0,
    "time/step_s": 1.0,
    "time/data_wait_s": 0.0,
}


def opened(run: Path, resumed_step: int | None = None, mode: WandbMode = WandbMode.auto) -> RunLog:
    cfg = RunConfig(run_dir=str(run))
    cfg.logging.wandb.mode = mode
    log = RunLog(cfg, active=True, dp_world_size=1)
    log.begin()
    log.open(batch=batch_plan(cfg, 1), resumed_step=resumed_step, checkpoint=None)
    return log


def attempt(run: Path, steps: Iterable[int], resumed_step: int | None = None, mode: WandbMode = WandbMode.auto) -> None:
    log = opened(run, resumed_step, mode)
    for step in steps:
        log.step(step, VALUES)
    log.close()


def troubles(run: Path) -> list[str]:
    if not (run / "events.jsonl").exists():
        return []
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [event["reason"] for event in events if event["event"] == "sink_failed"]


def follow(command: str, run: Path) -> None:
    """Do what the console says."""
    shell = subprocess.run(command, shell=True, cwd=run, capture_output=True, text=True, check=False)
    assert shell.returncode == 0, shell.stderr


def named(trouble: str) -> str:
    """The command in it."""
    return "WANDB_RESUME=allow wandb sync " + trouble.split("WANDB_RESUME=allow wandb sync ")[1]


def wandb_processes(run: Path) -> list[psutil.Process]:
    """What works for a run, found as the operating system knows it: by the files that are open."""
    log = str((run / "wandb" / "process.log").resolve())

    def look() -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            with contextlib.suppress(OSError):
                if os.path.realpath(f"/proc/{process.pid}/fd/2") == log:
                    yield process

    # one that forks and ends while the list of processes is read hides the other: both looks have to be empty
    return list(look()) or list(look())


def test_attempts_online_and_offline_end_in_one_run_with_the_command_that_the_console_names(
    server, tmp_path, monkeypatch, capfd
):
    run = tmp_path / "run"
    attempt(run, range(1, 6))
    (name,) = server.runs
    assert server.steps(name) == [1, 2, 3, 4, 5] and troubles(run) == []
    monkeypatch.setattr(wandb_sink, "INIT_S", 3)
    server.answer = (500, b"<html>Bad gateway</html>")
    attempt(run, range(4, 8), resumed_step=3)
    server.answer = None
    monkeypatch.setattr(wandb_sink, "INIT_S", 20)
    attempt(run, range(8, 10), resumed_step=7)
    (trouble,) = troubles(run)
    follow(named(trouble), run)
    assert list(server.runs) == [name]
    assert server.steps(name) == [1, 2, 3, 4, 5, 8, 9, 4, 5, 6, 7], "appended, and nothing overwritten"
    printed = capfd.readouterr().err
    assert printed.count(named(trouble)) == 1 and "Traceback" not in printed


@pytest.mark.parametrize(
    "answer",
    [(200, b"rubbish"), (401, b'{"errors": [{"message": "invalid api key"}]}'), (410, b"deleted"), threading.Event()],
    ids=["rubbish", "revoked key", "deleted run", "no answer"],
)
def test_a_server_that_refuses_or_does_not_answer_costs_one_line_and_no_value(
    answer, server, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(wandb_sink, "INIT_S", 3)
    server.answer = answer
    run = tmp_path / "run"
    attempt(run, range(1, 4), mode=WandbMode.online)
    if isinstance(answer, threading.Event):
        answer.set()
    server.answer = None
    (trouble,) = troubles(run)
    assert trouble.startswith("wandb is offline (")
    printed = capfd.readouterr().err
    assert printed.count("wandb") == trouble.count("wandb"), "nothing but the line"
    assert "Traceback" not in printed and KEY not in printed + trouble
    follow(named(trouble), run)
    assert [server.steps(name) for name in server.runs] == [[1, 2, 3]]
    for path in run.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def test_without_a_network_the_run_is_offline_and_is_uploaded_afterwards(server, tmp_path):
    if os.geteuid():
        pytest.skip("a namespace without a network needs root")
    run = tmp_path / "run"
    script = (
        "import sys; from pathlib import Path; import jp_train.run.wandb_sink as sink; sink.INIT_S = 3; "
        "from tests.run.test_wandb_sink import attempt; attempt(Path(sys.argv[1]), range(1, 4))"
    )
    command = ["unshare", "--net", sys.executable, "-c", script, str(run)]
    alone = subprocess.run(command, capture_output=True, text=True, check=False)
    assert alone.returncode == 0, alone.stderr
    (trouble,) = troubles(run)
    assert named(trouble) in alone.stderr and "Traceback" not in alone.stderr
    follow(named(trouble), run)
    assert [server.steps(name) for name in server.runs] == [[1, 2, 3]]


@pytest.mark.parametrize("answer", [threading.Event(), (404, b"no such run")], ids=["no answer", "deleted run"])
def test_a_server_that_is_lost_while_training_ends_nothing_and_the_rest_can_be_uploaded(
    answer, server, tmp_path, monkeypatch
):
    monkeypatch.setattr(wandb_sink, "FINISH_S", 3)
    run = tmp_path / "run"
    log = opened(run)
    log.step(1, VALUES)
    while not server.runs:
        log.step(1, VALUES)
    server.answer = answer
    log.step(2, VALUES)
    log.close()
    if isinstance(answer, threading.Event):
        answer.set()
    server.answer = None
    (trouble,) = troubles(run)
    assert trouble.startswith("wandb has not got all (")
    follow(named(trouble), run)
    (name,) = server.runs
    assert server.steps(name)[-1] == 2 and set(server.steps(name)) == {1, 2}


def test_a_launcher_that_ends_all_processes_below_a_rank_ends_no_curve(server, tmp_path):
    run = tmp_path / "run"
    others = psutil.Process().children(recursive=True)  # such as the store that the tests of a process share
    log = opened(run)
    log.step(1, VALUES)
    while not server.runs:
        log.step(1, VALUES)
    wandb = wandb_processes(run)
    assert wandb
    for child in set(psutil.Process().children(recursive=True)) - set(others):
        assert child not in wandb
        child.terminate()
    log.step(2, VALUES)
    log.close()
    (name,) = server.runs
    assert server.steps(name)[-1] == 2 and troubles(run) == []


def test_a_wandb_that_dies_is_followed_by_one_that_writes_the_same_values_offline(server, tmp_path):
    run = tmp_path / "run"
    log = opened(run)
    log.step(1, VALUES)
    while not server.runs:
        log.step(1, VALUES)
    for process in wandb_processes(run):
        process.kill()
    log.step(2, VALUES)
    log.close()
    assert not wandb_processes(run)
    (trouble,) = troubles(run)
    follow(named(trouble), run)
    (name,) = server.runs
    assert set(server.steps(name)) == {1, 2}


def test_a_run_folder_in_which_wandb_can_write_nothing_still_gets_its_metrics(tmp_path, capsys):
    (tmp_path / "wandb").write_text("in the way")
    attempt(tmp_path, [1, 2], mode=WandbMode.offline)
    (trouble,) = troubles(tmp_path)
    assert trouble.startswith("FileExistsError") and "Wandb failed and is off" in capsys.readouterr().err
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_an_offline_run_continues_under_its_id_and_is_uploaded_as_one_curve(server, tmp_path):
    run = tmp_path / "run"
    attempt(run, [1, 2], mode=WandbMode.offline)
    attempt(run, [3], resumed_step=2, mode=WandbMode.offline)
    assert troubles(run) == [] and not server.runs
    kept = (run / "wandb" / "run_id").read_text().strip()
    folders = sorted((run / "wandb").glob("offline-run-*"))
    # not by the folders' names: that of a second one begun in the same second ends in -1
    assert len(folders) == 2 and all((folder / f"run-{kept}.wandb").is_file() for folder in folders)
    follow("WANDB_RESUME=allow wandb sync " + shlex.join(map(str, folders)), run)
    assert server.steps(kept) == [1, 2, 3]


def test_a_run_that_went_back_to_a_checkpoint_begins_its_new_curve_at_the_first_step(server, tmp_path):
    run = tmp_path / "run"
    attempt(run, range(1, 7))
    (run / "checkpoints" / "step_0000006").mkdir(parents=True)
    assert abandon_after(run, 3) is not None
    attempt(run, [4, 5], resumed_step=3)
    attempt(run, [6], resumed_step=5)
    assert [server.steps(name) for name in server.runs] == [[1, 2, 3, 4, 5, 6]] * 2


def test_a_missing_wandb_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb, or set logging.wandb.mode: disabled"):
        Wandb(tmp_path, WandbConfig(), mode="offline", config={}, name="x")


def test_wandb_is_online_only_when_logged_in(tmp_path):
    def mode(**environment: str) -> str:
        return wandb_mode(WandbConfig(), {"HOME": str(tmp_path), **environment})

    assert mode() == "offline"
    assert mode(WANDB_API_KEY="k") == "online"
    assert mode(WANDB_API_KEY="k", WANDB_MODE="disabled") == "disabled"
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password k\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert mode() == "online" and mode(WANDB_BASE_URL="https://wandb.example.org:8080") == "offline"
    (tmp_path / ".netrc").write_text("machine wandb.example.org:8080 login user password k\n")
    assert mode() == "offline" and mode(WANDB_BASE_URL="https://wandb.example.org:8080") == "online"
    (tmp_path / ".netrc").write_text("machine api.forge.coreweave.com login user password k\n")
    assert mode() == "online"
    assert wandb_mode(WandbConfig(mode=WandbMode.disabled), {"WANDB_API_KEY": "k"}) == "disabled"


def test_what_is_sent_to_wandb_has_no_secrets():
    config = {
        "data": {"sources": {"a": {"shards": "https://user:pw@host/x/{0..9}.tar?token=abc", "weight": 1.0}}},
        "tokenizer": {"path": "tok", "bos": "<s>"},
        "engine": {"deepspeed": {"api_key": "k", "auth_token": "t", "max_tokens": 5}},
        "tags": ["ok", "s3://bucket/key"],
    }
    sent = without_secrets(config)
    assert sent["data"]["sources"]["a"]["shards"] == "https://***@host/x/{0..9}.tar?***"
    assert sent["engine"]["deepspeed"] == {"api_key": "***", "auth_token": "***", "max_tokens": 5}
    assert sent["tokenizer"] == config["tokenizer"] and sent["tags"] == config["tags"]


def test_the_wandb_id_is_kept_across_resumes(tmp_path):
    ids = iter(["first", "second"])
    assert [kept_run_id(tmp_path / "run_id", lambda: next(ids)) for _ in range(3)] == ["first"] * 3
