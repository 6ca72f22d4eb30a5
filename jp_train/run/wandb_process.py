"""The process that hands a run's metrics.jsonl to wandb: `python -m jp_train.run.wandb_process`, started by
`wandb_sink.Wandb`.

wandb is not in the training process because nothing of it may reach training: a server that does not answer, pages of
traceback, threads, exit hooks that wait for an upload. Here each of its calls has an end (SIGALRM, which needs no help
of Python). stdin: one line of JSON, the `Task`; a second line says that the run has ended. stdout: JSON lines,
`{"pid": N}`, `{"started": FOLDER}`, perhaps `{"refused": REASON}`, then one of `{"finished": true}`,
`{"unsent": REASON}`, `{"failed": REASON}`. What wandb prints goes to stderr, a file open for reading.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import sys
import traceback
from typing import TYPE_CHECKING, Any, BinaryIO, TypedDict

if TYPE_CHECKING:
    from wandb import Run

GRACE_S = 10
"""Seconds after which a call of wandb that should have ended is ended by force."""
POLL_S = 1.0
"""Seconds between two looks at metrics.jsonl."""


REFUSED = "its server takes no more of this run"
GIVES_UP = b"Some run data will not be synced"
"""What wandb prints when a server refuses the curves of a run that it took at the start."""


class Task(TypedDict):
    """What is handed over, and how long that may take."""

    metrics: str
    """metrics.jsonl."""
    offset: int
    """Its bytes that wandb has from earlier attempts."""
    init: dict[str, Any]
    """Arguments of `wandb.init`."""
    init_s: int
    """Seconds that a server has to answer at the start."""
    finish_s: int
    """Seconds that the end of a run waits for what is not uploaded yet."""


def main() -> None:
    """Feed wandb until the run has ended or the training process is gone."""
    training = os.getppid()
    if os.fork():
        # launchers end all processes below a rank while it saves: this one and wandb's own are not below it any more
        os._exit(0)
    answers = os.dup(1)
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # the training process is gone
            os.write(answers, json.dumps(values).encode() + b"\n")

    try:
        answer(pid=os.getpid())
        with open(0, "rb", buffering=0, closefd=False) as orders:
            task: Task = json.loads(orders.readline())
            printed = os.fstat(2).st_size
            run = start(task, training)
            answer(started=run.settings.sync_dir)
            with open(task["metrics"], "rb") as metrics:
                metrics.seek(task["offset"])
                ended = over = refused = False
                while not over:
                    over = not os.path.exists(f"/proc/{training}")  # before `feed`, which then has its last line too
                    if not over and select.select([orders], [], [], POLL_S)[0]:
                        ended, over = orders.readline() == b"end\n", True
                    feed(run, metrics)
                    if not refused and gave_up(printed):
                        refused = True
                        answer(refused=REFUSED)
        signal.alarm(task["finish_s"] + GRACE_S)
        try:
            run.finish(exit_code=0 if ended else 1)
        except TimeoutError as error:
            answer(unsent=str(error))
        else:
            answer(**{"unsent": REFUSED} if gave_up(printed) and not refused else {"finished": True})
    except Exception as error:
        answer(failed=f"{type(error).__name__}: {error}")
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # without wandb's exit hook, which goes on waiting; its own process ends with this one


def start(task: Task, training_process: int) -> Run:
    """`wandb.init` for a run whose use of the machine is that of `training_process`."""
    import wandb

    signal.alarm(task["init_s"] + GRACE_S)
    run = wandb.init(
        **task["init"],
        settings=wandb.Settings(
            silent=True,
            console="off",
            save_code=False,
            init_timeout=task["init_s"],
            finish_timeout=task["finish_s"],
            finish_timeout_raises=True,
            x_stats_pid=training_process,
        ),
    )
    signal.alarm(0)
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    return run


def gave_up(since: int) -> bool:
    """wandb has said so on stderr, after its first `since` bytes."""
    return GIVES_UP in os.pread(2, os.fstat(2).st_size - since, since)


def feed(run: Run, metrics: BinaryIO) -> None:
    """Log the whole lines that were added to the file."""
    for line in metrics:
        if not line.endswith(b"\n"):
            metrics.seek(-len(line), os.SEEK_CUR)
            return
        run.log({key: math.nan if value is None else value for key, value in json.loads(line).items()})


if __name__ == "__main__":
    main()
