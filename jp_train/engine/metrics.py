"""The numbers of one optimizer step: tallied on each rank, exchanged once, then turned into the metrics.jsonl keys.

What a rank sends the others at the end of a step is in one float64 vector, and one all-gather makes the
[ranks, fields] table that every rank reads the same sums and maxima from. Signals ride along, so that all ranks stop
after the same step.
"""

from __future__ import annotations

import resource
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from jp_train.config.choices import RatioUnit
from jp_train.types import KINDS, LossTerms, PackedBatch, Provenance

GIB = 2**30


class StepTally:
    """One rank's numbers of one step. `count` reads the CPU batch, `add_losses` keeps device tensors unread until
    `vector`."""

    def __init__(self, n_sources: int) -> None:
        self.n_sources = n_sources
        self.counts: dict[str, list[float]] = {name: [0.0] * width for name, width in _count_fields(n_sources).items()}
        self._losses: torch.Tensor | None = None

    def count(self, batch: PackedBatch) -> None:
        """Tokens, documents, images, truncation and skips of one micro-batch (CPU tensors: nothing waits for a
        device)."""
        counts = self.counts
        lengths = batch.document_lengths.tolist()
        kinds = batch.document_kinds.tolist()
        sources = batch.document_sources.tolist()
        # a text that was cut at a row's end counts as one sample: where it starts
        starts = [document.start for row in batch.provenance for document in row] or [0] * len(lengths)
        assert len(starts) == len(lengths), (
            f"{len(starts)} provenance entries for {len(lengths)} documents: a bug in collate"
        )
        for length, kind, source, start in zip(lengths, kinds, sources, starts, strict=True):
            counts["kind_all_tokens"][kind] += length
            counts["squared_lengths"][0] += length * length
            if start == 0:
                counts["kind_samples"][kind] += 1
                counts["source_samples"][source] += 1
        counts["text_tokens"][0] += batch.supervised_text_tokens
        counts["image_tokens"][0] += batch.supervised_image_tokens
        counts["und_images"][0] += len(batch.und_images)
        counts["gen_images"][0] += len(batch.gen_ids)
        counts["encoded_images"][0] += len(batch.gen_pending)
        counts["rows"][0] += batch.rows
        counts["capacity"][0] += batch.rows * batch.seq_len
        counts["truncated_tokens"][0] += batch.truncated_tokens
        counts["skipped"][0] += len(batch.skipped)
        counts["rows_digest"][0] += sum(map(row_digest, batch.provenance))

    def add_losses(self, terms: LossTerms, contribution: torch.Tensor) -> None:
        """One micro-batch's sums; `contribution` is what was differentiated (before the factor of the ranks)."""
        parts = (contribution.reshape(1), terms.kind_sums, terms.kind_tokens, terms.source_sums, terms.source_tokens)
        values = torch.cat([part.detach().to(torch.float64) for part in parts])
        self._losses = values if self._losses is None else self._losses + values

    @property
    def contribution(self) -> torch.Tensor:
        """This rank's share of the step's loss so far, float64 [1], on the losses' device."""
        assert self._losses is not None, "add_losses comes first"
        return self._losses[:1]

    def vector(
        self,
        *,
        step_s: float,
        data_wait_s: float,
        signal_number: int = 0,
        signature: int = 0,
        peak_gib: float | None = None,
    ) -> torch.Tensor:
        """float64 [fields] on the losses' device; `fields` names them. `signature`: of the modules this rank ran
        (`engine/watch/guard.py`)."""
        losses = (
            self._losses
            if self._losses is not None
            else torch.zeros(_width(_loss_fields(self.n_sources)), dtype=torch.float64)
        )
        numbers = [number for values in self.counts.values() for number in values]
        peak = peak_memory_gib() if peak_gib is None else peak_gib
        numbers += [step_s, data_wait_s, peak, reserved_memory_gib(), float(signal_number), float(signature)]
        return torch.cat((losses, torch.tensor(numbers, dtype=torch.float64, device=losses.device)))


def row_digest(row: Sequence[Provenance]) -> int:
    """CRC-32 over source, shard file name, key and token span of a row's documents: below 2**32, so that sums over a
    step are exact."""
    parts = [f"{d.source}\0{d.shard}\0{d.key}\0{d.start}\0{d.length}\1" for d in row]
    return zlib.crc32("".join(parts).encode("utf-8", "surrogateescape"))


def _loss_fields(n_sources: int) -> dict[str, int]:
    return {"contribution": 1, "kind_sums": 3, "kind_tokens": 3, "source_sums": n_sources, "source_tokens": n_sources}


def _count_fields(n_sources: int) -> dict[str, int]:
    single = (
        "squared_lengths",
        "text_tokens",
        "image_tokens",
        "und_images",
        "gen_images",
        "encoded_images",
        "rows",
        "capacity",
    )
    return {
        "kind_all_tokens": 3,
        "kind_samples": 3,
        "source_samples": n_sources,
        **dict.fromkeys(single, 1),
        "truncated_tokens": 1,
        "skipped": 1,
        "rows_digest": 1,
    }


_MAXIMA = {"step_s": 1, "data_wait_s": 1, "peak_gib": 1, "reserved_gib": 1, "signal": 1, "signature": 1}


def _width(fields: dict[str, int]) -> int:
    return sum(fields.values())


def fields(n_sources: int) -> dict[str, slice]:
    """Where each field lies in a tally's vector."""
    places, start = {}, 0
    for name, width in {**_loss_fields(n_sources), **_count_fields(n_sources), **_MAXIMA}.items():
        places[name] = slice(start, start + width)
        start += width
    return places


def exchange(vector: torch.Tensor) -> torch.Tensor:
    """Every rank's vector, float64 [ranks, fields] on the CPU, the same on every rank. The only collective of this
    module."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return vector.unsqueeze(0).cpu()
    table = [torch.empty_like(vector) for _ in range(dist.get_world_size())]
    dist.all_gather(table, vector.contiguous())
    return torch.stack(table).cpu()


@dataclass(frozen=True)
class StepTotals:
    """A step's table, read: sums over ranks for counts and losses, maxima for times, memory and signals."""

    n_sources: int
    table: torch.Tensor

    def total(self, name: str) -> list[float]:
        """Sum over ranks of a field, one number per element of it."""
        return self.table[:, fields(self.n_sources)[name]].sum(0).tolist()

    def highest(self, name: str) -> float:
        """Maximum over ranks of a one-element field."""
        return float(self.table[:, fields(self.n_sources)[name]].max())

    @property
    def skipped(self) -> int:
        """Documents of this step that could not be used, over all ranks."""
        return int(self.total("skipped")[0])

    @property
    def signal(self) -> int:
        """The stop signal that any rank has received, 0 for none."""
        return int(self.highest("signal"))

    @property
    def signatures(self) -> list[int]:
        """The signature of every rank, by rank."""
        return [int(number) for number in self.table[:, fields(self.n_sources)["signature"]].flatten()]

    def source_samples(self) -> list[int]:
        """Documents per source that this step used (a cut text counts where it starts)."""
        return [int(number) for number in self.total("source_samples")]


def step_values(
    totals: StepTotals,
    *,
    source_names: Sequence[str],
    ratio_unit: RatioUnit,
    lr: float,
    grad_norm: float,
    flops: float,
    peak_flops: float,
) -> dict[str, float]:
    """The metrics.jsonl values of one step (without `step` and `val/...`).

    `flops`: floating-point operations of the whole step over all ranks; `peak_flops`: per second, of all devices
    together. A kind or source without a supervised token in this step has no loss key.
    """
    values: dict[str, float] = {"loss/total": totals.total("contribution")[0]}
    for kind, loss, count in zip(KINDS, totals.total("kind_sums"), totals.total("kind_tokens"), strict=True):
        if count:
            values[f"loss/{kind}"] = loss / count
    for name, loss, count in zip(source_names, totals.total("source_sums"), totals.total("source_tokens"), strict=True):
        if count:
            values[f"loss/source/{name}"] = loss / count

    tokens = totals.total("kind_all_tokens")
    values["tokens/total"] = sum(tokens)
    shares = tokens if ratio_unit is RatioUnit.tokens else totals.total("kind_samples")
    for kind, count, share in zip(KINDS, tokens, shares, strict=True):
        values[f"tokens/{kind}"] = count
        values[f"mixture/{kind}"] = share / max(1.0, sum(shares))

    step_s = totals.highest("step_s")
    values["packing/fill"] = sum(tokens) / max(1.0, totals.total("capacity")[0])
    values["packing/truncated_tokens"] = totals.total("truncated_tokens")[0]
    values["data/skipped"] = totals.total("skipped")[0]
    # a sum over rows knows no ranks: equal digests at equal steps mean the same rows, whatever the world sizes
    values["data/rows_digest"] = totals.total("rows_digest")[0] % 2**32
    values["time/step_s"] = step_s
    values["time/data_wait_s"] = totals.highest("data_wait_s")
    values["perf/tokens_per_s"] = sum(tokens) / step_s
    values["perf/mfu"] = flops / step_s / peak_flops
    values["optim/lr"] = lr
    values["optim/grad_norm"] = grad_norm
    values["memory/peak_gib"] = totals.highest("peak_gib")
    if reserved := totals.highest("reserved_gib"):
        values["memory/reserved_gib"] = reserved
    return values


def validation_values(sums: dict[str, tuple[str, float, float]]) -> dict[str, float]:
    """`val/...` values from {source: (kind, summed loss, supervised tokens)}, already summed over ranks.

    `val/SOURCE` and `val/KIND` are means over tokens; `val/total` is the mean over the kinds present, each counting
    once, so that patience does not follow the kind with the most tokens only.
    """
    values: dict[str, float] = {}
    kinds: dict[str, list[float]] = {}
    for name, (kind, loss, count) in sums.items():
        if count:
            values[f"val/{name}"] = loss / count
            total = kinds.setdefault(kind, [0.0, 0.0])
            total[0] += loss
            total[1] += count
    for kind, (loss, count) in kinds.items():
        values[f"val/{kind}"] = loss / count
    if kinds:
        values["val/total"] = sum(loss / count for loss, count in kinds.values()) / len(kinds)
    return values


def peak_memory_gib() -> float:
    """Highest memory of this rank so far: allocated device memory, or the process's resident memory without a
    device."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def reserved_memory_gib() -> float:
    """Most device memory that torch has held on this rank so far, in use or not; 0 without a device."""
    return torch.cuda.max_memory_reserved() / GIB if torch.cuda.is_initialized() else 0.0
