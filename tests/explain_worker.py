"""A rank that trains like tests/engine/worker.py and keeps every micro-batch as the trainer got it. Not a test module."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
for place in (TESTS / "engine", TESTS):
    sys.path.insert(0, str(place))

import worker  # noqa: E402
from distributed import run_scenarios, serve  # noqa: E402

import jp_train.train as training  # noqa: E402
from jp_train.data.tools.explain import save_batch  # noqa: E402


def train(*, keep: str, **arguments: Any) -> dict:
    """worker.train, with the micro-batches of every step saved in `keep` as stepSSS.rankR.microM.safetensors."""
    plain = training.Trainer.train_step

    def step(self, micro_batches, totals, **timing):
        for number, batch in enumerate(micro_batches):
            save_batch(batch, Path(keep) / f"step{self.state.step + 1:03d}.rank{worker.rank()}.micro{number}.safetensors")
        return plain(self, micro_batches, totals, **timing)

    training.Trainer.train_step = step
    try:
        return worker.train(**arguments)
    finally:
        training.Trainer.train_step = plain


def run(folder: Path, scenarios: list[dict[str, Any]]) -> int:
    training.leave_process_group = lambda code: None  # the next scenario needs it
    return run_scenarios({"train": train}, folder, scenarios)


if __name__ == "__main__":
    serve(run)
