"""Which settings a run could have on its cluster, and what each takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jp_train.config import BatchPlan, RunConfig, batch_plan
from jp_train.config.batch import rows_per_step
from jp_train.config.choices import Precision
from jp_train.config.deepspeed import deepspeed_config
from jp_train.errors import ConfigError
from jp_train.model.flops import BatchStatistics
from jp_train.tools.forecast.communication import Communication, communication
from jp_train.tools.forecast.hardware import GIB, Hardware
from jp_train.tools.forecast.host import host_time
from jp_train.tools.forecast.memory import Memory, Setting, forecast_memory
from jp_train.tools.forecast.shapes import MicroBatch, Shapes, shapes_of, worst_micro_batch
from jp_train.tools.forecast.timing import Arithmetic, StepTime, arithmetic, step_time
from jp_train.tools.forecast.workload import average_row

DEEPSPEED_DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
}
"""deepspeed 0.19.8, runtime/zero/config.py; a test compares them."""
UNPREFIXED = {
    "stage3_prefetch_bucket_size": "prefetch_bucket_size",
    "stage3_max_live_parameters": "max_live_parameters",
    "stage3_max_reuse_distance": "max_reuse_distance",
}


def setting_of(cfg: RunConfig, plan: BatchPlan, *, cuda: bool = True) -> Setting:
    """How a rank of this configuration runs; raises ConfigError for raw DeepSpeed keys that the forecast does not
    know (offloading)."""
    zero: dict[str, Any] = deepspeed_config(cfg, plan)["zero_optimization"]
    for key in ("offload_optimizer", "offload_param", "zenflow", "cpu_offload", "cpu_offload_param"):
        if zero.get(key):
            raise ConfigError(
                f"engine.deepspeed.zero_optimization.{key}: the forecast knows no offloading; leave the key out for "
                "the forecast"
            )

    def number(key: str) -> int:
        return int(float(zero.get(key, zero.get(UNPREFIXED.get(key, key), DEEPSPEED_DEFAULTS[key]))))

    return Setting(
        world=plan.dp_world_size,
        size=2 if cfg.precision is Precision.bf16 else 4,
        checkpointing=cfg.engine.recomputed,
        hpz=cfg.engine.hpz_partition_size,
        reduce_bucket=number("reduce_bucket_size"),
        prefetch=number("stage3_prefetch_bucket_size"),
        max_live=number("stage3_max_live_parameters"),
        max_reuse=number("stage3_max_reuse_distance"),
        persistent=cfg.engine.persistence_threshold,
        chunk=cfg.loss.chunk_tokens,
        cuda=cuda,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """The ranks of a run: `world` of them on `nodes` hosts."""

    world: int
    nodes: int

    @property
    def node(self) -> int:
        """Ranks of a node (of the smallest, where hosts differ)."""
        return max(1, self.world // self.nodes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One setting of micro-batch, checkpointing and hpZ with its forecast. GiB of one GPU."""

    plan: BatchPlan
    setting: Setting
    memory: Memory
    overhead_gib: float
    total_gib: float
    fits: bool
    roomy: bool
    """Fits with ROOM to spare."""
    work: Arithmetic
    sent: Communication
    time: StepTime

    @property
    def seconds(self) -> float:
        """What candidates are ranked by: half way between full overlap and none."""
        return (self.time.overlapped + self.time.serial) / 2

    def describe(self) -> str:
        """As configuration keys."""
        again = self.setting.checkpointing
        return (
            f"engine.micro_batch_rows={self.plan.micro_batch_rows} "
            f"engine.activation_checkpointing={str(again > 0).lower()} "
            + (f"engine.recompute_every={again} " if again else "")
            + f"engine.hpz_partition_size={self.setting.hpz}"
        )


ROOM = 0.20
"""Share of the GPU that a recommended setting leaves free beyond what is forecast: twice the error that the
validation allows, as it had no GPU."""
FEWER = (8, 6, 4, 3, 2)
"""Every k-th layer computed again that is looked at, between none and all of them."""
MOST_ROWS = 16
"""Micro-batches above this are not looked at."""


def evaluate(cfg: RunConfig, cluster: Cluster, hardware: Hardware, shapes: Shapes | None = None) -> Candidate:
    """The forecast of one configuration. Raises ConfigError where its rows do not divide."""
    shapes = shapes or shapes_of(cfg)
    plan = batch_plan(cfg, cluster.world)
    row = average_row(cfg, shapes.slots)
    return evaluate_rows(
        cfg,
        cluster,
        hardware,
        shapes,
        largest=worst_micro_batch(cfg, shapes, plan.micro_batch_rows),
        step=row.step(plan.rows_per_step, encoded=cfg.data.vq_ids.value != "require"),
    )


def evaluate_rows(
    cfg: RunConfig, cluster: Cluster, hardware: Hardware, shapes: Shapes, *, largest: MicroBatch, step: BatchStatistics
) -> Candidate:
    """The forecast of a step of given rows: `largest` decides about memory, `step` (over all ranks) about time. Raises
    ConfigError where the rows do not divide."""
    plan = batch_plan(cfg, cluster.world)
    setting = setting_of(cfg, plan)
    forecast = forecast_memory(shapes, largest, setting)
    allocated = forecast.memory.total / GIB
    overhead = hardware.overhead_gib(allocated)
    work = arithmetic(cfg, shapes, step, checkpointing=setting.checkpointing)
    sent = communication(
        shapes, forecast.replay, setting, nodes=cluster.nodes, micro_batches=plan.gradient_accumulation_steps
    )
    host = host_time(
        shapes,
        forecast.visits,
        forecast.replay,
        setting,
        micro_batches=plan.gradient_accumulation_steps,
        speed=hardware.host_speed,
    )
    return Candidate(
        plan=plan,
        setting=setting,
        memory=forecast.memory,
        overhead_gib=overhead,
        total_gib=allocated + overhead,
        fits=allocated + overhead <= hardware.memory_gib,
        roomy=allocated + overhead <= (1 - ROOM) * hardware.memory_gib,
        work=work,
        sent=sent,
        time=step_time(work, sent, host, shapes, setting, hardware, nodes=cluster.nodes, tokens=step.tokens),
    )


def with_setting(cfg: RunConfig, *, rows: int, checkpointing: int, hpz: int) -> RunConfig:
    """`checkpointing` as in Setting."""
    return replace(
        cfg,
        engine=replace(
            cfg.engine,
            micro_batch_rows=rows,
            activation_checkpointing=checkpointing > 0,
            recompute_every=checkpointing or 1,
            hpz_partition_size=hpz,
        ),
    )


def candidates(cfg: RunConfig, cluster: Cluster, hardware: Hardware, shapes: Shapes | None = None) -> list[Candidate]:
    """Every micro-batch that divides a rank's rows, with and without hpZ over a node, with all layers computed again,
    none, and, where none is too much, as few as leave room; the configuration's own first among equals. The
    configuration's own setting is always there."""
    shapes = shapes or shapes_of(cfg)
    configured = (cfg.engine.micro_batch_rows, cfg.engine.recomputed, cfg.engine.hpz_partition_size)
    per_rank = rows_per_step(cfg) // cluster.world
    rows = [n for n in range(1, min(per_rank, MOST_ROWS) + 1) if per_rank % n == 0]
    copies = [1, cluster.node] if cluster.nodes > 1 and cluster.node > 1 else [1]

    def of(n: int, again: int, hpz: int) -> Candidate:
        return evaluate(with_setting(cfg, rows=n, checkpointing=again, hpz=hpz), cluster, hardware, shapes)

    results: dict[tuple[int, int, int], Candidate] = {}
    for n in rows:
        for hpz in copies:
            all_again, none = results.setdefault((n, 1, hpz), of(n, 1, hpz)), of(n, 0, hpz)
            if all_again.roomy and not none.roomy:
                some = next((it for k in FEWER if (it := of(n, k, hpz)).roomy), None)
                if some is not None:
                    results[n, some.setting.checkpointing, hpz] = some
            results[n, 0, hpz] = none
    if configured not in results:
        return [of(*configured), *results.values()]
    return list(results.values())


def best(choices: Sequence[Candidate]) -> Candidate | None:
    """The fastest that fits with room to spare; among those within 1 % the one that takes the least memory. None
    where none fits."""
    fitting = [candidate for candidate in choices if candidate.roomy] or [
        candidate for candidate in choices if candidate.fits
    ]
    if not fitting:
        return None
    fastest = min(candidate.seconds for candidate in fitting)
    return min(
        (candidate for candidate in fitting if candidate.seconds <= 1.01 * fastest),
        key=lambda candidate: candidate.total_gib,
    )


def is_configured(cfg: RunConfig, candidate: Candidate) -> bool:
    """Whether the candidate is what the configuration says."""
    configured = (cfg.engine.micro_batch_rows, cfg.engine.recomputed, cfg.engine.hpz_partition_size)
    return configured == (candidate.plan.micro_batch_rows, candidate.setting.checkpointing, candidate.setting.hpz)
