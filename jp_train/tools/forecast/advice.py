"""What would make it faster: variants of the run and of the cluster, each forecast anew and ranked by what it gains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jp_train.config import RunConfig
from jp_train.config.choices import VqIds
from jp_train.errors import ConfigError
from jp_train.tools.forecast.candidates import Candidate, Cluster, best, candidates, evaluate, is_configured
from jp_train.tools.forecast.hardware import Hardware
from jp_train.tools.forecast.shapes import Shapes


@dataclass(frozen=True, kw_only=True, slots=True)
class Advice:
    """One variant. `gain`: share of the step's time that it saves (half way between full overlap and none); `cost`:
    its GPU hours over the run's."""

    change: str
    kind: str
    """`setting`: a key of this configuration; `cluster`: other hardware."""
    gain: float
    step_s: float
    serial_step_s: float
    total_gib: float
    fits: bool
    cost: float


LEAST_GAIN = 0.01


def advice(
    cfg: RunConfig, cluster: Cluster, hardware: Hardware, choices: Sequence[Candidate], shapes: Shapes
) -> list[Advice]:
    """Variants that save at least LEAST_GAIN of a step and fit, the largest gain first; `choices` are the candidates of
    this run."""
    now = next(candidate for candidate in choices if is_configured(cfg, candidate))
    advices = []
    for change, kind, candidate, world in _variants(cfg, cluster, hardware, choices, shapes):
        gain = 1 - candidate.seconds / now.seconds
        if gain >= LEAST_GAIN and candidate.fits:
            advices.append(
                Advice(
                    change=change,
                    kind=kind,
                    gain=gain,
                    step_s=candidate.time.overlapped,
                    serial_step_s=candidate.time.serial,
                    total_gib=candidate.total_gib,
                    fits=candidate.fits,
                    cost=candidate.seconds * world / (now.seconds * cluster.world),
                )
            )
    return sorted(advices, key=lambda item: -item.gain)


def _variants(
    cfg: RunConfig, cluster: Cluster, hardware: Hardware, choices: Sequence[Candidate], shapes: Shapes
) -> Iterator[tuple[str, str, Candidate, int]]:
    """What changes, whether it is a setting or hardware, its forecast, and its ranks. Variants that are impossible
    are left out."""
    choice = best(choices)
    if choice is not None:
        yield choice.describe(), "setting", choice, cluster.world
    if cfg.data.vq_ids is not VqIds.require and cfg.stage.mixture.generation > 0:
        stored = replace(cfg, data=replace(cfg.data, vq_ids=VqIds.require))
        yield (
            "VQ ids stored once (jp-train data encode-images; data.vq_ids=require)",
            "setting",
            evaluate(stored, cluster, hardware, shapes),
            (cluster.world),
        )
    for name, value, why in (
        ("reduce_bucket_size", 100_000_000, "frees memory"),
        ("stage3_max_live_parameters", 3_000_000_000, "more parameters stay from forward to backward"),
    ):
        raw: dict[str, Any] = dict(cfg.engine.deepspeed)
        zero = dict(raw.get("zero_optimization", {}))
        zero[name] = value
        if name == "stage3_max_live_parameters":
            zero["stage3_max_reuse_distance"] = value
        changed = replace(cfg, engine=replace(cfg.engine, deepspeed={**raw, "zero_optimization": zero}))
        other = best(candidates(changed, cluster, hardware, shapes))
        if other is not None and (choice is None or other.seconds < 0.995 * choice.seconds):
            yield (
                f"engine.deepspeed.zero_optimization.{name}={value} ({why}) with {other.describe()}",
                "setting",
                other,
                cluster.world,
            )
    for change, given in (
        ("twice the bandwidth between nodes", replace(hardware, inter_gbs=2 * hardware.inter_gbs)),
        ("twice the bandwidth inside nodes", replace(hardware, intra_gbs=2 * hardware.intra_gbs)),
        (
            "kernels that reach a tenth more of the peak",
            replace(hardware, achievable=min(1.0, 1.1 * hardware.achievable)),
        ),
    ):
        if cluster.nodes > 1 or "nodes" not in change:
            yield change, "cluster", evaluate(cfg, cluster, given, shapes), cluster.world
    larger = replace(hardware, memory_gib=2 * hardware.memory_gib)
    roomy = best(candidates(cfg, cluster, larger, shapes))
    if roomy is not None and (choice is None or roomy.seconds < 0.995 * choice.seconds):
        yield f"GPUs with twice the memory, and {roomy.describe()}", "cluster", roomy, cluster.world
    for factor in (2, 4):
        more = Cluster(world=factor * cluster.world, nodes=factor * cluster.nodes)
        try:
            smaller = replace(cfg, engine=replace(cfg.engine, micro_batch_rows=1))
            other = best(candidates(smaller, more, hardware, shapes))
        except ConfigError:
            continue
        if other is not None:
            yield f"{more.nodes} nodes instead of {cluster.nodes}, and {other.describe()}", "cluster", other, more.world
