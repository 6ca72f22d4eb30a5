"""`jp-train forecast`: memory, communication, FLOPs and time of a stage on a cluster, without a GPU, data, or a process
group.

The facade over `forecasting/`: it reads the hostfile, forecasts every candidate, and lays all figures into one
JSON-able object.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from jp_train.cluster.hostfile import parse_hostfile, select_slots, world_size
from jp_train.config import RunConfig, load_config
from jp_train.config.batch import rows_per_step, valid_world_sizes
from jp_train.errors import ConfigError
from jp_train.tools.forecast.advice import advice
from jp_train.tools.forecast.candidates import Candidate, Cluster, best, candidates, is_configured
from jp_train.tools.forecast.hardware import GIB, Hardware, hardware
from jp_train.tools.forecast.shapes import shapes_of, worst_micro_batch
from jp_train.tools.forecast.workload import average_row

DAY = 86_400
PAPER = {"janus_pro_1b": (9, 16), "janus_pro_7b": (14, 32)}
"""Days of the whole training and nodes of 8 A100-40GB (arXiv 2501.17811, section 3.1)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What to forecast. `hostfile` (with DeepSpeed's filters) or `world` give the ranks; `figures` override the
    preset `gpu`'s (`field=value`)."""

    hostfile: Path | None = None
    world: int | None = None
    include: str = ""
    exclude: str = ""
    gpu: str = "a100-40gb"
    figures: tuple[str, ...] = ()


def forecast_stage(path: Path, overrides: Sequence[str], question: Question) -> dict[str, Any]:
    """The forecast of the stage that `path` configures, and of its siblings for the days of the whole training.

    Raises ConfigError (configuration, ranks that do not divide the rows, unknown GPU or figure, offloading),
    LaunchError (hostfile).
    """
    cfg = load_config(path, overrides)
    given = hardware(question.gpu, question.figures)
    cluster = _cluster(question)
    shapes = shapes_of(cfg)
    choices = candidates(cfg, cluster, given, shapes)
    now = next(candidate for candidate in choices if is_configured(cfg, candidate))
    choice = best(choices)
    row = average_row(cfg, shapes.slots)
    worst = worst_micro_batch(cfg, shapes, now.plan.micro_batch_rows)
    steps = cfg.stage.early_stop.at_step or cfg.stage.training_steps
    return {
        "config": str(path),
        "model": cfg.model.name,
        "stage": cfg.stage.name,
        "cluster": {"world": cluster.world, "nodes": cluster.nodes, "per_node": cluster.node, "gpu": given.gpu},
        "hardware": {name: value for name, value in asdict(given).items() if name != "gpu"},
        "batch": now.plan.describe(),
        "parameters": {"all": shapes.elements, "trained": shapes.trained_elements, "vq": shapes.vq_parameters},
        "assumptions": _assumptions(cfg, row, worst),
        "candidates": [_row_of(candidate, cfg, choice) for candidate in choices],
        "chosen": _details(now, cluster),
        "best": None if choice is None else choice.describe(),
        "best_is_own": choice is not None and is_configured(cfg, choice),
        "steps": steps,
        "days": _days(now, steps),
        "training": _whole_training(path, cfg, cluster, given),
        "advice": [asdict(candidate) for candidate in advice(cfg, cluster, given, choices, shapes)],
    }


def _cluster(question: Question) -> Cluster:
    if question.hostfile is not None:
        selection = select_slots(parse_hostfile(question.hostfile), include=question.include, exclude=question.exclude)
        return Cluster(world=world_size(selection), nodes=len(selection))
    world = question.world or 0
    if world < 1:
        raise ConfigError("the forecast needs ranks: give --hostfile FILE, or --world N (8 ranks a node)")
    return Cluster(world=world, nodes=-(-world // 8))


def _assumptions(cfg: RunConfig, row: Any, worst: Any) -> list[str]:
    """What the figures rest on, in words."""
    stored = cfg.data.vq_ids.value == "require"
    images = f"{row.und_images:.2f} images to understand, {row.gen_images:.2f} to generate"
    return [
        f"a row holds on average {row.tokens:,.0f} tokens in {row.documents:.2f} documents ({images}): the mixture "
        "with stated lengths, no data read",
        f"memory is for a full row of {worst.und_images // max(1, cfg.engine.micro_batch_rows)} images to understand "
        f"and {worst.gen_images // max(1, cfg.engine.micro_batch_rows)} to generate, more than any row holds of both",
        "VQ ids of images to generate are "
        + ("stored" if stored else "encoded on the fly (data.vq_ids=require: stored)"),
        "all ranks have equal work, data never waits; saves and validation are not in the days (jp-train data "
        "simulate tells the balance)",
        "overlapped: collectives hide behind the arithmetic of their pass where it is longer; not overlapped: one "
        "after the other; the truth lies between",
    ]


def _row_of(candidate: Candidate, cfg: RunConfig, choice: Candidate | None) -> dict[str, Any]:
    return {
        "micro_batch_rows": candidate.plan.micro_batch_rows,
        "accumulation": candidate.plan.gradient_accumulation_steps,
        "activation_checkpointing": candidate.setting.checkpointing > 0,
        "recompute_every": candidate.setting.checkpointing or 1,
        "hpz": candidate.setting.hpz,
        "memory_gib": candidate.memory.gib(),
        "overhead_gib": candidate.overhead_gib,
        "total_gib": candidate.total_gib,
        "phase": candidate.memory.phase,
        "fits": candidate.fits,
        "roomy": candidate.roomy,
        "own": is_configured(cfg, candidate),
        "best": choice is candidate,
        "step_s": candidate.time.overlapped,
        "serial_step_s": candidate.time.serial,
        "mfu": candidate.time.mfu,
        "between_nodes_gib": candidate.sent.between / GIB,
        "inside_node_gib": candidate.sent.inside / GIB,
        "bound": candidate.time.bound,
    }


def _details(now: Candidate, cluster: Cluster) -> dict[str, Any]:
    sent, legs = now.sent, {}
    for name, leg in (
        ("gather_forward", now.sent.forward),
        ("gather_backward", now.sent.backward),
        ("reduce_scatter", now.sent.reduce),
    ):
        legs[name] = {"all_ranks_gib": leg.over_all / GIB, "node_gib": leg.in_node / GIB, "calls": leg.calls}
    return {
        "phases_gib": {name: value / GIB for name, value in now.memory.phases.items()},
        "flops": {
            "step": now.work.model,
            "forward": now.work.forward,
            "backward": now.work.backward,
            "recomputed": now.work.recomputed,
            "vq_encode": now.work.encoding,
            "rank": now.work.model / cluster.world,
        },
        "micro_batch_communication": legs,
        "step_communication": {
            "micro_batches": sent.micro_batches,
            "between_nodes_gib": sent.between / GIB,
            "inside_node_gib": sent.inside / GIB,
        },
        "time": {
            "overlapped_s": now.time.overlapped,
            "serial_s": now.time.serial,
            "parts_s": now.time.parts,
            "mfu": now.time.mfu,
            "serial_mfu": now.time.serial_mfu,
            "tokens_per_second_per_gpu": now.time.tokens_per_second,
            "serial_tokens_per_second_per_gpu": now.time.tokens_per_second * now.time.overlapped / now.time.serial,
            "bound": now.time.bound,
        },
    }


def _days(candidate: Candidate, steps: int) -> dict[str, float]:
    return {"overlapped": steps * candidate.time.overlapped / DAY, "serial": steps * candidate.time.serial / DAY}


def _whole_training(path: Path, cfg: RunConfig, cluster: Cluster, given: Hardware) -> dict[str, Any] | None:
    """Days of the three stages with their own settings on this cluster (on the largest part of it that divides a
    stage's rows), beside the paper's. None for a configuration without siblings `..._stage1.yaml` to
    `..._stage3.yaml`."""
    match = re.fullmatch(r"(.*stage)[123]", path.stem)
    files = [path.with_name(f"{match[1]}{number}{path.suffix}") for number in (1, 2, 3)] if match else []
    if not files or not all(file.is_file() for file in files):
        return None
    stages = []
    for file in files:
        stage = cfg if file.name == path.name else load_config(file)
        part = _part_of(cluster, stage)
        candidate = next(candidate for candidate in candidates(stage, part, given) if is_configured(stage, candidate))
        steps = stage.stage.early_stop.at_step or stage.stage.training_steps
        stages.append(
            {
                "stage": stage.stage.name,
                "steps": steps,
                "ranks": part.world,
                "total_gib": candidate.total_gib,
                **_days(candidate, steps),
            }
        )
    paper = PAPER.get(cfg.model.name)
    return {
        "stages": stages,
        "overlapped": sum(stage["overlapped"] for stage in stages),
        "serial": sum(stage["serial"] for stage in stages),
        "paper_days": paper and paper[0],
        "paper_nodes": paper and paper[1],
    }


def _part_of(cluster: Cluster, cfg: RunConfig) -> Cluster:
    """The most nodes of the cluster whose ranks divide the stage's rows."""
    smaller = replace(
        cfg, engine=replace(cfg.engine, micro_batch_rows=min(cfg.engine.micro_batch_rows, rows_per_step(cfg)))
    )
    valid = set(valid_world_sizes(smaller))
    for nodes in range(cluster.nodes, 0, -1):
        if nodes * cluster.node in valid:
            return Cluster(world=nodes * cluster.node, nodes=nodes)
    return Cluster(world=1, nodes=1)
