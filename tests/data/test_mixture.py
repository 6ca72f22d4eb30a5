"""The ratio schedule gives every kind and source exactly its share."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

import pytest

from jp_train.data.mixture import CarrySchedule, Mixture, SampledSchedule, integer_proportions, realised_shares
from jp_train.errors import ConfigError
from jp_train.types import DocumentRef, Kind, RowSpec

U, T, G = Kind.UNDERSTANDING, Kind.TEXT, Kind.GENERATION


@dataclass
class Source:
    name: str
    kind: Kind
    weight: float = 1.0
    from_step: int = 0
    to_step: int | None = None


def three_kinds(*weights: float) -> list[Source]:
    """One source of understanding and text; as many of generation as there are weights."""
    return [Source("u", U), Source("t", T)] + [Source(f"g{i}", G, weight) for i, weight in enumerate(weights or (1.0,))]


def deal(
    schedule: CarrySchedule | SampledSchedule, count: int, sources: int, costs: dict[int, object] | None = None
) -> list:
    """Source indices in the order dealt; with `costs`, pairs (source, cost)."""
    if costs is None:
        return schedule.deal(count)
    paid: dict[int, list] = {index: [] for index in range(sources)}

    def pay(index: int) -> int:
        paid[index].append(next(costs[index]))
        return paid[index][-1]

    order = schedule.deal(count, {index: lambda index=index: pay(index) for index in range(sources)})
    rest = {index: iter(amounts) for index, amounts in paid.items()}
    return [(index, next(rest[index])) for index in order]


@pytest.mark.parametrize("shares", [(1, 0, 3), (2, 3, 5), (5, 1, 4), (1, 0, 1), (7, 3, 10), (0.3, 0.33, 0.37)])
def test_every_prefix_is_within_one_document_of_the_exact_shares(shares: tuple[float, ...]) -> None:
    sources = three_kinds(1, 1)
    order = deal(CarrySchedule(Mixture(sources, shares)), 3000, 4)
    kinds = [U, T, G]
    counts: Counter[Kind] = Counter()
    total = sum(map(Fraction, map(str, shares)))
    for number, source in enumerate(order, 1):
        counts[sources[source].kind] += 1
        for kind, share in zip(kinds, shares, strict=True):
            assert abs(counts[kind] - number * Fraction(str(share)) / total) <= 1


def test_the_remainder_of_a_step_is_carried_so_that_every_period_is_exact() -> None:
    """512 at 2:3:5 is 102.4 : 153.6 : 256 a step; ten steps are 1024 : 1536 : 2560 (docs/model.md)."""
    order = deal(CarrySchedule(Mixture(three_kinds(), (2, 3, 5))), 5120, 3)
    assert Counter(order) == {0: 1024, 1: 1536, 2: 2560}


def test_sources_within_a_kind_follow_their_weights() -> None:
    counts = Counter(deal(CarrySchedule(Mixture(three_kinds(1, 1, 0.5), (1, 1, 2))), 4000, 5))
    assert counts == {0: 1000, 1: 1000, 2: 800, 3: 800, 4: 400}


@pytest.mark.parametrize("weights", [(1, 1), (0.7, 0.2, 0.1), (0.333331, 0.666667)])
def test_turns_made_in_remembered_blocks_equal_turns_made_one_at_a_time_with_restores(
    weights: tuple[float, ...],
) -> None:
    mixture = Mixture(three_kinds(*weights), (2, 3, 5))
    whole = deal(CarrySchedule(mixture), 2000, 5)
    draw, dealt, schedule = random.Random(1), [], CarrySchedule(mixture)
    while len(dealt) < 2000:
        dealt += deal(schedule, draw.randrange(1, 40), 5)
        state = json.loads(json.dumps(schedule.state()))
        schedule = CarrySchedule(mixture)
        schedule.restore(state)
    assert dealt[:2000] == whole


@pytest.mark.parametrize("by_tokens", [False, True])
def test_charging_what_another_schedule_dealt_gives_its_state_in_any_order(by_tokens: bool) -> None:
    mixture, draw = Mixture(three_kinds(0.7, 0.2, 0.1), (2, 3, 5)), random.Random(4)
    dealing, charged = CarrySchedule(mixture), CarrySchedule(mixture)
    costs = {index: iter(lambda: draw.randrange(1, 900), None) for index in range(5)} if by_tokens else None
    for count in (1, 63, 64, 65, 500):
        amounts = Counter()
        for item in deal(dealing, count, 5, costs):
            source, cost = item if by_tokens else (item, 1)
            amounts[source] += cost
        charged.charge(amounts)
        assert charged.state() == dealing.state()
    assert deal(charged, 100, 5) == deal(dealing, 100, 5)


def test_with_ratio_unit_tokens_the_tokens_are_within_one_document_of_the_shares() -> None:
    draw = random.Random(2)
    longest, shares = 3000, (5, 1, 4)
    costs = {i: iter(lambda: draw.randrange(1, longest + 1), None) for i in range(4)}
    sources = three_kinds(3, 1)
    schedule = CarrySchedule(Mixture(sources, shares))
    tokens, within = Counter(), Counter()
    for source, cost in deal(schedule, 5000, 4, costs):
        tokens[sources[source].kind] += cost
        within[source] += cost
        total = sum(tokens.values())
        for kind, share in zip((U, T, G), shares, strict=True):
            assert abs(tokens[kind] - total * share / 10) <= longest
    assert abs(within[2] - 0.75 * tokens[G]) <= longest


def test_a_source_that_joins_is_not_owed_the_documents_before_it() -> None:
    sources = [Source("u", U), Source("old", G, to_step=200), Source("both", G), Source("new", G, from_step=100)]
    mixture = Mixture(sources, (1, 0, 1))
    assert [phase.from_step for phase in mixture.phases] == [0, 100, 200]
    schedule, phases = CarrySchedule(mixture), []
    for phase in range(3):
        schedule.enter(phase)
        phases.append(Counter(deal(schedule, 600, 4)))
    assert phases == [{0: 300, 1: 150, 2: 150}, {0: 300, 1: 100, 2: 100, 3: 100}, {0: 300, 2: 150, 3: 150}]


def test_a_refund_is_dealt_again() -> None:
    schedule = CarrySchedule(Mixture(three_kinds(), (1, 0, 1)))
    deal(schedule, 10, 3)
    for _ in range(4):
        schedule.refund(2, 1)
    assert Counter(deal(schedule, 10, 3)) == {2: 7, 0: 3}


def test_a_kind_without_a_source_is_refused_with_kind_step_and_remedy() -> None:
    with pytest.raises(ConfigError, match=r"text a share of 3/10, but no source .* step 0; sources of kind text: none"):
        Mixture([Source("u", U), Source("g", G)], (2, 3, 5))
    leaves = [Source("u", U), Source("imagenet", G, to_step=120)]
    with pytest.raises(
        ConfigError, match=r"generation .* at step 120; .*imagenet \(steps 0 to 120\).*stage.mixture.generation=0"
    ):
        Mixture(leaves, (1, 0, 1))
    with pytest.raises(ConfigError, match="step 120"):
        Mixture(leaves, (1, 0, 1), training_steps=121)
    Mixture(leaves, (1, 0, 1), training_steps=120)  # the stage ends before it matters


def test_a_kind_of_share_zero_needs_no_source_and_its_sources_are_reported() -> None:
    mixture = Mixture([*three_kinds(1, 0)], (1, 0, 3))
    assert set(mixture.unused) == {"t", "g1"}
    assert set(deal(CarrySchedule(mixture), 100, 4)) == {0, 2}


@pytest.mark.parametrize("shares", [(0, 0, 0), (1, -1, 1), (1, float("nan"), 1), (1, float("inf"), 0), (1, 1)])
def test_impossible_shares_are_refused(shares: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="stage.mixture"):
        Mixture(three_kinds(), shares)


@pytest.mark.parametrize(
    "source", [Source("x", U, weight=-1), Source("x", U, from_step=5, to_step=5), Source("x", U, weight=float("nan"))]
)
def test_impossible_sources_are_refused_by_name(source: Source) -> None:
    with pytest.raises(ConfigError, match="data.sources.x"):
        Mixture([Source("u", U), source], (1, 0, 0))


def test_sampled_draws_have_the_mixture_as_their_probabilities_and_do_not_depend_on_how_they_are_asked_for() -> None:
    mixture = Mixture(three_kinds(3, 1), (2, 3, 5))
    ones = {index: Fraction(1) for index in range(4)}
    whole = deal(SampledSchedule(mixture, 7, ones), 20_000, 4)
    counts = Counter(whole)
    for source, probability in enumerate((0.2, 0.3, 0.375, 0.125)):
        deviation = (20_000 * probability * (1 - probability)) ** 0.5
        assert abs(counts[source] - 20_000 * probability) < 4 * deviation
    schedule, dealt = SampledSchedule(mixture, 7, ones), []
    while len(dealt) < 3000:
        dealt += deal(schedule, 17, 4)
        state = json.loads(json.dumps(schedule.state()))
        schedule = SampledSchedule(mixture, 7, ones)
        schedule.restore(state)
    assert dealt == whole[: len(dealt)]
    assert deal(SampledSchedule(mixture, 8, ones), 100, 4) != whole[:100]


def test_sampled_draws_by_tokens_divide_by_the_mean_length() -> None:
    mixture = Mixture(three_kinds(), (1, 1, 2))
    schedule = SampledSchedule(mixture, 0, {0: Fraction(100), 1: Fraction(400), 2: Fraction(200)})
    counts = Counter(deal(schedule, 20_000, 3))
    tokens = {0: 100 * counts[0], 1: 400 * counts[1], 2: 200 * counts[2]}
    shares = [tokens[source] / sum(tokens.values()) for source in range(3)]
    assert shares == pytest.approx([0.25, 0.25, 0.5], abs=0.02)


def test_proportions_are_read_as_the_decimals_that_were_written() -> None:
    assert integer_proportions((0.1, 0.25, 0.3)) == (2, 5, 6)
    assert integer_proportions((1, 0, 3)) == (1, 0, 3)


def test_realised_shares_count_a_cut_document_once_or_its_tokens() -> None:
    sources = three_kinds()

    def ref(source: int, start: int, length: int) -> DocumentRef:
        return DocumentRef(source=source, epoch=0, sample=0, start=start, length=length)

    rows = [
        RowSpec(step=0, row=0, documents=(ref(0, 0, 10), ref(1, 0, 30))),
        RowSpec(step=0, row=1, documents=(ref(1, 30, 20), ref(2, 0, 40))),
    ]
    assert realised_shares(rows, sources, tokens=False) == {U: 1 / 3, T: 1 / 3, G: 1 / 3}
    assert realised_shares(rows, sources, tokens=True) == {U: 0.1, T: 0.5, G: 0.4}
