"""A rank that trains like tests/engine/worker.py and keeps every micro-batch as the trainer got it. Not a test
module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jp_train.train.session as session
import jp_train.train.trainer as training
from jp_train.data.batch_file import save_batch
from tests.distributed import run_scenarios, serve
from tests.engine import worker


def train(*, keep: str, **arguments: Any) -> dict:
    """worker.train, with the micro-batches of every step saved in `keep` as stepSSS.rankR.microM.safetensors."""
    plain = training.Trainer.train_step

    def step(self, micro_batches, totals, **timing):
        for number, batch in enumerate(micro_batches):
            save_batch(
                batch, Path(keep) / f"step{self.state.step + 1:03d}.rank{worker.rank()}.micro{number}.safetensors"
            )
        return plain(self, micro_batches, totals, **timing)

    training.Trainer.train_step = step
    try:
        return worker.train(**arguments)
    finally:
        training.Trainer.train_step = plain


def run(folder: Path, scenarios: list[dict[str, Any]]) -> int:
    session.leave_process_group = lambda code: None  # the next scenario needs it
    return run_scenarios({"train": train}, folder, scenarios)


if __name__ == "__main__":
    serve(run)
