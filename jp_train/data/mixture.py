"""The ratio schedule: which source the next document comes from, so that every step holds the recipe's mixture.

Two levels. A kind (understanding, text, generation) has a share; within a kind each source active at the step has a
weight. In both, the next document goes to the one with the largest deficit, in exact integers. Every document counts
for what it will put into rows (1 document, or its tokens: `ratio_unit`), so the documents placed in rows plus the few
in the packer's pool are always within one document per kind of the exact shares. `mix: sampled` draws instead, as the
baseline that most trainers use.

A recipe's step ranges cut the run into phases. Deficits between sources of one kind start from zero in each phase: a
source that joins at step 120000 is not owed the documents of the steps before.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from math import gcd, lcm
from operator import add
from typing import Any

import numpy as np

from jp_train.data.permute import document_uniform_many
from jp_train.data.sequence import PlanSource
from jp_train.errors import ConfigError
from jp_train.types import KINDS, Kind, RowSpec

Deficits = tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of steps with one set of active sources: `members[k]` are the indices of kind k's sources,
    `weights[k]` integers in the proportions of their weights. Kinds without a share have no members."""

    from_step: int
    members: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[int, ...], ...]


def integer_proportions(values: Iterable[float]) -> tuple[int, ...]:
    """The smallest integers in the proportions of `values`, read as the decimals a person wrote: (0.1, 0.25) -> (2, 5).

    Raises:
        ValueError: if a value is negative or not finite.
    """
    fractions = [Fraction(repr(float(value))) for value in values]
    if any(fraction < 0 for fraction in fractions):
        raise ValueError("proportions must not be negative")
    scale = lcm(*(fraction.denominator for fraction in fractions))
    integers = [int(fraction * scale) for fraction in fractions]
    divisor = gcd(*integers) or 1
    return tuple(integer // divisor for integer in integers)


class Mixture:
    """A validated recipe: the shares of the kinds, and which sources are active at which steps. Immutable; schedules
    are made from it.

    `shares`: integers in KINDS order. `phases`: ordered by `from_step`, the first at 0. `unused`: names of the sources
    that can never be drawn, with the reason, for the caller to report.

    Raises:
        ConfigError: if a share or weight is negative, all shares are zero, or a kind with a share has no source at some
            step before `training_steps` (None: at any step).
    """

    def __init__(
        self, sources: Sequence[PlanSource], shares: Sequence[float], training_steps: int | None = None
    ) -> None:
        try:
            self.shares = integer_proportions(shares)
        except ValueError as error:
            raise ConfigError(
                f"stage.mixture must be finite numbers >= 0 in the order {_names(KINDS)}, got {tuple(shares)}"
            ) from error
        if len(self.shares) != len(KINDS) or not any(self.shares):
            raise ConfigError(
                f"stage.mixture needs a share > 0 among {_names(KINDS)}, got {tuple(shares)}: nothing would be trained"
            )
        for source in sources:
            if not 0 <= source.weight < float("inf"):
                raise ConfigError(
                    f"data.sources.{source.name}.weight must be a finite number >= 0, got {source.weight}"
                )
            if source.from_step < 0 or (source.to_step is not None and source.to_step <= source.from_step):
                raise ConfigError(
                    f"data.sources.{source.name} is active from step {source.from_step} to {source.to_step}: never. "
                    "Set 0 <= from_step < to_step"
                )
        self.unused: dict[str, str] = {}
        for source in sources:
            if not self.shares[KINDS.index(source.kind)]:
                self.unused[source.name] = f"stage.mixture.{source.kind} is 0"
            elif source.weight == 0:
                self.unused[source.name] = "its weight is 0"
        self.phases = self._make_phases(sources)
        self._starts = [phase.from_step for phase in self.phases]
        self._sources = tuple(sources)
        for number, phase in enumerate(self.phases):
            if training_steps is None or phase.from_step < training_steps:
                self.check_phase(number)

    def _make_phases(self, sources: Sequence[PlanSource]) -> tuple[Phase, ...]:
        drawable = [(index, source) for index, source in enumerate(sources) if source.name not in self.unused]
        edges = {0}
        for _, source in drawable:
            edges.update({source.from_step, source.to_step or 0})
        phases = []
        for step in sorted(edges):
            members, weights = [], []
            for kind in KINDS:
                active = [
                    (index, source.weight)
                    for index, source in drawable
                    if source.kind == kind and _active(source, step)
                ]
                members.append(tuple(index for index, _ in active))
                weights.append(integer_proportions(weight for _, weight in active) if active else ())
            phases.append(Phase(step, tuple(members), tuple(weights)))
        return tuple(phases)

    def check_phase(self, number: int) -> None:
        """Raises ConfigError if a kind with a share has no source in that phase."""
        phase, sources = self.phases[number], self._sources
        for kind, share, members in zip(KINDS, self.shares, phase.members, strict=True):
            if share and not members:
                others = [
                    f"{s.name} (steps {s.from_step} to {s.to_step or 'the end'})"
                    for s in sources
                    if s.kind == kind and s.weight > 0
                ]
                raise ConfigError(
                    f"stage.mixture gives {kind} a share of {share}/{sum(self.shares)}, but no source of that kind is "
                    f"active at step {phase.from_step}; sources of kind {kind}: {', '.join(others) or 'none'}. Add a "
                    f"source with `kind: {kind}` to data.sources, widen from_step/to_step of one, or set "
                    f"stage.mixture.{kind}=0"
                )

    def phase_index(self, step: int) -> int:
        """The number of the phase that `step` belongs to."""
        return bisect_right(self._starts, step) - 1


def _active(source: PlanSource, step: int) -> bool:
    return source.from_step <= step and (source.to_step is None or step < source.to_step)


def _names(kinds: Iterable[Kind]) -> str:
    return " : ".join(kind.value for kind in kinds)


class CarrySchedule:
    """Even dealing: the next document is of the kind, and from the source within it, with the largest deficit.

    A deficit is share x (all documents dealt) - (its own), times the sum of shares so that it stays an integer;
    documents are counted by what they cost. What is dealt is either in a row or in the pool, so rows are charged what
    they hold and the pool what it will put there.
    Where every document counts 1, the turns do not depend on lengths, and recipes repeat themselves soon: turns are
    made in blocks and remembered by the deficits that they start from. That is for speed only.
    """

    _BLOCK = 64
    _REMEMBERED = 4096

    def __init__(self, mixture: Mixture) -> None:
        self._mixture = mixture
        self._remembered: dict[Deficits, tuple[list[int], Deficits]] = {}
        self._phase = mixture.phases[0]
        self._set((0,) * len(KINDS), ())
        self.enter(0)

    def _set(self, kinds: Sequence[int], sources: Sequence[Sequence[int]]) -> None:
        """The deficits at the start of the current block of turns; the block itself is made when needed."""
        self._deficits: Deficits = (tuple(kinds), tuple(tuple(within) for within in sources))
        self._block: list[int] = []
        self._after = self._deficits
        self._taken = 0

    def enter(self, phase: int) -> None:
        """Begin a phase: deficits between sources start from zero, those between kinds are carried over."""
        kinds, _ = self._now()
        self._phase = self._mixture.phases[phase]
        self._remembered.clear()
        self._set(kinds, [(0,) * len(members) for members in self._phase.members])

    def deal(self, count: int, costs: Mapping[int, Callable[[], int]] | None = None) -> list[int]:
        """The sources of the next `count` documents. `costs[source]()`: what the source's next document counts
        (None: every one counts 1)."""
        dealt: list[int] = []
        if costs is None:
            while len(dealt) < count:
                if self._taken == len(self._block):
                    self._next_block()
                block = self._block[self._taken : self._taken + count - len(dealt)]
                self._taken += len(block)
                dealt += block
            return dealt
        turns = _Turns(self._mixture.shares, self._phase, *self._now())
        for _ in range(count):
            kind, within = turns.next()
            source = self._phase.members[kind][within]
            dealt.append(source)
            turns.charge(kind, within, costs[source]())
        self._set(*turns.deficits())
        return dealt

    def _next_block(self) -> None:
        start = self._after
        if start not in self._remembered:
            if len(self._remembered) >= self._REMEMBERED:  # a recipe that hardly repeats itself
                self._remembered.clear()
            turns = _Turns(self._mixture.shares, self._phase, *start)
            self._remembered[start] = ([turns.take() for _ in range(self._BLOCK)], turns.deficits())
        self._deficits, self._taken = start, 0
        self._block, self._after = self._remembered[start]

    def charge(self, amounts: Mapping[int, int]) -> None:
        """Count documents of another schedule's dealing: `amounts[source]` is what its documents count together."""
        self._set(*self._charged(self._now(), amounts))

    def _now(self) -> Deficits:
        """The deficits after the turns taken so far."""
        return self._charged(self._deficits, Counter(self._block[: self._taken])) if self._taken else self._deficits

    def _charged(self, before: Deficits, amounts: Mapping[int, int]) -> Deficits:
        """The deficits after documents that count `amounts`, in whatever order they came."""
        kinds, sources = before
        counts, within = [], []
        for members, weights, deficits in zip(self._phase.members, self._phase.weights, sources, strict=True):
            of_sources = [amounts.get(source, 0) for source in members]
            within.append(_owed(deficits, weights, of_sources))
            counts.append(sum(of_sources))
        return _owed(kinds, self._mixture.shares, counts), tuple(within)

    def refund(self, kind: int, amount: int) -> None:
        """Take back the charge of a document that was dealt and will never be placed."""
        kinds, sources = self._now()
        self._set(
            _owed(kinds, self._mixture.shares, [-amount if index == kind else 0 for index in range(len(KINDS))]),
            sources,
        )

    def state(self) -> list[Any]:
        """The deficits: one integer per kind, one per active source."""
        kinds, sources = self._now()
        return [list(kinds), [list(within) for within in sources]]

    def restore(self, state: list[Any]) -> None:
        """Continue from `state()` of the same phase."""
        self._set(*state)


def _owed(deficits: Sequence[int], weights: Sequence[int], dealt: Sequence[int]) -> tuple[int, ...]:
    """The deficits of the members of a mixture with these `weights`, after `dealt` more units of each."""
    total, given = sum(weights), sum(dealt)
    return tuple(
        deficit + weight * given - total * count
        for deficit, weight, count in zip(deficits, weights, dealt, strict=True)
    )


class _Turns:
    """The rule of even dealing itself, on deficits that it owns."""

    def __init__(
        self, shares: Sequence[int], phase: Phase, kinds: Sequence[int], sources: Sequence[Sequence[int]]
    ) -> None:
        self._shares, self._phase = shares, phase
        self._kinds, self._sources = list(kinds), [list(within) for within in sources]
        self._dealt = [kind for kind, share in enumerate(shares) if share]
        self._levels = [(self._kinds, shares, sum(shares))]
        self._levels += [
            (within, weights, sum(weights)) for within, weights in zip(self._sources, phase.weights, strict=True)
        ]

    def deficits(self) -> Deficits:
        return tuple(self._kinds), tuple(tuple(within) for within in self._sources)

    def next(self) -> tuple[int, int]:
        """Whose turn it is: the kind, and the source's place within it. Of equals, the first in the recipe's order."""
        kind = max(self._dealt, key=self._kinds.__getitem__)
        owed = self._sources[kind]
        return kind, owed.index(max(owed))

    def charge(self, kind: int, within: int, amount: int) -> None:
        """Count a document of `amount`: every deficit grows by its share of it, and that of its source and kind falls
        by the whole."""
        for (deficits, weights, total), chosen in ((self._levels[0], kind), (self._levels[1 + kind], within)):
            for index, weight in enumerate(weights):
                deficits[index] += weight * amount
            deficits[chosen] -= total * amount

    def take(self) -> int:
        """The source of the next document where every document counts 1.

        What it will count is known, so it is dealt as if it were already counted: that halves the error.
        """
        owed = list(map(add, self._kinds, self._shares))
        kind = max(self._dealt, key=owed.__getitem__)
        owed = list(map(add, self._sources[kind], self._phase.weights[kind]))
        within = owed.index(max(owed))
        self.charge(kind, within, 1)
        return self._phase.members[kind][within]


class SampledSchedule:
    """Independent seeded draws: document number t of the run comes from a source drawn with the mixture's
    probabilities.

    With `ratio_unit: tokens` a source's probability is its share of tokens divided by its mean length, `mean_costs`.
    """

    _BLOCK = 1024

    def __init__(self, mixture: Mixture, seed: int, mean_costs: Mapping[int, Fraction]) -> None:
        self._mixture, self._seed, self._mean_costs = mixture, seed, mean_costs
        self._dealt = 0
        self._block_start = -1
        self._uniforms: list[float] = []
        self.enter(0)

    def enter(self, phase: int) -> None:
        """Begin a phase: from here its sources are drawn."""
        masses: dict[int, Fraction] = {}
        current = self._mixture.phases[phase]
        for share, members, weights in zip(self._mixture.shares, current.members, current.weights, strict=True):
            for source, weight in zip(members, weights, strict=True):
                masses[source] = Fraction(share * weight, sum(weights)) / self._mean_costs[source]
        total = sum(masses.values())
        self._sources = list(masses)
        # The division of Fractions is exact, and float() rounds it correctly: the same thresholds everywhere.
        self._thresholds = [float(upper / total) for upper in accumulate(masses.values())]

    def deal(self, count: int, costs: Mapping[int, Callable[[], int]] | None = None) -> list[int]:
        """The sources of the next `count` documents, as `CarrySchedule.deal`; `costs` do not matter to independent
        draws."""
        dealt = []
        for number in range(self._dealt, self._dealt + count):
            offset = number % self._BLOCK
            if number - offset != self._block_start:
                self._block_start = number - offset
                numbers = np.arange(self._block_start, self._block_start + self._BLOCK)
                self._uniforms = document_uniform_many(
                    self._seed, "", np.zeros_like(numbers), numbers, "mixture"
                ).tolist()
            dealt.append(self._sources[bisect_right(self._thresholds, self._uniforms[offset])])
        self._dealt += count
        return dealt

    def charge(self, amounts: Mapping[int, int]) -> None:
        """Count documents of another schedule's dealing: `amounts[source]` of each source."""
        self._dealt += sum(amounts.values())

    def refund(self, kind: int, amount: int) -> None:
        """Does nothing: draws are independent of what was dealt before."""

    def state(self) -> list[Any]:
        """How many documents were drawn."""
        return [self._dealt]

    def restore(self, state: list[Any]) -> None:
        """Continue from `state()`."""
        (self._dealt,) = state


def realised_shares(rows: Iterable[RowSpec], sources: Sequence[PlanSource], *, tokens: bool) -> dict[Kind, float]:
    """The share of each kind in `rows`: of tokens, or of documents (one cut into spans counts once, in the row where
    it starts)."""
    amounts = dict.fromkeys(KINDS, 0)
    for row in rows:
        for document in row.documents:
            amounts[sources[document.source].kind] += document.length if tokens else int(document.start == 0)
    total = sum(amounts.values()) or 1
    return {kind: amount / total for kind, amount in amounts.items()}
