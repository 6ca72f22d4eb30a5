"""`jp-train data simulate`: the forecast of a stage, from its index (data) and its FLOPs (model)."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from jp_train.cluster.hostfile import parse_hostfile
from jp_train.config import RunConfig, batch_plan
from jp_train.config.batch import BatchPlan, rows_per_step
from jp_train.config.choices import ImageEnd, Packing, Template
from jp_train.config.schema import A100_TFLOPS
from jp_train.data.plan import Plan
from jp_train.errors import ConfigError, DataError
from jp_train.terminal import ProgressLine
from jp_train.tools.simulate.measure import STATISTICS, SourceReads, StageSetup, simulate
from jp_train.types import KINDS, Kind

SLOTS_PER_NODE = 8
"""Ranks of a node where no hostfile says otherwise."""
UTILISATION = 0.4
"""Share of `logging.peak_tflops` that a step is taken to reach where its time is not stated."""
SAMPLED_ROWS = 100_000
"""Rows that are planned by default: with 200 steps of 512 rows, seconds of work and errors far below 1 %."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulateOptions:
    """What to forecast. `hostfile` or `world` give the ranks (default: 1); `steps` the stage's length (default: the
    config's, up to its early stop); `sample_steps` how many are planned (default: SAMPLED_ROWS); `lengths` a file of
    stated distributions, and `synthetic` the default ones, instead of an index; `step_seconds` the time of a step.
    Raises ConfigError for a number that is not positive."""

    hostfile: Path | None = None
    world: int | None = None
    steps: int | None = None
    sample_steps: int | None = None
    lengths: Path | None = None
    synthetic: bool = False
    step_seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("world", "steps", "sample_steps", "step_seconds"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"--{name.replace('_', '-')} must be positive, got {value}")


def simulate_stage(cfg: RunConfig, options: SimulateOptions, progress: TextIO | None = None) -> dict[str, Any]:
    """The forecast as one JSON-able object; `progress` (default: stderr) gets a line with the time left.

    Raises:
        ConfigError: for impossible numbers, a world size that does not divide the rows, or rows that cannot be planned.
        DataError: for missing or corrupt shards, with the way to forecast without data.
        LaunchError: for a faulty hostfile.
    """
    began = time.monotonic()
    if not cfg.data.sources:
        raise ConfigError("data.sources is empty: name a recipe (`recipe: data_recipes/...`) or sources")
    hosts = parse_hostfile(options.hostfile) if options.hostfile else []
    world = options.world or sum(host.slots for host in hosts) or 1
    nodes = len(hosts) if hosts and not options.world else -(-world // SLOTS_PER_NODE)
    batch = batch_plan(cfg, world)
    steps = options.steps or cfg.stage.early_stop.at_step or cfg.stage.training_steps
    cfg = replace(
        cfg, stage=replace(cfg.stage, training_steps=steps, early_stop=replace(cfg.stage.early_stop, at_step=None))
    )
    slots = (cfg.model.vision.image_size // cfg.model.vision.patch_size) ** 2
    synthetic = ""
    if options.synthetic or options.lengths:
        plan, reads, und_prefix = _without_data(cfg, options, batch, slots)
        synthetic = str(options.lengths) if options.lengths else "the default distributions of every kind"
    else:
        plan, reads, und_prefix = _from_index(cfg, batch, slots, progress or sys.stderr)
    ends = {ImageEnd.eoi_eos: 2, ImageEnd.eoi: 1, ImageEnd.none: 0}[cfg.data.image_end]
    setup = StageSetup(
        steps=steps,
        world=world,
        nodes=nodes,
        micro_batch_rows=cfg.engine.micro_batch_rows,
        flops=unit_flops(cfg),
        reads=reads,
        image_slots=slots,
        und_prefix=und_prefix,
        gen_text=ends if cfg.data.supervise_eoi else 0,
        causal=cfg.data.packing is Packing.causal,
        step_seconds=options.step_seconds,
        flops_per_second=UTILISATION * (cfg.logging.peak_tflops or A100_TFLOPS) * 1e12 * world,
    )
    sample_steps = options.sample_steps or max(200, -(-SAMPLED_ROWS // rows_per_step(cfg)))
    line = ProgressLine("simulate", progress or sys.stderr, every_s=2)
    forecast = simulate(
        plan,
        setup,
        sample_steps=sample_steps,
        progress=lambda done, total: line.show(done, total, f"{done:,}/{total:,} steps planned"),
    )
    dialogues = cfg.stage.template is Template.stage3 or cfg.data.mask_question
    return {
        "stage": cfg.stage.name,
        "synthetic": synthetic,
        "batch": batch.describe(),
        "supervised_note": " (text: at most, questions are counted too)" if dialogues else "",
        "seconds": time.monotonic() - began,
        **forecast,
    }


def unit_flops(cfg: RunConfig) -> dict[str, float]:
    """FLOPs of a unit of each of STATISTICS, forward and backward; they are linear in each. VQ encoding in training
    is included: ranks wait for it too."""
    from jp_train.model.flops import BatchStatistics, step_flops, vq_flops

    nothing = dict.fromkeys(STATISTICS, 0)
    units = {
        name: step_flops(cfg.model, BatchStatistics(**nothing | {name: 1}), cfg.stage.trainable).total
        for name in STATISTICS
    }
    return units | {"encoded_images": vq_flops(cfg.model)[0]}


def _from_index(
    cfg: RunConfig, batch: BatchPlan, slots: int, progress: TextIO
) -> tuple[Plan, dict[str, SourceReads], int]:
    from jp_train.data.encode import Encoder
    from jp_train.data.index import index_sources
    from jp_train.data.loader import build_plan
    from jp_train.data.tokenizer import load_tokenizer
    from jp_train.tools.index import IndexProgressLine
    from jp_train.tools.simulate.reads import source_reads

    try:
        tokenizer = load_tokenizer(cfg.tokenizer)
        indexes = index_sources(cfg, tokenizer, progress=IndexProgressLine(progress))
    except (DataError, ConfigError) as error:
        raise type(error)(
            f"{error}; to forecast without data, state lengths with --lengths FILE or --synthetic"
        ) from error
    plan = build_plan(cfg, indexes, batch, tokenizer)
    reads = {index.name: source_reads(index, cfg.data, slots) for index in indexes}
    return plan, reads, Encoder(cfg, tokenizer).min_tokens(Kind.UNDERSTANDING)


def _without_data(
    cfg: RunConfig, options: SimulateOptions, batch: BatchPlan, slots: int
) -> tuple[Plan, dict[str, SourceReads], int]:
    from jp_train.tools.simulate.synthetic import read_lengths, synthetic_sources, template_tokens

    lengths = read_lengths(options.lengths, cfg)
    plan = Plan(
        synthetic_sources(cfg, lengths, slots),
        seed=cfg.seed,
        rows_per_step=batch.rows_per_step,
        seq_len=cfg.data.seq_len,
        pool_size=cfg.data.pool_size,
        mixture=[getattr(cfg.stage.mixture, kind.value) for kind in KINDS],
        ratio_unit=cfg.stage.ratio_unit,
        mix=cfg.stage.mix,
        samples_per_row=batch.samples_per_row,
        pad_dropout=cfg.data.pad_dropout,
        first_sentence=cfg.data.first_sentence,
        over_long=cfg.data.over_long,
        training_steps=cfg.stage.training_steps,
    )
    generation = {name for name, source in cfg.data.sources.items() if Kind(source.kind.value) is Kind.GENERATION}
    reads = {
        name: SourceReads(
            with_images=stated.bytes,
            with_ids=1_000 + 2 * slots if name in generation else stated.bytes,
            stored=0.0,
            samples=int(stated.samples),
        )
        for name, stated in lengths.items()
    }
    return plan, reads, template_tokens(Kind.UNDERSTANDING, cfg, slots)
