"""Planned rows from all parts of a stage, on which a forecast is measured.

Blocks of consecutive steps are planned as in training, at the stage's beginning and evenly spaced after it, in every
phase (a range of steps with the same sources). A far block starts from a constructed state (`Plan.state_at`):
permutations are reached in O(1), so a block at step 250,000 costs what one at step 0 costs. Its first steps, in which
the pool fills, are planned and left out. The error of the extrapolation follows from how much the blocks differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from jp_train.data.plan import Plan
from jp_train.data.sequence import COLUMNS
from jp_train.types import KINDS, Kind

MEAN_DRAWS = 200_000
"""Draws of a source over which its mean length is taken: all of a smaller source's samples once."""
_COLUMN = {name: number for number, name in enumerate(COLUMNS)}


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRates:
    """Of one source: samples; mean tokens of a document in rows; tokens truncated per document; draws made per
    document used (over 1 where `over_long` passes some over)."""

    samples: int
    mean_tokens: float
    truncated_tokens: float
    draws_per_document: float
    relative_error: float
    """Standard error of `mean_tokens`, as a part of it; 0 where every sample was counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """`steps` consecutive sampled steps from stage step `start`; their numbers in the sample begin at `first`."""

    phase: int
    start: int
    first: int
    steps: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Documents of all sampled steps, one entry a span, int64 [D]: `step` counts sampled steps, `row` within its
    step. `last`: whether the span ends its document; `images`: how many the document has."""

    blocks: tuple[Block, ...]
    steps: int
    rows_per_step: int
    whole: bool
    """Whether every step of the stage was planned, so that nothing is extrapolated."""
    step: np.ndarray
    row: np.ndarray
    source: np.ndarray
    kind: np.ndarray
    start: np.ndarray
    length: np.ndarray
    truncated: np.ndarray
    last: np.ndarray
    images: np.ndarray


def source_rates(plan: Plan) -> dict[str, SourceRates]:
    """The rates of every source in use, from the lengths alone."""
    rates = {}
    for source in plan.sources:
        if source.name in plan.unused:
            continue
        draws = min(source.samples, MEAN_DRAWS)
        lengths, *_, truncated = plan.sequence(source.name).columns(np.arange(draws))
        while not len(lengths):  # of a source of which hardly anything can be used
            draws *= 4
            lengths, *_, truncated = plan.sequence(source.name).columns(np.arange(draws))
        rates[source.name] = SourceRates(
            samples=source.samples,
            mean_tokens=float(lengths.mean()),
            truncated_tokens=float(truncated.mean()),
            draws_per_document=draws / len(lengths),
            relative_error=float(lengths.std() / lengths.mean() / len(lengths) ** 0.5)
            if draws < source.samples
            else 0.0,
        )
    return rates


def documents_per_step(
    plan: Plan, rates: Mapping[str, SourceRates], phase: int, tokens_per_step: float
) -> dict[str, float]:
    """Documents that a step of `phase` starts, per source, in the long run: the mixture's shares of what fills
    `tokens_per_step`."""
    shares: dict[str, float] = {}
    current = plan.mixture.phases[phase]
    for share, members, weights in zip(plan.mixture.shares, current.members, current.weights, strict=True):
        for index, weight in zip(members, weights, strict=True):
            shares[plan.sources[index].name] = share / sum(plan.mixture.shares) * weight / sum(weights)
    if plan.ratio_unit.value == "tokens":
        shares = {name: share / rates[name].mean_tokens for name, share in shares.items()}
    if plan.samples_per_row is not None:
        documents = plan.rows_per_step * plan.samples_per_row
        return {name: documents * share / sum(shares.values()) for name, share in shares.items()}
    tokens = sum(share * rates[name].mean_tokens for name, share in shares.items())
    return {name: tokens_per_step * share / tokens for name, share in shares.items()}


def stage_documents(
    plan: Plan, rates: Mapping[str, SourceRates], steps: int, tokens_per_step: float
) -> dict[str, float]:
    """Documents that the first `steps` steps start, per source in use, if each is filled with `tokens_per_step`."""
    documents = dict.fromkeys(rates, 0.0)
    for phase, start, end in phases_of(plan, steps):
        for name, in_a_step in documents_per_step(plan, rates, phase, tokens_per_step).items():
            documents[name] += (end - start) * in_a_step
    return documents


def kind_shares(
    plan: Plan, rates: Mapping[str, SourceRates], documents: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """{"samples": {kind: share}, "tokens": {kind: share}} of so many documents per source."""
    amounts = {unit: dict.fromkeys(map(str, KINDS), 0.0) for unit in ("samples", "tokens")}
    for source in plan.sources:
        number = documents.get(source.name, 0.0)
        amounts["samples"][str(source.kind)] += number
        amounts["tokens"][str(source.kind)] += number * rates[source.name].mean_tokens if number else 0.0
    return {
        unit: {kind: amount / sum(of_kinds.values()) for kind, amount in of_kinds.items()}
        for unit, of_kinds in amounts.items()
    }


def phases_of(plan: Plan, steps: int) -> list[tuple[int, int, int]]:
    """(phase, first step, last step + 1) of every phase of a stage of `steps` steps."""
    edges = [phase.from_step for phase in plan.mixture.phases]
    ends = [*edges[1:], steps]
    return [
        (number, start, min(end, steps))
        for number, (start, end) in enumerate(zip(edges, ends, strict=True))
        if start < steps
    ]


def take_sample(
    plan: Plan,
    steps: int,
    sample_steps: int,
    rates: Mapping[str, SourceRates],
    *,
    block_steps: int = 10,
    progress: Callable[[int, int], None] | None = None,
) -> Sample:
    """Plan about `sample_steps` of the stage's `steps` steps; all, if there are not more. `progress(done, all)` is
    called after each step.

    Raises:
        ConfigError: if rows cannot be planned (see `Plan.next_step`).
    """
    blocks = _blocks(plan, steps, sample_steps, block_steps)
    whole = sum(block.steps for block in blocks) == steps
    warm_up = 0 if whole else -(-2 * plan.pool_size // plan.rows_per_step)
    total = sum(block.steps + (warm_up if block.start else 0) for block in blocks)
    tables, rows, numbers = [], [], []
    done = 0
    for block in blocks:
        if block.start and not whole:
            plan.restore(plan.state_at(block.start, _positions(plan, rates, block.start)))
        skipped = warm_up if block.start else 0
        for offset in range(-skipped, block.steps):
            table, row = plan.next_table()
            if offset >= 0:
                tables.append(table)
                rows.append(row)
                numbers.append(np.full(len(row), block.first + offset))
            done += 1
            if progress is not None:
                progress(done, total)
    table = np.concatenate(tables)
    source, start, length = (table[:, _COLUMN[name]] for name in ("source", "start", "length"))
    kinds = np.array([KINDS.index(source.kind) for source in plan.sources])
    return Sample(
        blocks=tuple(blocks),
        steps=sum(block.steps for block in blocks),
        rows_per_step=plan.rows_per_step,
        whole=whole,
        step=np.concatenate(numbers),
        row=np.concatenate(rows),
        source=source,
        kind=kinds[source],
        start=start,
        length=length,
        truncated=table[:, _COLUMN["truncated"]],
        last=_ends(plan, table),
        images=_images(plan, table),
    )


def _blocks(plan: Plan, steps: int, sample_steps: int, block_steps: int) -> list[Block]:
    phases = phases_of(plan, steps)
    if steps <= sample_steps:
        parts = [(phase, start, end - start) for phase, start, end in phases]
    else:
        parts = []
        for phase, start, end in phases:
            length = min(block_steps, end - start)
            count = max(4, round(sample_steps / block_steps * (end - start) / steps))
            count = min(count, (end - start) // length)
            spacing = (end - start - length) / max(count - 1, 1)
            parts += [(phase, start + round(number * spacing), length) for number in range(count)]
    blocks, first = [], 0
    for phase, start, length in parts:
        blocks.append(Block(phase=phase, start=start, first=first, steps=length))
        first += length
    return blocks


def _positions(plan: Plan, rates: Mapping[str, SourceRates], step: int) -> dict[str, int]:
    """Where every source will be at `step`, as if rows were full."""
    documents = stage_documents(plan, rates, step, plan.rows_per_step * plan.seq_len)
    return {name: int(number * rates[name].draws_per_document) for name, number in documents.items()}


def _images(plan: Plan, table: np.ndarray) -> np.ndarray:
    source, sample = (table[:, _COLUMN[name]] for name in ("source", "sample"))
    images = np.array([int(planned.kind is not Kind.TEXT) for planned in plan.sources])[source]
    for index, planned in enumerate(plan.sources):
        if planned.images is not None:
            mine = np.flatnonzero(source == index)
            entries = sample[mine] if planned.first_entry is None else planned.first_entry[sample[mine]]
            images[mine] = planned.images[entries]
    return images


def _ends(plan: Plan, table: np.ndarray) -> np.ndarray:
    source, sample, start, length = (table[:, _COLUMN[name]] for name in ("source", "sample", "start", "length"))
    last = np.ones(len(table), bool)
    for index, planned in enumerate(plan.sources):
        if planned.cuttable and plan.samples_per_row is None:
            spans = np.flatnonzero(source == index)
            last[spans] = start[spans] + length[spans] == np.asarray(planned.tokens)[sample[spans]]
    return last
