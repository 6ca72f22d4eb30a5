"""Forecast of a stage from its plan: fill, mixture, epochs, balance between ranks, reads. No sample is read and no
image decoded.

`simulate` plans a sample of the stage's steps (sample.py) and measures it. What the index holds exactly (mean lengths,
shares) is used as it is: of the sample, the forecast of epochs needs only the fill of rows. Every measured mean comes
with `plus_minus`, two standard errors of the block means (0 where the whole stage was planned).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from jp_train.data.plan import Plan
from jp_train.tools.simulate.ranks import rank_balance
from jp_train.tools.simulate.sample import (
    Sample,
    SourceRates,
    documents_per_step,
    kind_shares,
    phases_of,
    source_rates,
    take_sample,
)
from jp_train.types import KINDS, Kind

STATISTICS = (
    "tokens",
    "squared_lengths",
    "und_images",
    "gen_images",
    "text_positions",
    "image_positions",
    "encoded_images",
)
"""What a row's FLOPs are a weighted sum of: the fields of model.flops.BatchStatistics."""
LEAST_STEP_SECONDS = 0.05
"""A step whose FLOPs take less is one of a toy model or a CPU: launches and collectives decide its time, not FLOPs."""
_NAMED_REPEATS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceReads:
    """Bytes that training reads for one document of a source, on average: with the image, and with its VQ ids
    stored. `stored`: share of the source's images whose ids are stored now. `samples`: how many there are (of a
    synthetic source, more than lengths)."""

    with_images: float
    with_ids: float
    stored: float
    samples: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSetup:
    """What a forecast needs besides the plan. `flops`: per unit of each of STATISTICS; `und_prefix`: tokens of an
    understanding document that are never supervised; `gen_text`: supervised text tokens of a generation document;
    `causal`: whether the whole row attends; `step_seconds`: seconds a step takes, or None: as long as its FLOPs take
    at `flops_per_second`, of all ranks together."""

    steps: int
    world: int
    nodes: int
    micro_batch_rows: int
    flops: Mapping[str, float]
    reads: Mapping[str, SourceReads]
    image_slots: int
    und_prefix: int
    gen_text: int
    causal: bool
    step_seconds: float | None
    flops_per_second: float


def simulate(
    plan: Plan,
    setup: StageSetup,
    *,
    sample_steps: int,
    block_steps: int = 10,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """The forecast as a JSON-able object. `sample_steps`: steps to plan; a stage of fewer steps is planned whole.

    Raises:
        ConfigError: if rows cannot be planned (see `Plan.next_step`).
    """
    rates = source_rates(plan)
    sample = take_sample(plan, setup.steps, sample_steps, rates, block_steps=block_steps, progress=progress)
    rows = row_statistics(sample, setup)
    filled = rows["tokens"].reshape(sample.steps, -1)
    per_step = _per_step(sample, rows)
    sources = _sources(plan, sample, rates, filled.mean(1) * plan.rows_per_step, setup)
    forecast: dict[str, Any] = {
        "steps": setup.steps,
        "rows_per_step": plan.rows_per_step,
        "seq_len": plan.seq_len,
        "world": setup.world,
        "nodes": setup.nodes,
        "sampled": {
            "steps": sample.steps,
            "rows": sample.steps * plan.rows_per_step,
            "blocks": len(sample.blocks),
            "whole_stage": sample.whole,
        },
        "fill": _mean(sample, filled.mean(1) / plan.seq_len, setup)
        | {"worst_step": float(filled.mean(1).min() / plan.seq_len)},
        "documents_per_row": _mean(sample, per_step["spans"] / plan.rows_per_step, setup),
        "per_step": {name: _mean(sample, values, setup) for name, values in per_step.items()},
        "mixture": _mixture(plan, sample, sources, rates),
        "sources": sources,
        "over_long": {
            "truncated_tokens_per_million": 1e6
            * float(per_step["truncated_tokens"].sum() / max(per_step["tokens"].sum(), 1))
        },
        "unused": dict(plan.unused),
    }
    flops = np.sum([rows[name] * setup.flops[name] for name in STATISTICS], axis=0).reshape(sample.steps, -1)
    kinds = np.stack([_has(sample, kind) for kind in range(len(KINDS))], axis=-1)
    in_use = [bool(share) for share in plan.mixture.shares]
    forecast["ranks"] = rank_balance(
        flops,
        kinds[:, :, in_use],
        [str(k) for k, used in zip(KINDS, in_use, strict=True) if used],
        setup.micro_batch_rows,
    )
    forecast["flops_per_step"] = float(flops.sum(1).mean())
    arithmetic = forecast["flops_per_step"] / setup.flops_per_second
    step_seconds = setup.step_seconds or (arithmetic if arithmetic >= LEAST_STEP_SECONDS else None)
    forecast["reads"] = _reads(sample, plan, setup, step_seconds)
    forecast["histograms"] = _histograms(plan, sample, filled)
    return forecast


def row_statistics(sample: Sample, setup: StageSetup) -> dict[str, np.ndarray]:
    """STATISTICS of every sampled row, float64 [steps x rows]. Text positions of understanding documents and of
    conversations include the questions, which lengths do not show: an upper bound where they are not supervised."""
    length = sample.length.astype(np.float64)
    text, und, gen = (sample.kind == KINDS.index(kind) for kind in (Kind.TEXT, Kind.UNDERSTANDING, Kind.GENERATION))
    before = setup.und_prefix + (sample.images - 1) * (setup.image_slots + 2)
    text_positions = np.where(text, length - sample.last, 0) + np.where(und, np.maximum(length - before, 0), 0)
    text_positions += gen * setup.gen_text
    row = sample.step * sample.rows_per_step + sample.row

    def summed(values: np.ndarray) -> np.ndarray:
        return np.bincount(row, weights=values, minlength=sample.steps * sample.rows_per_step)

    tokens = summed(length)
    images = summed(gen)
    on_the_fly = np.array([1 - reads.stored for reads in setup.reads.values()])
    return {
        "tokens": tokens,
        "squared_lengths": tokens**2 if setup.causal else summed(length**2),
        "und_images": summed(und * sample.images),
        "gen_images": images,
        "text_positions": summed(text_positions),
        "image_positions": images * setup.image_slots,
        "encoded_images": summed(gen * on_the_fly[sample.source]),
    }


def _per_step(sample: Sample, rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    def count(values: np.ndarray) -> np.ndarray:
        return np.bincount(sample.step, weights=values, minlength=sample.steps)

    def of_rows(name: str) -> np.ndarray:
        return rows[name].reshape(sample.steps, -1).sum(1)

    return {
        "tokens": of_rows("tokens"),
        "supervised_text_tokens": of_rows("text_positions"),
        "supervised_image_tokens": of_rows("image_positions"),
        "understanding_images": of_rows("und_images"),
        "generation_images": of_rows("gen_images"),
        "spans": count(np.ones(len(sample.step))),
        "documents": count(sample.start == 0),
        "truncated_tokens": count(sample.truncated),
        "truncated_documents": count(sample.truncated > 0),
        "cuts": count(~sample.last),
        "cut_tokens": count(sample.length * (sample.start > 0)),
    }


def _mean(sample: Sample, values: np.ndarray, setup: StageSetup) -> dict[str, float]:
    """The mean over the stage of a figure per sampled step: blocks of a phase count alike, phases by their steps."""
    total = variance = 0.0
    means: dict[int, list[float]] = {}
    for block in sample.blocks:
        means.setdefault(block.phase, []).append(float(values[block.first : block.first + block.steps].mean()))
    weights = _phase_weights(sample, setup.steps)
    for phase, blocks in means.items():
        total += weights[phase] * float(np.mean(blocks))
        if len(blocks) > 1 and not sample.whole:
            variance += weights[phase] ** 2 * float(np.var(blocks, ddof=1)) / len(blocks)
    return {"mean": total, "plus_minus": 2 * variance**0.5}


def _phase_weights(sample: Sample, steps: int) -> dict[int, float]:
    starts = {block.phase: block.start for block in reversed(sample.blocks)}
    edges = [*sorted(starts.values()), steps]
    return {phase: (edges[number + 1] - edges[number]) / steps for number, phase in enumerate(sorted(starts))}


def _mixture(
    plan: Plan, sample: Sample, sources: list[dict[str, Any]], rates: Mapping[str, SourceRates]
) -> dict[str, Any]:
    """Shares of the kinds in samples and in tokens: over the stage from what its sources contribute, or counted where
    every step was planned; errors of the sampled steps, in the recipe's unit."""
    shares = np.array(plan.mixture.shares) / sum(plan.mixture.shares)
    given = {
        source["name"]: source["epochs"] * source["samples"] / rates[source["name"]].draws_per_document
        for source in sources
    }
    expected = kind_shares(plan, rates, given)
    mixture: dict[str, Any] = {
        "unit": plan.ratio_unit.value,
        "shares": dict(zip(map(str, KINDS), shares.tolist(), strict=True)),
    }
    for unit, weights in (("samples", sample.start == 0), ("tokens", sample.length)):
        amounts = np.zeros((sample.steps, len(KINDS)))
        np.add.at(amounts, (sample.step, sample.kind), weights)
        counted = amounts.sum(0) / amounts.sum()
        overall = dict(zip(map(str, KINDS), counted.tolist(), strict=True))
        mixture[unit] = {"overall": overall if sample.whole else expected[unit]}
        if unit == plan.ratio_unit.value:
            errors = 100 * np.abs(amounts / np.maximum(amounts.sum(1, keepdims=True), 1) - shares).max(1)
            mixture[unit] |= {
                "error_points_sampled": float(100 * np.abs(counted - shares).max()),
                "error_points_worst_step": float(errors.max()),
                "error_points_median_step": float(np.median(errors)),
            }
    return mixture


def _sources(
    plan: Plan, sample: Sample, rates: Mapping[str, SourceRates], tokens: np.ndarray, setup: StageSetup
) -> list[dict[str, Any]]:
    """Epochs of every source over the stage, and the steps at which it begins again."""
    blocks = {phase: [b for b in sample.blocks if b.phase == phase] for phase, _, _ in phases_of(plan, setup.steps)}
    curves = {name: [(0, 0.0)] for name in rates}
    for phase, start, end in phases_of(plan, setup.steps):
        in_phase = float(np.mean([tokens[b.first : b.first + b.steps].mean() for b in blocks[phase]]))
        documents = documents_per_step(plan, rates, phase, in_phase)
        for name, curve in curves.items():
            epochs = (
                (end - start) * documents.get(name, 0.0) * rates[name].draws_per_document / setup.reads[name].samples
            )
            curve.append((end, curve[-1][1] + epochs))
    error = _mean(sample, tokens, setup)
    share = np.bincount(sample.source, weights=sample.length, minlength=len(plan.sources)) / sample.length.sum()
    of_lengths = sum(
        (share[index] * rates[source.name].relative_error) ** 2
        for index, source in enumerate(plan.sources)
        if source.name in rates
    )
    relative = ((error["plus_minus"] / error["mean"]) ** 2 + 4 * of_lengths) ** 0.5
    described = []
    for index, source in enumerate(plan.sources):
        if source.name not in rates:
            continue
        rate, curve = rates[source.name], curves[source.name]
        mine = sample.source == index
        epochs = curve[-1][1]
        described.append(
            {
                "name": source.name,
                "kind": str(source.kind),
                "samples": setup.reads[source.name].samples,
                "mean_tokens": rate.mean_tokens,
                "epochs": epochs,
                "epochs_plus_minus": epochs * relative if plan.samples_per_row is None else 0.0,
                "repeats_at_steps": [step_at(curve, number + 1) for number in range(min(int(epochs), _NAMED_REPEATS))],
                "documents_per_step": float((mine & (sample.start == 0)).sum() / sample.steps),
                "truncated_tokens_per_step": float(sample.truncated[mine].sum() / sample.steps),
                "truncated_percent": 100 * rate.truncated_tokens / (rate.mean_tokens + rate.truncated_tokens),
                "passed_over_percent": 100 * (1 - 1 / rate.draws_per_document),
                "epochs_at_steps": [list(point) for point in curve],
            }
        )
    return described


def step_at(curve: list[tuple[int, float]], epochs: float) -> int:
    """The step at which a piecewise linear curve of (step, epochs) reaches `epochs`, which it does."""
    for (start, before), (end, after) in pairwise(curve):
        if after >= epochs > before:
            return round(start + (end - start) * (epochs - before) / (after - before))
    raise ValueError(f"the curve ends at {curve[-1][1]} epochs, before {epochs}")


def _has(sample: Sample, kind: int) -> np.ndarray:
    present = np.zeros((sample.steps, sample.rows_per_step), bool)
    mine = sample.kind == kind
    present[sample.step[mine], sample.row[mine]] = True
    return present


def _reads(sample: Sample, plan: Plan, setup: StageSetup, step_seconds: float | None) -> dict[str, Any]:
    """Per step and, where the time of a step is known, per node and second: every span reads its sample once."""
    spans = np.bincount(sample.source, minlength=len(plan.sources)) / sample.steps
    per_step = {"samples": float(spans.sum())}
    for name, choose in (
        ("bytes_with_pictures", lambda reads: reads.with_images),
        ("bytes_with_ids", lambda reads: reads.with_ids),
        ("bytes_as_stored_now", lambda reads: reads.stored * reads.with_ids + (1 - reads.stored) * reads.with_images),
    ):
        per_step[name] = float(
            sum(spans[index] * choose(setup.reads[source.name]) for index, source in enumerate(plan.sources))
        )
    return {
        "step_seconds": step_seconds,
        "step_seconds_stated": setup.step_seconds is not None,
        "per_step": per_step,
        "per_node_per_second": None
        if step_seconds is None
        else {name: value / (setup.nodes * step_seconds) for name, value in per_step.items()},
    }


def _histograms(plan: Plan, sample: Sample, filled: np.ndarray) -> dict[str, Any]:
    lengths = {}
    for index, source in enumerate(plan.sources):
        mine = (sample.source == index) & (sample.start == 0) if source.cuttable else sample.source == index
        if mine.any():
            counts, edges = np.histogram(
                np.minimum(np.asarray(source.tokens), 2 * plan.seq_len), bins=64, range=(0, 2 * plan.seq_len)
            )
            lengths[source.name] = {"edges": edges.tolist(), "counts": counts.tolist()}
    fill, edges = np.histogram(filled / plan.seq_len, bins=50, range=(0, 1))
    per_row = np.bincount(sample.step * sample.rows_per_step + sample.row, minlength=filled.size)
    return {
        "lengths": lengths,
        "fill": {"edges": edges.tolist(), "counts": fill.tolist()},
        "empty_tokens": _histogram((plan.seq_len - filled).ravel()),
        "documents_per_row": {"counts": np.bincount(per_row).tolist()},
    }


def _histogram(values: np.ndarray) -> dict[str, list[float]]:
    counts, edges = np.histogram(values, bins=40)
    return {"edges": edges.tolist(), "counts": counts.tolist()}
