"""What a checkpoint costs: stall and total time of a save, memory of save, load, export and start, on ZeRO-3 ranks with
a model of about 100M parameters.

    python bench/checkpoint.py [--world 2] [--folder DIR] [--json] [--save FILE]

Stage 2 of a Janus-Pro whose language model holds most weights, bf16 with fp32 master weights. Beside our own save: the
same bytes by plain torch.save (every rank its own file, fsynced), and DeepSpeed's save_checkpoint. Times are of the
slowest rank; the best of `--repeats`. "while training" is a save in the background of matrix products that stand in for
steps: how much slower they get. Memory is the rise of a rank's resident set over what it held before, the largest of
all ranks; the files' pages are not in it. The last lines scale the figures to the 7B model by arithmetic. Nothing is
trained.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from jp_train.config import RunConfig

GIB = 2**30
PHASES = ("start", "first save", "save", "load", "export")


class Peak:
    """The rise of this process's resident set during a block."""

    bytes = 0

    @classmethod
    @contextmanager
    def watched(cls) -> Iterator[Peak]:
        peak, over, process = cls(), threading.Event(), psutil.Process()
        before = process.memory_info().rss

        def watch() -> None:
            while not over.wait(0.005):
                peak.bytes = max(peak.bytes, process.memory_info().rss - before)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield peak
        finally:
            over.set()
            watcher.join()
            peak.bytes = max(peak.bytes, process.memory_info().rss - before)


def configuration(folder: Path) -> RunConfig:
    """About 100M parameters, 90% of them trained."""
    from jp_train.config import RunConfig
    from jp_train.config.choices import BatchUnit, Init, Precision
    from jp_train.config.schema import LanguageConfig, VisionConfig, VQConfig

    cfg = RunConfig(run_dir=str(folder / "run"), precision=Precision.bf16)
    cfg.model.init = Init.random
    cfg.model.vision = VisionConfig(hidden_size=256, layers=6, heads=4, image_size=64, patch_size=16)
    cfg.model.vq = VQConfig(
        codebook_size=4096,
        embed_dim=8,
        base_channels=32,
        channel_multiplier=[1, 1, 1, 1, 2],
        res_blocks=1,
        latent_channels=64,
    )
    cfg.model.language = LanguageConfig(
        hidden_size=768, intermediate_size=2048, layers=8, heads=12, vocab_size=20_000, max_position_embeddings=1024
    )
    cfg.stage.trainable = ["aligner", "language_model", "gen_embed", "gen_aligner", "gen_head"]
    cfg.stage.batch_unit, cfg.stage.batch_size = BatchUnit.packed, 2
    cfg.engine.deepspeed = {
        "zero_optimization": {"reduce_bucket_size": 1_000_000, "stage3_prefetch_bucket_size": 1_000_000}
    }
    return cfg


def as_rank(folder: Path, repeats: int) -> dict[str, Any]:
    """Everything that one rank measures."""
    import torch
    import torch.distributed as dist

    from jp_train.config import batch_plan, dump_config
    from jp_train.engine.checkpoint import partitions
    from jp_train.engine.checkpoint.identity import training_identity
    from jp_train.engine.checkpoint.store import CheckpointStore, Content, Saved
    from jp_train.engine.export import export
    from jp_train.engine.init import build_engine, init_process_group

    torch.set_num_threads(1)
    cfg = configuration(folder)
    ranks = init_process_group(cfg)
    memory: dict[str, int] = {}
    source = folder / "source"
    if not source.exists():
        engine = build_engine(cfg, batch_plan(cfg, ranks.dp_world_size), ranks, n_sources=1, image_token_id=5)
        export(engine, source, tokenizer=None, precision=cfg.precision, config_text="", is_main=ranks.is_main)
        return {"made": True}
    cfg.model.init_from = str(source)
    from jp_train.model import pretrained

    plain_prepare = pretrained.prepare_weights

    def prepare(*args: Any, **options: Any) -> str:
        with Peak.watched() as peak:
            done = plain_prepare(*args, **options)
        memory["start"] = peak.bytes
        return done

    pretrained.prepare_weights = prepare  # the weights' way in alone, without the engine that they fill
    engine = build_engine(cfg, batch_plan(cfg, ranks.dp_world_size), ranks, n_sources=1, image_token_id=5)
    optimizer = engine.deepspeed.optimizer
    partitions._create_moments(optimizer, 1)  # as the first step would, without the data of one

    def content() -> Content:
        return Content(
            tensors=partitions.local_slices(engine.deepspeed, with_frozen=False),
            parameters=partitions.parameters(engine.deepspeed),
            optimizer_step=1,
            with_frozen=False,
            state={},
            identity=training_identity(cfg),
            config_text=dump_config(cfg),
            about={"frozen_from": str(source)},
        )

    def elapsed(action: Callable[[], object]) -> float:
        dist.barrier()
        began = time.perf_counter()
        action()
        mine = torch.tensor([time.perf_counter() - began], dtype=torch.float64)
        dist.all_reduce(mine, dist.ReduceOp.MAX)
        return float(mine)

    def store(**policy: Any) -> CheckpointStore:
        for key, value in {"keep_last": 1, **policy}.items():
            setattr(cfg.checkpoint, key, value)
        return CheckpointStore(
            Path(cfg.run_dir), cfg.checkpoint, dp_rank=ranks.dp_rank, dp_world_size=ranks.dp_world_size
        )

    step = 0
    times: dict[str, list[float]] = {}
    made = store(background=True)
    steps = Steps()
    alone = steps.seconds(2.0)
    beside: list[float] = []

    completed: list[Saved] = []

    def begin(where: CheckpointStore) -> None:
        where.begin(step, content())

    def written() -> bool:
        assert made._pending is not None
        return made._pending.report is not None

    def settle(where: CheckpointStore) -> None:
        saved = where.settle()
        assert saved is not None
        completed.append(saved)

    def both(where: CheckpointStore) -> None:
        begin(where)
        settle(where)

    for repeat in range(repeats + 1):
        step += 1
        with Peak.watched() as peak:
            stall = elapsed(lambda: begin(made))
            beside += steps.until(written)
            elapsed(lambda: settle(made))
        memory["first save" if repeat == 0 else "save"] = peak.bytes
        if repeat:  # the first also makes the buffer
            times.setdefault("stall", []).append(stall)
            times.setdefault("total", []).append(completed[-1].total_s)
        else:
            times["first_stall"] = [stall]
    size = completed[-1].bytes
    blocking = store(background=False)
    for _ in range(repeats):
        step += 1
        times.setdefault("blocking", []).append(elapsed(lambda: both(blocking)))

    def plain() -> None:
        with (folder / f"plain_{ranks.dp_rank}.pt").open("wb") as file:
            torch.save(dict(partitions.local_slices(engine.deepspeed, with_frozen=False)), file)
            file.flush()
            os.fsync(file.fileno())

    for _ in range(repeats):
        times.setdefault("torch_save", []).append(elapsed(plain))
        times.setdefault("deepspeed", []).append(
            elapsed(
                lambda: engine.deepspeed.save_checkpoint(
                    str(folder / "ds"), tag="t", save_latest=False, exclude_frozen_parameters=True
                )
            )
        )
    plain_bytes = (folder / f"plain_{ranks.dp_rank}.pt").stat().st_size
    fresh = store(background=True)
    newest: list[Any] = []
    times["verify"] = [elapsed(lambda: newest.append(fresh.newest()))]

    def load() -> None:
        partitions.partition_gathered(engine.deepspeed)
        fresh.load(newest[0], lambda reader: partitions.fill(engine.deepspeed, reader))
        partitions.gather_persistent(engine.deepspeed)

    with Peak.watched() as peak:
        times["load"] = [elapsed(load)]
    memory["load"] = peak.bytes
    with Peak.watched() as peak:
        out = folder / "export"
        times["export"] = [
            elapsed(
                lambda: export(
                    engine, out, tokenizer=None, precision=cfg.precision, config_text="", is_main=ranks.is_main
                )
            )
        ]
    memory["export"] = peak.bytes
    return {
        "times": {name: min(values) for name, values in times.items()},
        "memory": memory,
        "bytes": size,
        "plain_bytes": plain_bytes,
        "parameters": sum(p.numel for p in partitions.parameters(engine.deepspeed)),
        "trained": sum(p.numel for p in partitions.parameters(engine.deepspeed) if p.trained),
        "largest": max(p.numel for p in partitions.parameters(engine.deepspeed)),
        "checkpoint": str(newest[0].path),
        "step_alone_s": alone,
        "step_beside_s": sum(beside) / len(beside) if beside else None,
    }


class Steps:
    """Matrix products of about 20 ms that stand in for training."""

    def __init__(self) -> None:
        import torch

        self._a = torch.randn(512, 512)
        self._torch = torch

    def timed(self) -> float:
        began = time.perf_counter()
        for _ in range(8):
            self._torch.mm(self._a, self._a)
        return time.perf_counter() - began

    def seconds(self, duration: float) -> float:
        """Mean time of a step."""
        times, end = [], time.perf_counter() + duration
        while time.perf_counter() < end:
            times.append(self.timed())
        return sum(times) / len(times)

    def until(self, done: Callable[[], bool]) -> list[float]:
        times = []
        while not done():
            times.append(self.timed())
        return times


def offline_export(checkpoint: Path, out: Path) -> dict[str, Any]:
    """One process, no process group: the weights of a checkpoint folder into one export."""
    import torch

    from jp_train.model.configuration import build_config
    from jp_train.model.export import write_export
    from jp_train.model.weight_files import open_weights

    with Peak.watched() as peak:
        began = time.perf_counter()
        weights = open_weights(checkpoint)
        config = build_config(configuration(out.parent).model, 5)
        names = weights.keys()  # a method of Weights, which is no mapping
        write_export(out, config, ((name, weights.get(name)) for name in names), None, dtype=torch.bfloat16)
    return {"seconds": time.perf_counter() - began, "peak": peak.bytes}


def launch(folder: Path, world: int, repeats: int) -> list[dict[str, Any]]:
    """Run `as_rank` on `world` processes of this machine; their results by rank. Raises when one fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
    }
    environment |= {"MASTER_PORT": str(port), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, __file__, "--folder", str(folder), "--repeats", str(repeats), "--rank"]
    started = [
        subprocess.Popen(
            [*command, str(rank)], env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=sys.stderr
        )
        for rank in range(world)
    ]
    codes = [process.wait() for process in started]
    if any(codes):
        raise SystemExit(f"a rank failed: exit codes {codes}")
    return [json.loads((folder / f"result_{rank}.json").read_text()) for rank in range(world)]


def at_7b(world: int) -> dict[str, float]:
    """What follows for Janus-Pro-7B, stage 2, by arithmetic: GiB."""
    from jp_train.config import load_config
    from jp_train.model.parameters import parameter_counts

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text("preset: janus_pro_7b/stage2\n")
        cfg = load_config(path)
    counts = parameter_counts(cfg.model)
    trained = sum(counts[name] for name in cfg.stage.trainable)
    largest = cfg.model.language.vocab_size * cfg.model.language.hidden_size
    return {
        "world": world,
        "checkpoint_gib": 12 * trained / GIB,
        "host_copy_per_rank_gib": 12 * trained / world / GIB,
        "largest_tensor_gib": 2 * largest / GIB,
        "export_rank_0_gib": 3 * 2 * largest / GIB,
        "offline_export_gib": (4 + 4 + 2 + 2) * largest / GIB,
    }


def main() -> None:
    from _figures import add_options, delivered

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--repeats", type=int, default=2, help="saves of each kind; the best counts (default 2)")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    add_options(parser)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--offline", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        result = as_rank(arguments.folder, arguments.repeats)
        (arguments.folder / f"result_{arguments.rank}.json").write_text(json.dumps(result))
        return
    if arguments.offline is not None:
        (arguments.folder / "offline.json").write_text(
            json.dumps(offline_export(arguments.offline, arguments.folder / "offline"))
        )
        return
    folder = Path(tempfile.mkdtemp(prefix="bench_checkpoint_", dir=arguments.folder))
    try:
        launch(folder, arguments.world, arguments.repeats)  # makes the weights to start from
        ranks = launch(folder, arguments.world, arguments.repeats)
        command = [sys.executable, __file__, "--folder", str(folder), "--offline", ranks[0]["checkpoint"]]
        subprocess.run(command, check=True, stdout=sys.stderr)
        offline = json.loads((folder / "offline.json").read_text())
    finally:
        shutil.rmtree(folder)
    figures = {
        "world": arguments.world,
        **{key: ranks[0][key] for key in ("parameters", "trained", "largest", "bytes", "times")},
        "plain_bytes": sum(rank["plain_bytes"] for rank in ranks),
        "memory": {phase: max(rank["memory"][phase] for rank in ranks) for phase in PHASES},
        "memory_rank_1": {phase: ranks[-1]["memory"][phase] for phase in PHASES},
        "offline": offline,
        "step_slowdown": ranks[0]["step_beside_s"] / ranks[0]["step_alone_s"] if ranks[0]["step_beside_s"] else None,
        "at_7b": at_7b(256),
    }
    if delivered(arguments, figures):
        return
    show(figures)


def show(figures: dict[str, Any]) -> None:
    times, size = figures["times"], figures["bytes"] / GIB
    print(
        f"{figures['parameters'] / 1e6:.0f}M parameters, {figures['trained'] / 1e6:.0f}M trained, "
        f"{figures['world']} ranks, {size:.2f} GiB a checkpoint"
    )
    for name, key in (
        ("in the background: training waits", "stall"),
        ("  the first time (memory is taken)", "first_stall"),
        ("  until it is complete", "total"),
        ("not in the background (fsync, checksums)", "blocking"),
        ("plain torch.save of the same bytes", "torch_save"),
        ("DeepSpeed's save_checkpoint (no fsync)", "deepspeed"),
        ("verify all checksums", "verify"),
        ("load", "load"),
        ("export at the end of a stage", "export"),
    ):
        print(f"  {name:42}{times[key]:8.2f} s{'' if key == 'export' else f'{size / times[key]:8.2f} GiB/s'}")
    print(f"  {'export of the checkpoint, offline':42}{figures['offline']['seconds']:8.2f} s")
    if figures["step_slowdown"]:
        print(f"  steps beside a save take {figures['step_slowdown']:.2f} x their time")
    whole = 2 * figures["parameters"] / GIB
    print(
        f"peak memory of a rank over what it held (the whole model in bf16 is {whole:.2f} GiB, "
        f"its largest tensor {2 * figures['largest'] / GIB:.3f} GiB)"
    )
    for phase in PHASES:
        print(
            f"  {phase:42}{figures['memory'][phase] / GIB:8.3f} GiB (last rank "
            f"{figures['memory_rank_1'][phase] / GIB:.3f})"
        )
    print(f"  {'export of the checkpoint, offline':42}{figures['offline']['peak'] / GIB:8.3f} GiB")
    big = figures["at_7b"]
    print(
        f"7B, stage 2, {big['world']} ranks, by arithmetic: checkpoint {big['checkpoint_gib']:.1f} GiB, "
        f"host copy {big['host_copy_per_rank_gib']:.2f} GiB a rank; "
        f"largest tensor {big['largest_tensor_gib']:.2f} GiB: that on every rank while starting or exporting, "
        f"rank 0 up to {big['export_rank_0_gib']:.1f}, "
        f"an offline export up to {big['offline_export_gib']:.1f} GiB"
    )


if __name__ == "__main__":
    main()
