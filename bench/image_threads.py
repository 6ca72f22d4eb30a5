"""Images in threads inside a worker beside more workers: wall and CPU time and memory an image, in one run.

    python bench/image_threads.py [--rounds 5] [--samples 2400] [--json] [--save FILE]

Loaders of W worker processes x T threads (`data.workers`, `data.image_threads`) work in turn on the same images, A B
A B ...; each ratio is to 1 x 1 within a round (medians). CPU is user and system time of the process and its workers;
memory is what a worker has for itself (unique set), the sum over workers. "photos": 640 x 480 JPEG; "large": 2048 x
1536. The files are those of bench/data.py.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loaders.sides import Side

    from jp_train.config.schema import TokenizerConfig

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
CACHE = Path(__file__).resolve().parent.parent / ".cache" / "bench"
WORKLOADS = {"photos": ("photos-*.tar", 112), "large": ("large-*.tar", 28)}
"""Shards, and images of one round."""
SETTINGS = ((0, 1), (0, 2), (1, 1), (1, 2), (2, 1))
"""Workers (0: none, the images are decoded in the trainer), threads in each."""


def measure(shards: str, images: int, tokenizer: TokenizerConfig, rounds: int) -> list[dict[str, Any]]:
    """A figure for each of SETTINGS."""
    from loaders.sides import Ours, config

    sides = {
        setting: Ours(config(CACHE / "data", shards, tokenizer, workers=setting[0], image_threads=setting[1]))
        for setting in SETTINGS
    }
    spent: dict[tuple[int, int], list[tuple[float, float]]] = {setting: [] for setting in SETTINGS}
    for number in range(rounds + 1):
        for setting in SETTINGS if number % 2 else SETTINGS[::-1]:
            side = sides[setting]
            cpu_before, began = cpu_seconds(side), time.perf_counter()
            done, _ = side.advance(images)
            if number:
                spent[setting].append(((cpu_seconds(side) - cpu_before) / done, (time.perf_counter() - began) / done))
    figures = []
    for setting, side in sides.items():
        cpu, wall = zip(*spent[setting], strict=True)
        base = spent[1, 1]
        figures.append(
            {
                "workers": setting[0],
                "threads": setting[1],
                "cpu_ms": 1000 * statistics.median(cpu),
                "wall_ms": 1000 * statistics.median(wall),
                "cpu_over_1x1": statistics.median(here / other[0] for here, other in zip(cpu, base, strict=True)),
                "wall_over_1x1": statistics.median(here / other[1] for here, other in zip(wall, base, strict=True)),
                "workers_mib": sum(process.memory_full_info().uss for process in side.processes()) / 2**20,
            }
        )
        side.close()
    return figures


def cpu_seconds(side: Side) -> float:
    """User and system time of this process and the side's workers, so far."""
    return time.process_time() + sum(sum(process.cpu_times()[:2]) for process in side.processes())


def main() -> None:
    from _figures import add_options, delivered

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2400, help="samples made (default 2400)")
    parser.add_argument("--rounds", type=int, default=5)
    add_options(parser)
    arguments = parser.parse_args()

    import torch
    from loaders.samples import prepare

    torch.set_num_threads(1)
    tokenizer = prepare(CACHE / "data", arguments.samples)
    tables = {
        kind: measure(shards, images, tokenizer, arguments.rounds) for kind, (shards, images) in WORKLOADS.items()
    }
    if delivered(arguments, {"rounds": arguments.rounds, **tables}):
        return
    for kind, figures in tables.items():
        print(
            f"{kind}   workers x threads   CPU ms   wall ms an image   over 1 x 1: "
            "CPU   wall   own memory of the workers, MiB"
        )
        for figure in figures:
            print(
                f"  {figure['workers']:16} x {figure['threads']:<7} {figure['cpu_ms']:8.1f} {figure['wall_ms']:9.1f} "
                f"{figure['cpu_over_1x1']:27.3f} {figure['wall_over_1x1']:6.3f} {figure['workers_mib']:20.0f}"
            )


if __name__ == "__main__":
    main()
