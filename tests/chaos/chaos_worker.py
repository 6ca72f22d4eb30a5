"""What one rank of a chaos campaign does (see tests/distributed.py): the real `jp_train.train.session.train`. Not a
test module."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import deepspeed  # noqa: E402, F401 - imported once, before the ranks are forked

import jp_train.train.session as session  # noqa: E402
import jp_train.train.trainer as training  # noqa: E402
from jp_train.errors import JpTrainError  # noqa: E402
from tests.chaos.chaos_world import World, configuration  # noqa: E402
from tests.distributed import run_scenarios, serve  # noqa: E402


def train(
    *, data: str, tokenizer: str, run_dir: str, steps: int, nan_at: int | None = None, **changes: Any
) -> dict[str, Any]:
    """One life of a run: its exit status. `nan_at`: the step whose loss is made NaN on this rank."""
    cfg = configuration(World(Path(data), Path(tokenizer)), Path(run_dir), steps, **changes)
    plain_loss, plain_step = training.micro_batch_loss, training.Trainer.train_step
    here = {"step": 0}

    def step(self, *args: Any, **kwargs: Any) -> Any:
        here["step"] = self.state.step + 1
        return plain_step(self, *args, **kwargs)

    def loss(*args: Any) -> Any:
        value = plain_loss(*args)
        return value * float("nan") if here["step"] == nan_at else value

    training.micro_batch_loss, training.Trainer.train_step = loss, step
    try:
        return {"exit_code": session.train(cfg)}
    except JpTrainError as error:  # as jp_train.cli.main does
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return {"exit_code": error.exit_code}
    except KeyboardInterrupt:
        return {"exit_code": 130}


def run(folder: Path, scenarios: list[dict[str, Any]]) -> int:
    return run_scenarios({"train": train}, folder, scenarios)


if __name__ == "__main__":
    serve(run)
