"""Every row of every step is a pure function of the recipe, the lengths, the seed and the row number."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jp_train.config.schema import DataConfig
from jp_train.data.mixture import realised_shares
from jp_train.data.permute import document_uniform, name_key, permute
from jp_train.data.plan import Plan, PlanSource
from jp_train.data.sequence import LENGTH, NUMBER, DocumentRules, SourceSequence, row_specs
from jp_train.errors import ConfigError, DataError
from jp_train.types import KINDS, DocumentRef, Kind, RowSpec

U, T, G = KINDS
DIGEST = "1d4c806b745723c8096156ecb14d4983a0fb80a8d62e6a3ee35a7de9eebd57a1"
PRESET_MIXTURES = [(1, 0, 3), (2, 3, 5), (5, 1, 4), (1, 0, 1), (7, 3, 10)]


def lengths(kind: Kind, samples: int, seed: int = 0) -> np.ndarray:
    """Log-normal lengths like those of bench/planner.py: int32 [samples]."""
    fixed, mean, sigma = {U: (579, 200, 0.6), T: (2, 1000, 1.0), G: (580, 80, 0.8)}[kind]
    words = np.random.default_rng([KINDS.index(kind), seed]).lognormal(np.log(mean) - sigma**2 / 2, sigma, samples)
    return (fixed + np.clip(words, 3, 20_000)).astype(np.int32)


def source(
    kind: Kind, tokens: Sequence[int] | np.ndarray | None = None, name: str = "", **settings: object
) -> PlanSource:
    tokens = lengths(kind, 2000) if tokens is None else np.asarray(tokens, np.int32)
    return PlanSource(name=name or kind.value, kind=kind, tokens=tokens, **{"cuttable": kind is T, **settings})


def make_plan(sources: Sequence[PlanSource] | None = None, **settings: object) -> Plan:
    """A plan at 2:3:5 with rows of 4096 unless told otherwise."""
    defaults = {"seed": 11, "rows_per_step": 8, "seq_len": 4096, "pool_size": 64, "mixture": (2, 3, 5)}
    return Plan([source(kind) for kind in KINDS] if sources is None else sources, **{**defaults, **settings})


def take(plan: Plan, steps: int) -> list[list[RowSpec]]:
    return [plan.next_step() for _ in range(steps)]


def documents_of(steps: list[list[RowSpec]]) -> list[DocumentRef]:
    return [document for rows in steps for row in rows for document in row.documents]


def tokens_of(row: RowSpec) -> int:
    return sum(document.length for document in row.documents)


VARIANTS = {
    "packed": {},
    "tokens": {"ratio_unit": "tokens"},
    "sampled": {"mix": "sampled"},
    "sampled tokens": {"mix": "sampled", "ratio_unit": "tokens"},
    "samples": {"samples_per_row": 3, "over_long": "drop"},
    "long texts": {"seq_len": 1500, "pool_size": 16},
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def variant(request: pytest.FixtureRequest) -> dict[str, object]:
    return request.param


# Purity and restoring


def test_rows_are_numbered_fit_and_are_never_empty(variant: dict[str, object]) -> None:
    plan = make_plan(**variant)
    for step in range(20):
        assert plan.step == step
        rows = plan.next_step()
        assert [(row.step, row.row) for row in rows] == [(step, number) for number in range(8)]
        assert all(0 < tokens_of(row) <= plan.seq_len for row in rows)


def test_a_run_restored_at_random_steps_equals_the_undisturbed_run(variant: dict[str, object]) -> None:
    undisturbed = take(make_plan(**variant), 60)
    draw, plan, disturbed = random.Random(3), make_plan(**variant), []
    while len(disturbed) < 60:
        disturbed += take(plan, draw.randrange(1, 9))
        saved = json.dumps(plan.state())
        plan = make_plan(**variant)
        plan.restore(json.loads(saved))
    assert disturbed[:60] == undisturbed


def test_a_rank_is_given_its_own_rows_and_nobody_elses(variant: dict[str, object]) -> None:
    whole, ranks = make_plan(**variant), [make_plan(**variant) for _ in range(4)]
    for _ in range(10):
        rows = whole.next_step()
        assert [rank.next_step(2 * number, 2 * number + 2) for number, rank in enumerate(ranks)] == [
            rows[n : n + 2] for n in (0, 2, 4, 6)
        ]
    assert all(rank.state() == whole.state() for rank in ranks)


def test_saving_looking_and_the_snapshot_interval_change_nothing(variant: dict[str, object]) -> None:
    undisturbed = take(make_plan(**variant), 30)
    plan, draw = make_plan(snapshot_steps=7, **variant), random.Random(4)
    for step in range(30):
        for _ in range(draw.randrange(3)):
            plan.state()
        if draw.random() < 0.3:
            plan.rows_at(draw.randrange(40))
        assert plan.next_step() == undisturbed[step]


def test_any_step_is_reached_in_any_order_from_any_plan(variant: dict[str, object]) -> None:
    steps = take(make_plan(**variant), 40)
    fresh, ahead = make_plan(snapshot_steps=10, **variant), make_plan(snapshot_steps=10, **variant)
    take(ahead, 35)
    draw = random.Random(5)
    for _ in range(8):
        step = draw.randrange(40)
        assert fresh.rows_at(step) == steps[step]
        assert ahead.rows_at(step) == steps[step]
    assert fresh.step == 0 and ahead.step == 35


def test_snapshots_let_another_process_start_its_fold_near_the_step() -> None:
    first = make_plan(snapshot_steps=10)
    steps = take(first, 40)
    snapshots = json.loads(json.dumps(first.snapshots()))
    assert [snapshot["step"] for snapshot in snapshots] == [0, 10, 20, 30, 40]
    other = make_plan(snapshot_steps=1000)
    for snapshot in snapshots:
        other.add_snapshot(snapshot)
    assert other.rows_at(33) == steps[33]
    assert other.rows_at(34) == steps[34]


def test_rows_are_the_same_in_every_process_and_on_every_platform() -> None:
    """The digest is literal: if it changes, runs in progress cannot be continued; then raise plan.STATE_VERSION."""
    script = Path(__file__).with_name("plan_digest.py")
    completed = subprocess.run(
        [sys.executable, str(script)],
        env={"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert completed.stdout.strip() == DIGEST


def calls_made_by(work: Callable[[], object]) -> int:
    """How many Python and built-in functions are called while `work` runs."""
    counts = Counter()
    sys.setprofile(lambda _frame, event, _argument: counts.update([event]))
    try:
        work()
    finally:
        sys.setprofile(None)
    return counts["call"] + counts["c_call"]


def test_state_is_a_few_kilobytes_for_twelve_sources_at_any_step_and_restoring_costs_the_same() -> None:
    sources = [
        source(kind, lengths(kind, 500, number), name=f"{kind}_{number}") for kind in KINDS for number in range(4)
    ]
    plan = make_plan(sources, rows_per_step=1)
    take(plan, 10)
    early = plan.state()
    # A late state: the same pool, with every source as far as it would be after 100,000 steps.
    late = json.loads(
        json.dumps({**early, "step": 100_000, "positions": [position + 500_000 for position in early["positions"]]})
    )
    calls = {}
    for name, state in (("early", early), ("late", late)):
        assert len(json.dumps(state)) < 10_000
        fresh = make_plan(sources, rows_per_step=1)
        calls[name] = calls_made_by(lambda fresh=fresh, state=state: (fresh.restore(state), fresh.next_step()))
    # Work is counted, not timed: replaying 500,000 samples of each source would be thousands of times as much.
    assert 10 < calls["late"] < 3 * calls["early"] + 1000


def test_a_state_of_another_plan_is_refused_and_the_difference_named() -> None:
    plan = make_plan()
    take(plan, 3)
    state = json.loads(json.dumps(plan.state()))
    for difference, other in {
        "seed: the state has 11, this run has 12": make_plan(seed=12),
        "rows_per_step: the state has 8, this run has 4": make_plan(rows_per_step=4),
        "mixture: the state has 2:3:5, this run has 1:1:1": make_plan(mixture=(1, 1, 1)),
        "sources.text: .* lengths": make_plan([source(U), source(T, lengths(T, 2000, 9)), source(G)]),
        "sources.more: the state has none": make_plan([source(kind) for kind in KINDS] + [source(G, name="more")]),
    }.items():
        with pytest.raises(DataError, match=difference):
            other.restore(state)
    with pytest.raises(DataError, match="version"):
        plan.restore({**state, "version": 99})
    with pytest.raises(DataError, match="lacks pool"):
        plan.restore({key: value for key, value in state.items() if key != "pool"})
    make_plan(snapshot_steps=3, training_steps=500).restore(state)  # neither changes a row


def test_lengths_are_fingerprinted_by_value_not_by_how_they_are_stored() -> None:
    as_int64 = [replace(source(kind), tokens=lengths(kind, 2000).astype(np.int64)) for kind in KINDS]
    assert make_plan(as_int64).fingerprint() == make_plan().fingerprint()


# Nothing lost, nothing twice


def test_every_token_of_every_document_is_placed_once_in_order_and_only_texts_are_cut(
    variant: dict[str, object],
) -> None:
    plan = make_plan(**variant)
    spans: dict[tuple[int, int, int], list[tuple[int, int, int]]] = defaultdict(list)
    rows = [row for step in take(plan, 80) for row in step]
    for number, row in enumerate(rows):
        for document in row.documents:
            spans[document.source, document.epoch, document.sample].append((number, document.start, document.length))
    texts_cut = 0
    for (index, _, sample), pieces in spans.items():
        whole = int(plan.sources[index].tokens[sample])
        if len(pieces) > 1:
            assert plan.sources[index].cuttable and plan.samples_per_row is None
            assert [row for row, _, _ in pieces] == list(range(pieces[0][0], pieces[0][0] + len(pieces))), (
                "consecutive rows"
            )
            texts_cut += 1
        position = 0
        for _, start, length in pieces:
            assert start == position and length > 0
            position += length
        in_progress = pieces[-1][0] == len(rows) - 1 and plan.sources[index].cuttable
        assert position == whole or (in_progress and position < whole)
    assert texts_cut > 0 or plan.samples_per_row is not None


def test_every_sample_of_an_epoch_is_used_once_in_the_order_of_the_permutation_up_to_the_pool(
    variant: dict[str, object],
) -> None:
    sources = [source(kind, np.minimum(lengths(kind, 50), 1400)) for kind in KINDS]
    plan = make_plan(sources, **variant)
    firsts = [document for document in documents_of(take(plan, 60)) if document.start == 0]
    for index, kind in enumerate(KINDS):
        documents = [document for document in firsts if document.source == index]
        place = {}  # of a sample in an epoch's order, by the scalar permutation
        for epoch in {document.epoch for document in documents}:
            place.update(
                {(epoch, permute((plan.seed, name_key(kind.value), epoch), draw, 50)): draw for draw in range(50)}
            )
        used = [document.epoch * 50 + place[document.epoch, document.sample] for document in documents]
        assert len(used) > 150 and len(set(used)) == len(used)
        pending = {number for owner, number in plan.state()["pool"] if owner == index}
        assert set(used) | pending >= set(range(max(used) + 1)), "none is passed over"


def test_bulk_references_equal_constructed_ones() -> None:
    rules = DocumentRules(seed=5, limit=4096, cut_texts=True, drop=False, first_sentence=0.5, pad_dropout=0.0)
    captions = source(G, short_tokens=np.full(2000, 590, np.int32))
    drawn = SourceSequence(captions, 3, rules).documents(np.arange(3000))
    (row,) = row_specs(2, 9, drawn, [3000])
    assert (row.step, row.row) == (2, 9)
    for number, length, ref in zip(drawn[NUMBER].tolist(), drawn[LENGTH].tolist(), row.documents, strict=True):
        epoch, place = divmod(number, 2000)
        sample = permute((5, name_key("generation"), epoch), place, 2000)
        short = document_uniform(5, "generation", epoch, sample, "first_sentence") < 0.5
        expected_length = 590 if short else int(captions.tokens[sample])
        expected = DocumentRef(
            source=3, epoch=epoch, sample=sample, start=0, length=length, short_caption=short, truncated=0
        )
        assert (
            ref == expected
            and hash(ref) == hash(expected)
            and length == expected_length
            and type(ref.short_caption) is bool
        )


def test_adding_a_source_reshuffles_no_other() -> None:
    def order(sources: list[PlanSource]) -> list[tuple[int, int]]:
        plan = make_plan(sources, mixture=(1, 0, 1), samples_per_row=2)  # first in, first out
        return [
            (d.epoch, d.sample) for d in documents_of(take(plan, 50)) if plan.sources[d.source].name == "generation"
        ]

    alone, joined = order([source(U), source(G)]), order([source(G, name="new"), source(U), source(G)])
    assert len(joined) > 100
    assert joined == alone[: len(joined)]


# Ratio, fill, waiting


@pytest.mark.parametrize("unit", ["samples", "tokens"])
@pytest.mark.parametrize("mixture", PRESET_MIXTURES, ids=str)
def test_any_20_consecutive_steps_of_64_rows_are_within_one_percent_of_the_mixture(
    mixture: tuple[int, ...], unit: str
) -> None:
    plan = make_plan(rows_per_step=64, mixture=mixture, ratio_unit=unit)
    check_windows(plan, mixture, tokens=unit == "tokens")


@pytest.mark.parametrize("mixture", [(1, 0, 3), (1, 0, 1)], ids=str)
def test_rows_that_close_after_two_samples_keep_the_mixture_exactly(mixture: tuple[int, ...]) -> None:
    plan = make_plan(rows_per_step=64, mixture=mixture, samples_per_row=2)
    check_windows(plan, mixture, tokens=False, bound=1 / 2560 + 1e-9)


def check_windows(plan: Plan, mixture: tuple[int, ...], *, tokens: bool, bound: float = 0.01) -> None:
    steps = take(plan, 45)
    for first in range(len(steps) - 19):
        window = [row for step in steps[first : first + 20] for row in step]
        realised = realised_shares(window, plan.sources, tokens=tokens)
        for kind, share in zip(KINDS, mixture, strict=True):
            assert abs(realised[kind] - share / sum(mixture)) <= bound


@pytest.mark.parametrize("mixture", PRESET_MIXTURES, ids=str)
def test_every_single_step_of_512_rows_is_close_to_the_mixture_and_rows_are_full(mixture: tuple[int, ...]) -> None:
    """At 4096 tokens and the default pool: 0.3 percentage points in the worst step, 99.6% full for 1:0:3 and 99.95%
    for the others."""
    pool_size = DataConfig().pool_size
    plan = make_plan(
        [source(kind, lengths(kind, 20_000)) for kind in KINDS], rows_per_step=512, mixture=mixture, pool_size=pool_size
    )
    tokens = 0
    for _ in range(12):
        rows = plan.next_step()
        tokens += sum(map(tokens_of, rows))
        realised = realised_shares(rows, plan.sources, tokens=False)
        assert (
            max(abs(realised[kind] - share / sum(mixture)) for kind, share in zip(KINDS, mixture, strict=True)) <= 0.003
        )
    assert tokens / (12 * 512 * 4096) >= (0.996 if mixture == (1, 0, 3) else 0.9995)


def test_sources_within_a_kind_follow_their_weights() -> None:
    """The paper's real : synthetic = 1 : 1 within generation, and a third source at a quarter of their weight."""
    sources = [
        source(U),
        source(T),
        source(G, name="real"),
        source(G, name="synthetic"),
        source(G, name="rare", weight=0.25),
    ]
    counts = Counter(d.source for d in documents_of(take(make_plan(sources, rows_per_step=64), 20)) if d.start == 0)
    generated = counts[2] + counts[3] + counts[4]
    assert [counts[index] / generated for index in (2, 3, 4)] == pytest.approx([4 / 9, 4 / 9, 1 / 9], abs=0.01)


@pytest.mark.parametrize("mixture", [(1, 0, 3), (2, 3, 5), (0, 1, 0)], ids=str)
def test_nobody_starves(mixture: tuple[int, ...]) -> None:
    """Each row takes the oldest document or finishes a cut text: nobody waits more than two rows for each of the
    pool's documents, plus the rows that long texts fill alone."""
    plan = make_plan(rows_per_step=1, mixture=mixture, seq_len=2048, pool_size=16, over_long="drop")
    since: dict[tuple[int, int], int] = {}
    longest = 0
    for row in range(1500):
        plan.next_step()
        pool = {(owner, number) for owner, number in plan.state()["pool"]}
        since = {key: since.get(key, row) for key in pool}
        longest = max(longest, row - min(since.values()))
    pieces = 0 if not mixture[1] else 20_000 // 2048 + 1
    assert longest <= 2 * 16 + pieces * 4
    assert mixture[1] or longest <= 16


def test_sampled_mixing_follows_the_mixture_in_the_long_run() -> None:
    for unit in ("samples", "tokens"):
        rows = [row for step in take(make_plan(mix="sampled", ratio_unit=unit, rows_per_step=256), 30) for row in step]
        realised = realised_shares(rows, make_plan().sources, tokens=unit == "tokens")
        assert [realised[kind] for kind in KINDS] == pytest.approx([0.2, 0.3, 0.5], abs=0.02)


# Step ranges


def test_a_source_is_used_from_its_first_step_and_never_at_or_after_its_last() -> None:
    """Janus: ImageNet generation first, other pictures from a step on."""
    sources = [source(U), source(T), source(G, name="imagenet", to_step=12), source(G, name="photos", from_step=12)]
    sources.append(source(G, name="both"))
    plan = make_plan(sources)
    used = [Counter(sources[d.source].name for d in documents_of([rows])) for rows in take(plan, 30)]
    assert all(step["imagenet"] and not step["photos"] for step in used[:12])
    assert all(step["photos"] and not step["imagenet"] for step in used[12:])
    late = sum(used[12:], Counter())
    assert late["photos"] == pytest.approx(late["both"], abs=40)
    realised = realised_shares([row for step in range(30) for row in plan.rows_at(step)], sources, tokens=False)
    assert [realised[kind] for kind in KINDS] == pytest.approx([0.2, 0.3, 0.5], abs=0.03)
    restored = make_plan(sources)
    restored.restore(json.loads(json.dumps(plan.state())))
    assert take(restored, 3) == take(plan, 3)
    assert [plan.rows_at(step) for step in (11, 12, 13)] == take(make_plan(sources), 14)[11:]


def test_a_text_begun_before_its_source_ends_is_finished() -> None:
    sources = [source(T, [3000] * 40, name="old", to_step=3), source(T, [3000] * 40, name="new", from_step=3)]
    steps = take(make_plan(sources, mixture=(0, 1, 0), rows_per_step=1, seq_len=1024), 9)
    pieces = [(sources[d.source].name, d.start) for d in documents_of(steps)]
    assert [name for name, start in pieces if start == 0 and name == "new"]
    placed = Counter()
    for document in documents_of(steps):
        placed[sources[document.source].name, document.epoch, document.sample] += document.length
    assert all(tokens == 3000 for (name, _, _), tokens in placed.items() if name == "old")


def test_a_kind_without_a_source_at_some_step_is_refused_at_construction_and_when_reached() -> None:
    sources = [source(U), source(G, to_step=5)]
    with pytest.raises(ConfigError, match="generation .* at step 5"):
        make_plan(sources, mixture=(1, 0, 1))
    plan = make_plan(sources, mixture=(1, 0, 1), training_steps=5)
    take(plan, 5)
    with pytest.raises(ConfigError, match="generation .* at step 5"):
        plan.next_step()


# Lengths: over-long, samples per row, draws


def test_over_long_documents_are_truncated_and_counted_but_images_are_not() -> None:
    tokens = [700, 5000, 6000, 800]
    sources = [source(U, tokens, min_tokens=np.array([600, 600, 5500, 600]))]
    plan = make_plan(sources, mixture=(1, 0, 0))
    seen = {(d.sample, d.length, d.truncated) for d in documents_of(take(plan, 20))}
    assert seen == {(0, 700, 0), (1, 4096, 904), (3, 800, 0)}
    draws = plan.state()["positions"][0]
    assert plan.dropped == {"understanding": pytest.approx(draws / 4, abs=1)}


def test_over_long_drop_passes_over_and_counts_them() -> None:
    plan = make_plan([source(U, [700, 5000, 6000, 800])], mixture=(1, 0, 0), over_long="drop")
    assert {d.sample for d in documents_of(take(plan, 20))} == {0, 3}
    assert plan.dropped == {"understanding": pytest.approx(plan.state()["positions"][0] / 2, abs=2)}


@pytest.mark.parametrize("over_long", ["truncate", "drop"])
def test_a_source_of_which_nothing_can_be_used_is_an_error_not_an_endless_search(over_long: str) -> None:
    with pytest.raises(DataError, match=r"'understanding': none of its 2 samples .* 5000 tokens.*4096"):
        make_plan([source(U, [5000, 6000], min_tokens=4500)], mixture=(1, 0, 0), over_long=over_long)


def test_rows_close_after_exactly_n_samples_even_when_the_oldest_do_not_fit() -> None:
    draw = np.random.default_rng(1)
    sources = [source(U, draw.integers(100, 900, 500)), source(G, draw.integers(100, 300, 500))]
    plan = make_plan(sources, mixture=(1, 0, 3), seq_len=1000, samples_per_row=3)
    rows = [row for step in take(plan, 200) for row in step]
    assert all(len(row.documents) == 3 and tokens_of(row) <= 1000 for row in rows)
    assert all(
        d.start == 0 and d.length + d.truncated == sources[d.source].tokens[d.sample]
        for row in rows
        for d in row.documents
    )
    # Longer ones are truncated, and counted, to what two short ones (the quartile of the commoner source) leave.
    longest = 1000 - 2 * int(np.sort(sources[1].tokens)[499 // 4])
    assert max(d.length for row in rows for d in row.documents) == longest
    assert all(
        d.truncated == max(0, sources[d.source].tokens[d.sample] - longest) for row in rows for d in row.documents
    )


def test_samples_rows_that_cannot_exist_are_refused_with_the_numbers() -> None:
    with pytest.raises(
        ConfigError, match=r"samples_per_row is 3.*seq_len 1000.*have 400.*samples_per_row <= 2 or seq_len >= 1200"
    ):
        make_plan([source(U, [400, 500])], mixture=(1, 0, 0), seq_len=1000, samples_per_row=3)
    # Possible on average (half of the samples are short), but not from every pool of 3.
    plan = make_plan(
        [source(U, [100] * 200 + [600] * 200)], mixture=(1, 0, 0), seq_len=1000, samples_per_row=2, pool_size=3
    )
    with pytest.raises(ConfigError, match=r"no 2 of the 3 pending documents.*1000 tokens.*\[600, 600, 600\]"):
        take(plan, 100)


def test_lengths_follow_the_draws_that_the_encoder_makes() -> None:
    """First-sentence captions, and a pad dropout whose form changes the length: the same `document_uniform` decides
    in both places."""
    tokens, short, dropped = np.arange(700, 1000), np.arange(600, 900), np.full(300, 580)
    captions = source(G, tokens, short_tokens=short, dropped_tokens=dropped)
    plan = make_plan([captions], mixture=(0, 0, 1), first_sentence=0.25, pad_dropout=0.1)
    documents = documents_of(take(plan, 40))
    for document in documents:

        def drawn(purpose: str, document: DocumentRef = document) -> float:
            return document_uniform(11, "generation", document.epoch, document.sample, purpose)

        assert document.short_caption == (drawn("first_sentence") < 0.25)
        expected = short if document.short_caption else tokens
        assert document.length == (580 if drawn("pad_dropout") < 0.1 else expected[document.sample])
    assert sum(d.short_caption for d in documents) / len(documents) == pytest.approx(0.25, abs=0.04)
    # A form that keeps the length needs no knowledge of the dropout.
    kept = make_plan([replace(captions, dropped_tokens=None)], mixture=(0, 0, 1), first_sentence=0.25, pad_dropout=0.1)
    assert all(d.length == (short if d.short_caption else tokens)[d.sample] for d in documents_of(take(kept, 10)))


# Bad input


def test_an_empty_or_damaged_source_is_named() -> None:
    with pytest.raises(DataError, match="'text' has no samples"):
        make_plan([source(U), source(T, []), source(G)])
    with pytest.raises(DataError, match="sample 1 has tokens 0"):
        make_plan([source(U, [5, 0])], mixture=(1, 0, 0))
    with pytest.raises(DataError, match=r"short_tokens has shape \(3,\), tokens has 2"):
        make_plan([source(G, [5, 6], short_tokens=np.ones(3, np.int32))], mixture=(0, 0, 1))
    unused = make_plan([source(U), source(T, []), source(G)], mixture=(1, 0, 3))
    assert unused.unused == {"text": "stage.mixture.text is 0"}
    assert 1 not in {d.source for d in documents_of(take(unused, 2))}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows_per_step": 0}, "rows_per_step >= 1"),
        ({"pool_size": 1, "samples_per_row": 2}, "pool_size >= 2"),
        ({"samples_per_row": 0}, "samples_per_row >= 1"),
        ({"snapshot_steps": 0}, "snapshot_steps >= 1"),
        ({"first_sentence": 1.5}, "first_sentence"),
        ({"sources": [source(U), source(T), source(G), source(G)]}, "different names"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(**settings)


@pytest.mark.parametrize("pool_size", [1, 2, 300])
def test_any_pool_size_works(pool_size: int) -> None:
    steps = take(make_plan(pool_size=pool_size), 20)
    assert all(tokens_of(row) <= 4096 for rows in steps for row in rows)
