"""Samples per CPU second of the loader beside a bare loop and beside other loaders, on the same samples, in one run.

    python bench/data.py [--samples 2400] [--rounds 9] [--workers 2] [--quick] [--no-rivals] [--install] [--json]
    [--store] [--save FILE]

Every loader works in turn, A B A B ..., each round on the same number of samples, and a ratio is taken within each
round (the median and the quartiles are shown), because other work on the machine changes a speed by far more than the
loaders differ. CPU is user and system time of the process and its workers. "photos": 640 x 480 JPEG; "ids": VQ ids as
.vq.npy members, no image read; "stored": VQ ids beside the shards of photos, as `jp-train data encode-images` leaves
them; "large": 2048 x 1536 JPEG, also with data.image_decode=fast. The last two are cases that the other loaders do not
have. The bare loop packs nothing and checks nothing: it reads members at known offsets, parses the JSON, tokenises (the
same call), decodes and transforms (the same function). The loader takes the token ids that its index stores, as it does
by default; where no image is decoded, it is shown with data.token_ids=off too, where it tokenises as the others do. The
files are made once, in .cache/bench/data, and lie in the page cache. With `--workers N`, every loader runs N worker
processes, so that moving rows between processes counts too; the bare loop has none. `--store` adds the loader on the
same photographs in a real S3 server on this machine (tests/data/store_server.py), whose own CPU time counts in the wall
time alone.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loaders.rivals import StartRows
    from loaders.sides import Side

    from jp_train.config.schema import TokenizerConfig

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
CACHE = Path(__file__).resolve().parent.parent / ".cache" / "bench"
WORKLOADS = {
    "photos": ("photos-*.tar", 120),
    "ids": ("ids-*.tar", 1200),
    "stored": ("photos-*.tar", 1200),
    "large": ("large-*.tar", 40),
}
"""Shards, and samples of one round."""
WITH_RIVALS = ("photos", "ids")
WITHOUT_TOKEN_IDS = ("ids", "stored")
QUICK_ROUNDS = 3


def measure(sides: list[Side], samples: int, rounds: int) -> list[dict[str, Any]]:
    """Run `sides` in turn, `rounds` times after one round of warming up; figures of each, ratios to the second side."""
    spent: dict[str, list[tuple[float, float, float]]] = {side.name: [] for side in sides}
    for number in range(rounds + 1):
        for side in sides if number % 2 else sides[::-1]:
            cpu, wall = cpu_seconds(side), time.perf_counter()
            done, rows = side.advance(samples)
            cpu, wall = cpu_seconds(side) - cpu, time.perf_counter() - wall
            if number:
                spent[side.name].append((done / cpu, done / wall, rows / wall))
    reference = sides[0].name
    figures = []
    for side in sides:
        ratios = [ours[0] / theirs[0] for ours, theirs in zip(spent[reference], spent[side.name], strict=True)]
        walls = [ours[1] / theirs[1] for ours, theirs in zip(spent[reference], spent[side.name], strict=True)]
        per_cpu, per_wall, rows = (statistics.median(column) for column in zip(*spent[side.name], strict=True))
        low, _, high = statistics.quantiles(ratios, n=4)
        figures.append(
            {
                "loader": side.name,
                "samples_per_cpu_s": per_cpu,
                "samples_per_s": per_wall,
                "rows_per_s": rows,
                "jp_train_over_it_cpu": statistics.median(ratios),
                "jp_train_over_it_cpu_quartiles": [low, high],
                "jp_train_over_it_wall": statistics.median(walls),
            }
        )
    return figures


def cpu_seconds(side: Side) -> float:
    """User and system time of this process and the side's workers, so far."""
    return time.process_time() + sum(sum(process.cpu_times()[:2]) for process in side.processes())


@contextmanager
def photos_in_store() -> Iterator[str]:
    """An S3 server with the photographs; their URL."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from jp_train.data.stores import StoreRanges
    from tests.data.store_server import BUCKET, store_server

    with tempfile.TemporaryDirectory() as folder, store_server(Path(folder)) as server:
        os.environ.update(server.environment(server.direct))
        url, store = f"s3://{BUCKET}/", StoreRanges()
        for path in sorted((CACHE / "data").glob("photos-*.tar")):
            store.write(path, url + path.name)
        yield url


def compare(
    kind: str,
    tokenizer: TokenizerConfig,
    *,
    rounds: int,
    workers: int,
    rivals: dict[str, StartRows],
    store: str | None = None,
) -> list[dict[str, Any]]:
    """One table. `store`: URL where the photographs lie too."""
    from loaders.rivals import Rival
    from loaders.samples import RECIPE
    from loaders.sides import Bare, Ours, config

    from jp_train.config.choices import ImageDecode, TokenIds

    shards, samples = WORKLOADS[kind]
    recipe = RECIPE if kind == "stored" else None
    cfg = config(CACHE / "data", shards, tokenizer, workers=workers)
    sides: list[Side] = [Ours(cfg, recipe=recipe), Bare(cfg, recipe=recipe)]
    if kind == "large":
        sides.append(
            Ours(
                config(CACHE / "data", shards, tokenizer, workers=workers, image_decode=ImageDecode.fast),
                "jp_train, fast decode",
            )
        )
    if store is not None and kind == "photos":
        there = config(CACHE / "data", store + shards, tokenizer, workers=workers, index_dir=str(CACHE / "index"))
        sides.append(Ours(there, "jp_train, from S3"))
    if kind in WITHOUT_TOKEN_IDS:
        tokenising = config(CACHE / "data", shards, tokenizer, workers=workers, token_ids=TokenIds.off)
        sides.append(Ours(tokenising, "jp_train, token_ids=off", recipe=recipe))
    for name, start in rivals.items() if kind in WITH_RIVALS else ():
        try:
            sides.append(Rival(name, cfg, start))
        except Exception as error:  # whatever a foreign loader raises
            print(f"bench: {name} is left out: {type(error).__name__}: {error}", file=sys.stderr)
    gc.collect()
    gc.freeze()
    try:
        return measure(sides, samples * (1 + workers), rounds)
    finally:
        for side in sides:
            side.close()


def main() -> None:
    from _figures import add_options, delivered

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2400, help="samples made (default 2400)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds: a look, not a measurement")
    parser.add_argument(
        "--workers", type=int, default=0, help="worker processes of every loader but the bare loop (default 0)"
    )
    parser.add_argument("--only", choices=WORKLOADS, help="one workload")
    parser.add_argument("--no-rivals", action="store_true", help="only the bare loop")
    parser.add_argument("--store", action="store_true", help="photographs from an S3 server on this machine too")
    parser.add_argument(
        "--install", action="store_true", help=f"fetch Energon and Streaming with pip into {CACHE / 'rivals'} first"
    )
    add_options(parser)
    arguments = parser.parse_args()

    import torch
    from loaders import rivals as others
    from loaders.samples import prepare

    torch.set_num_threads(1)
    if arguments.install:
        try:
            others.install(CACHE / "rivals")
        except subprocess.CalledProcessError as error:
            print(f"bench: pip cannot get the other loaders: {error}", file=sys.stderr)
    tokenizer = prepare(CACHE / "data", arguments.samples)
    rivals = {} if arguments.no_rivals else others.available(CACHE / "rivals")
    rounds = QUICK_ROUNDS if arguments.quick else arguments.rounds
    kinds = [arguments.only] if arguments.only else list(WORKLOADS)
    with photos_in_store() if arguments.store else nullcontext() as store:
        tables = {
            kind: compare(kind, tokenizer, rounds=rounds, workers=arguments.workers, rivals=rivals, store=store)
            for kind in kinds
        }
    if delivered(arguments, {"rounds": rounds, "workers": arguments.workers, **tables}):
        return
    for kind, figures in tables.items():
        print(
            f"{kind}, {arguments.workers} workers     samples/CPU s  samples/s   rows/s   jp_train over it, "
            "CPU (quartiles)    wall"
        )
        for figure in figures:
            low, high = figure["jp_train_over_it_cpu_quartiles"]
            print(
                f"  {figure['loader']:24} {figure['samples_per_cpu_s']:12.1f}  {figure['samples_per_s']:9.1f}  "
                f"{figure['rows_per_s']:7.1f}   "
                f"{figure['jp_train_over_it_cpu']:16.3f} ({low:.3f} - {high:.3f})  "
                f"{figure['jp_train_over_it_wall']:8.3f}"
            )


if __name__ == "__main__":
    main()
