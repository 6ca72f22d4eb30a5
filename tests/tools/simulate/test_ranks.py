"""The rows of a run do not know how many ranks made them: 1 -> 4 -> 2 -> 8 ranks across restarts, over hard data."""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from jp_train.config.batch import batch_plan
from jp_train.config.schema import RunConfig, SourceConfig, SourceKind
from jp_train.data.index import index_sources
from jp_train.data.loader import StepLoader, build_plan, rows_hash
from jp_train.types import Kind, PackedBatch, RowSpec
from tests.data.data_samples import generation_samples, stored_samples, text_samples, understanding_samples, write_shard

WORLDS = (1, 4, 2, 8)
LEGS = (5, 4, 6, 4)
"""Steps between the restarts: the run is killed after each, with one more world size to go on with."""
BROKEN = frozenset({"g0003", "u0005", "g0011"})


@dataclass(frozen=True)
class Data:
    """A way to lay out the sources: samples per source, and shards of the largest one."""

    counts: tuple[int, int, int, int]
    shards: int
    broken: frozenset[str] = frozenset()


CASES = {
    "plain": Data((25, 9, 17, 21), 3),
    "bad samples": Data((25, 9, 17, 21), 3, BROKEN),
    "fewer shards than ranks": Data((25, 9, 17, 21), 1),
    "a source of 3 samples": Data((25, 3, 17, 21), 2, BROKEN),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request, cfg, tmp_path) -> tuple[RunConfig, Data]:
    data: Data = request.param
    real, stored, und, text = data.counts

    def damaged(samples):
        return [
            (key, {**fields, "png": fields["png"][:60]} if key in data.broken else fields) for key, fields in samples
        ]

    samples = damaged(generation_samples(real))
    for shard in range(data.shards):
        write_shard(tmp_path / f"real-{shard}.tar", samples[shard :: data.shards])
    write_shard(tmp_path / "stored.tar", stored_samples(stored))
    write_shard(tmp_path / "und.tar", damaged(understanding_samples(und)))
    write_shard(tmp_path / "text.tar", text_samples(text))
    cfg.data.root = str(tmp_path)
    cfg.data.sources = {
        "real": SourceConfig(kind=SourceKind.generation, shards="real-*.tar"),
        "stored": SourceConfig(kind=SourceKind.generation, shards="stored.tar"),
        "und": SourceConfig(kind=SourceKind.understanding, shards="und.tar"),
        "text": SourceConfig(kind=SourceKind.text, shards="text.tar"),
    }
    cfg.stage.mixture.understanding, cfg.stage.mixture.text, cfg.stage.mixture.generation = 2, 3, 5
    cfg.stage.batch_unit = type(cfg.stage.batch_unit).packed
    cfg.stage.batch_size = 8
    cfg.data.pad_dropout, cfg.data.first_sentence = 0.2, 0.4
    cfg.data.skip_minimum = 10_000
    return cfg, data


def run_of_ranks(
    cfg: RunConfig, tokenizer, world: int, steps: int, state: dict | None, workers: Callable[[int], int]
) -> tuple[list, dict]:
    """`steps` steps of `world` ranks, each with its own plan and loader, as [step][rank] -> micro-batches; and the
    state to go on from."""
    of_ranks, states = [], []
    for rank in range(world):
        cfg.data.workers = workers(rank)
        indexes, batch = index_sources(cfg, tokenizer), batch_plan(cfg, world)
        plan = build_plan(cfg, indexes, batch, tokenizer)
        if state is not None:
            plan.restore(state)
        with StepLoader(cfg, plan, indexes, tokenizer, dp_rank=rank, dp_world_size=world, batch_plan=batch) as loader:
            taken = list(itertools.islice(loader, steps))
        of_ranks.append([step.micro_batches for step in taken])
        states.append(json.dumps(taken[-1].plan_state, sort_keys=True))
    assert len(set(states)) == 1, "every rank would store the same state"
    return list(zip(*of_ranks, strict=True)), json.loads(states[0])


def chained(cfg: RunConfig, tokenizer) -> Iterator[list[PackedBatch]]:
    """The micro-batches of every step, in order of rank, of one run that changes its world size at each restart."""
    state = None
    for leg, (world, steps) in enumerate(zip(WORLDS, LEGS, strict=True)):
        # In the second and third run the first rank loads with processes, whose prefetch is lost at the restart.
        of_steps, state = run_of_ranks(
            cfg, tokenizer, world, steps, state, lambda rank, leg=leg: int(rank == 0 and leg in (1, 2))
        )
        for ranks in of_steps:
            yield [batch for batches in ranks for batch in batches]


def planned(cfg: RunConfig, tokenizer, steps: int) -> list[list[RowSpec]]:
    cfg.data.workers = 0
    indexes = index_sources(cfg, tokenizer)
    plan = build_plan(cfg, indexes, batch_plan(cfg, 1), tokenizer)
    return [plan.next_step() for _ in range(steps)]


def test_rows_are_hash_identical_for_1_4_2_and_8_ranks_across_restarts_and_no_document_is_lost_or_repeated(
    case, tokenizer
) -> None:
    cfg, data = case
    total = sum(LEGS)
    undisturbed, _ = run_of_ranks(cfg, tokenizer, 1, total, None, lambda rank: 0)
    plan = planned(cfg, tokenizer, total)
    indexes = index_sources(cfg, tokenizer)
    lost: Counter[str] = Counter()
    spans: dict[tuple[int, int, int], list[tuple[int, int]]] = defaultdict(list)
    for number, batches in enumerate(chained(cfg, tokenizer)):
        assert rows_hash(batches) == rows_hash(undisturbed[number][0]), f"step {number}"
        # The plan's own order: what it names is in the row, in its place, or is skipped with its name.
        rows = [row for batch in batches for row in batch.provenance]
        skipped = {
            (bad.ref.source, bad.ref.epoch, bad.ref.sample): bad.info.key for batch in batches for bad in batch.skipped
        }
        lost.update(skipped.values())
        for spec, row in zip(plan[number], rows, strict=True):
            kept = [ref for ref in spec.documents if (ref.source, ref.epoch, ref.sample) not in skipped]
            expected = [(indexes[ref.source].name, ref.start, ref.length) for ref in kept]
            assert [(document.source, document.start, document.length) for document in row] == expected
            for ref in spec.documents:
                spans[ref.source, ref.epoch, ref.sample].append((ref.start, ref.length))
    assert number == total - 1
    assert set(lost) <= data.broken and bool(lost) == bool(data.broken)
    _nothing_dropped_repeated_or_cut(indexes, spans, plan)


def _nothing_dropped_repeated_or_cut(indexes, spans, plan: list[list[RowSpec]]) -> None:
    """Of the planned documents: whole ones once, texts in touching pieces, and every earlier epoch of a source
    complete."""
    last_row = {(ref.source, ref.epoch, ref.sample) for ref in plan[-1][-1].documents}
    epochs: dict[int, Counter[int]] = defaultdict(Counter)
    for key, pieces in spans.items():
        source, epoch, _ = key
        epochs[source][epoch] += 1
        is_text = indexes[source].kind is Kind.TEXT
        assert len(pieces) == 1 or is_text, "a document with an image is never cut or repeated"
        assert all(start == before + length for (before, length), (start, _) in itertools.pairwise(pieces)), (
            "pieces touch"
        )
        assert pieces[0][0] == 0
        if is_text and key not in last_row:
            assert pieces[-1][0] + pieces[-1][1] == int(indexes[source].tokens[key[2]])
    for source, counts in epochs.items():
        size = len(indexes[source])
        # At most the pool's 64 documents are still to come; an epoch that began 64 draws before the newest one is
        # complete.
        for epoch in range(max(counts) - -(-64 // size)):
            assert counts[epoch] == size, f"source {indexes[source].name}: epoch {epoch}"
    assert max(max(counts) for counts in epochs.values()) >= 3, "sources were run through several times"
