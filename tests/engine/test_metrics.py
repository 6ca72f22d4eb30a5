"""A step's numbers by hand: what each rank tallies, and the metrics.jsonl keys made of all ranks' tallies."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from jp_train.config.schema import RatioUnit
from jp_train.engine.metrics import StepTally, StepTotals, exchange, fields, step_values, validation_values
from jp_train.files import json_safe
from jp_train.types import KINDS, DocumentRef, Kind, LossTerms, PackedBatch, Provenance, SkippedDocument, SourceInfo
from tests.model.janus_tiny import N_SOURCES, pack, random_docs

NAMES = ["text", "und", "gen"]
KEYS = {
    *(
        "loss/total",
        "loss/text",
        "loss/understanding",
        "loss/generation",
        "loss/source/text",
        "loss/source/und",
        "loss/source/gen",
    ),
    *("tokens/total", "tokens/understanding", "tokens/text", "tokens/generation"),
    *("mixture/understanding", "mixture/text", "mixture/generation"),
    *("packing/fill", "packing/truncated_tokens", "data/skipped", "data/rows_digest"),
    *("time/step_s", "time/data_wait_s", "perf/tokens_per_s", "perf/mfu"),
    *("optim/lr", "optim/grad_norm", "memory/peak_gib"),
}


def batch(kinds: list[Kind], *, continued: int | None = None, skipped: int = 0, truncated: int = 0) -> PackedBatch:
    """One row; document number `continued` is the rest of a text that began in an earlier row."""
    packed = pack(random_docs(1, kinds))
    provenance = tuple(
        Provenance(
            source="s",
            shard="x.tar",
            key=str(n),
            kind=kind,
            start=5 if n == continued else 0,
            length=int(packed.document_lengths[n]),
        )
        for n, kind in enumerate(kinds)
    )
    info = SourceInfo(source="gen", shard="x.tar", key="bad")
    bad = SkippedDocument(info=info, ref=DocumentRef(source=2, epoch=0, sample=0, start=0, length=9), reason="broken")
    return replace(packed, provenance=(provenance,), skipped=(bad,) * skipped, truncated_tokens=truncated)


def terms(kind_sums: list[float], kind_tokens: list[int]) -> LossTerms:
    sources = [1, 0, 2]  # the sources are text, und, gen; kinds are understanding, text, generation
    return LossTerms(
        text_sum=torch.tensor(0.0),
        image_sum=torch.tensor(0.0),
        text_tokens=0,
        image_tokens=0,
        kind_sums=torch.tensor(kind_sums),
        kind_tokens=torch.tensor(kind_tokens),
        source_sums=torch.tensor([kind_sums[i] for i in sources]),
        source_tokens=torch.tensor([kind_tokens[i] for i in sources]),
    )


def tallies() -> list[StepTally]:
    """Two ranks; the second has two micro-batches."""
    first, second = StepTally(N_SOURCES), StepTally(N_SOURCES)
    first.count(batch([Kind.UNDERSTANDING, Kind.GENERATION]))
    first.add_losses(terms([6.0, 0.0, 8.0], [2, 0, 4]), torch.tensor(1.5, requires_grad=True))
    second.count(batch([Kind.TEXT, Kind.TEXT], continued=0, skipped=1, truncated=7))
    second.add_losses(terms([0.0, 9.0, 0.0], [0, 3, 0]), torch.tensor(0.25))
    second.count(batch([Kind.GENERATION]))
    second.add_losses(terms([0.0, 0.0, 4.0], [0, 0, 4]), torch.tensor(0.25))
    return [first, second]


def totals() -> StepTotals:
    table = [
        tally.vector(
            step_s=2.0 + rank, data_wait_s=0.5 - 0.1 * rank, signal_number=15 * rank, signature=9, peak_gib=1.0 + rank
        )
        for rank, tally in enumerate(tallies())
    ]
    return StepTotals(N_SOURCES, torch.stack(table))


def values(unit: RatioUnit = RatioUnit.samples) -> dict[str, float]:
    return step_values(
        totals(), source_names=NAMES, ratio_unit=unit, lr=1e-3, grad_norm=0.5, flops=3e12, peak_flops=1e12
    )


def test_the_keys_are_those_of_the_design():
    assert values().keys() == KEYS


def test_losses_are_sums_over_ranks_divided_by_counts_over_ranks():
    result = values()
    assert result["loss/total"] == 2.0
    assert (result["loss/understanding"], result["loss/text"], result["loss/generation"]) == (3.0, 3.0, 1.5)
    assert (result["loss/source/und"], result["loss/source/text"], result["loss/source/gen"]) == (3.0, 3.0, 1.5)


def test_mixture_counts_samples_once_and_tokens_by_length():
    parts = [batch([Kind.UNDERSTANDING, Kind.GENERATION]), batch([Kind.TEXT, Kind.TEXT]), batch([Kind.GENERATION])]
    by_kind = {kind: 0 for kind in KINDS}
    for part in parts:
        for length, kind in zip(part.document_lengths.tolist(), part.document_kinds.tolist(), strict=True):
            by_kind[KINDS[kind]] += length
    samples, tokens = values(), values(RatioUnit.tokens)
    assert [samples[f"mixture/{kind}"] for kind in KINDS] == [0.25, 0.25, 0.5], (
        "the continued text was counted where it began"
    )
    assert [tokens[f"mixture/{kind}"] for kind in KINDS] == pytest.approx(
        [by_kind[kind] / sum(by_kind.values()) for kind in KINDS]
    )
    assert [tokens[f"tokens/{kind}"] for kind in KINDS] == [by_kind[kind] for kind in KINDS]
    assert samples["tokens/total"] == sum(by_kind.values()) and samples["packing/fill"] == pytest.approx(
        sum(by_kind.values()) / (3 * 256)
    )


def test_times_and_memory_are_those_of_the_slowest_rank():
    result = values()
    assert (result["time/step_s"], result["time/data_wait_s"], result["memory/peak_gib"]) == (3.0, 0.5, 2.0)
    assert result["perf/tokens_per_s"] == pytest.approx(result["tokens/total"] / 3.0) and result[
        "perf/mfu"
    ] == pytest.approx(1.0)


def test_signals_skips_and_truncation_of_any_rank_are_seen_by_all():
    result = totals()
    assert result.signal == 15 and result.skipped == 1 and result.signatures == [9, 9]
    assert result.source_samples() == [1, 1, 2], "sources are text, und, gen; the continued text was counted before"
    assert values()["packing/truncated_tokens"] == 7 and values()["data/skipped"] == 1


def test_a_kind_without_a_supervised_token_has_no_loss():
    tally = StepTally(1)
    tally.count(replace(batch([Kind.TEXT]), document_sources=torch.zeros(1, dtype=torch.int64)))
    vector = tally.vector(step_s=1.0, data_wait_s=0.0, peak_gib=0.0)
    result = step_values(
        StepTotals(1, exchange(vector)),
        source_names=["a"],
        ratio_unit=RatioUnit.samples,
        lr=0.0,
        grad_norm=0.0,
        flops=0.0,
        peak_flops=1.0,
    )
    assert not {key for key in result if key.startswith("loss/")} - {"loss/total"}


def test_the_vector_has_a_place_for_every_field():
    places = fields(N_SOURCES)
    assert max(place.stop for place in places.values()) == len(tallies()[0].vector(step_s=1.0, data_wait_s=0.0))


def test_validation_means_over_tokens_within_a_kind_and_over_kinds_in_total():
    result = validation_values(
        {"a": ("text", 10.0, 5.0), "b": ("text", 2.0, 1.0), "c": ("generation", 8.0, 2.0), "empty": ("text", 0.0, 0.0)}
    )
    assert result == {
        "val/a": 2.0,
        "val/b": 2.0,
        "val/c": 4.0,
        "val/text": 2.0,
        "val/generation": 4.0,
        "val/total": 3.0,
    }


def test_json_has_no_nan_at_any_depth():
    assert json_safe({"a": float("nan"), "b": [1.0, float("inf")], "c": {"d": -float("inf"), "e": "x"}}) == {
        "a": None,
        "b": [1.0, None],
        "c": {"d": None, "e": "x"},
    }


def digest(*ranks: list[PackedBatch]) -> float:
    """`data/rows_digest` of a step whose ranks had these micro-batches."""
    tallies = []
    for batches in ranks:
        tally = StepTally(N_SOURCES)
        for item in batches:
            tally.count(item)
        tallies.append(tally.vector(step_s=1.0, data_wait_s=0.0))
    table = StepTotals(N_SOURCES, torch.stack(tallies))
    return step_values(
        table, source_names=NAMES, ratio_unit=RatioUnit.samples, lr=0.0, grad_norm=0.0, flops=1.0, peak_flops=1.0
    )["data/rows_digest"]


def test_the_rows_digest_knows_the_rows_and_not_the_ranks() -> None:
    a, b, c = batch([Kind.TEXT]), batch([Kind.UNDERSTANDING]), batch([Kind.GENERATION, Kind.TEXT])
    whole = digest([a, b, c])
    assert whole == digest([a], [b, c]) == digest([c], [a], [b]) == int(whole) > 0
    assert whole < 2**32
    assert whole != digest([a, b]) != digest([a, b, b])
    shifted = replace(
        a, provenance=tuple(tuple(replace(document, start=1) for document in row) for row in a.provenance)
    )
    assert digest([shifted, b, c]) != whole
