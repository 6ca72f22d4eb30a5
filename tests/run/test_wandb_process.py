"""What goes from metrics.jsonl to wandb, and when that ends."""

from __future__ import annotations

import os
import select
import signal
import time

import psutil
import pytest

from tests.run.test_wandb_sink import VALUES, opened, troubles, wandb_processes


def test_a_line_that_is_only_half_written_is_logged_when_it_is_whole(server, tmp_path):
    log = opened(tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    with metrics.open("a") as file:
        file.write('{"step": 1, "loss/total": 2.0}\n{"step": 2, "loss')
        file.flush()
        while not server.runs:
            time.sleep(0.1)
        file.write('/total": null}\n')
    log.close()
    (name,) = server.runs
    assert [step for step in server.steps(name) if step] == [1, 2] and troubles(tmp_path) == []
    losses = [values["loss/total"] for values in server.runs[name].values() if values["step"]]
    assert losses[0] == 2.0 and str(losses[1]).lower() == "nan", "null in JSON"


@pytest.mark.parametrize("is_known", [False, True], ids=["at once", "before wandb has started"])
def test_the_curves_of_a_killed_run_are_uploaded_and_nothing_of_it_goes_on(is_known, server, tmp_path):
    run = tmp_path / "run"
    child = os.fork()
    if child == 0:
        log = opened(run)
        log.step(1, VALUES), log.step(2, VALUES)
        if is_known:  # the process has said its number: it knows the training process and is about to start wandb
            select.select([log._sinks[-1]._answers], [], [])
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    while processes := wandb_processes(run):
        psutil.wait_procs(processes, timeout=60)
    assert len(server.runs) == 1, (run / "wandb" / "process.log").read_text()
    (name,) = server.runs
    assert server.steps(name) == [1, 2] and server.exit_codes[name] == 1
