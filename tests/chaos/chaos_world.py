"""What a chaos campaign trains: the smoke model on a few of the smoke run's shards, and the configuration of one run
of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from examples.smoke.shards import ShardSizes, build_shards
from examples.smoke.tokenizer import train_tokenizer
from jp_train.config import RunConfig, load_config

ROOT = Path(__file__).resolve().parents[2]
SIZES = ShardSizes(digits_gen=80, scenes_gen=80, digits_und=60, scenes_und=60, val_each=8, samples_per_shard=40)
ROWS = 6
"""Rows a step: 1, 2 and 3 ranks divide them."""


@dataclass(frozen=True)
class World:
    """Shards and tokenizer, made once for a campaign."""

    data: Path
    tokenizer: Path


def build_world(folder: Path, seed: int) -> World:
    """Write shards and tokenizer, with one undecodable image in two sources: the ledger has something to remember."""
    world = World(folder / "data", folder / "tokenizer")
    if not (folder / "complete").exists():
        build_shards(world.data, seed, SIZES)
        for shard in (world.data / "digits-gen" / "00000.tar", world.data / "scenes-und" / "00000.tar"):
            _break_a_image(shard)
        train_tokenizer(world.data, world.tokenizer)
        (folder / "complete").touch()
    return world


def _break_a_image(shard: Path) -> None:
    """Zero the middle of the shard's first PNG: the tar stays whole, the image cannot be decoded."""
    data = bytearray(shard.read_bytes())
    start = data.index(b"\x89PNG") + 60
    data[start : start + 40] = bytes(40)
    shard.write_bytes(data)


def configuration(world: World, run_dir: Path, steps: int, **changes: object) -> RunConfig:
    """Smoke stage 2 from random weights (so that checkpoints hold the frozen ones too), in short rows; `changes`:
    dotted keys."""
    values: dict[str, object] = {
        "run_dir": run_dir,
        "tokenizer.path": world.tokenizer,
        "model.init_from": "null",
        "model.init": "random",
        "data.root": world.data,
        "data.seq_len": 128,
        "data.workers": 0,
        "data.pool_size": 16,
        "data.snapshot_steps": 10,
        "stage.batch_size": ROWS,
        "stage.training_steps": steps,
        "stage.early_stop.at_step": "null",
        "optimizer.warmup_steps": 3,
        "engine.activation_checkpointing": "false",
        "engine.stall_timeout_s": 10,
        "checkpoint.keep_last": 2,
        "checkpoint.export_at_end": "false",
        "validation.every_steps": 8,
        "validation.documents": 2,
        "logging.wandb.mode": "disabled",
    } | changes
    cfg = load_config(ROOT / "examples" / "smoke" / "stage2.yaml", [f"{key}={value}" for key, value in values.items()])
    cfg.validation.sources = {
        name: source for name, source in cfg.validation.sources.items() if name in ("digits-gen-val", "text-val")
    }
    return cfg
