"""The order of the data: every row of every step, as a pure function of the recipe, the documents' lengths, the seed
and the row number.

    source order (sequence.py)  ->  mixture (mixture.py)  ->  pool of pending documents  ->  packing (packing.py)  ->
        RowSpecs

The plan is a fold: its state before a step is one integer per source, the mixture's deficits and references to the
documents in the pool; a few kilobytes for a whole cluster. No rank, worker or run history enters it, and no sample is
read. `Plan.rows_at` reaches any step from the nearest snapshot of that state.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import partial
from itertools import chain, compress
from typing import Any, NamedTuple

import numpy as np

from jp_train.config.choices import Mix, OverLong, RatioUnit
from jp_train.data.mixture import CarrySchedule, Mixture, SampledSchedule
from jp_train.data.packing import Layout, pack_samples, pack_tokens
from jp_train.data.sequence import LENGTH, NUMBER, SOURCE, START, DocumentRules, PlanSource, SourceSequence, row_specs
from jp_train.data.stream import DocumentStream
from jp_train.errors import ConfigError, DataError
from jp_train.types import KINDS, RowSpec

__all__ = ["Plan", "PlanSource"]

STATE_VERSION = 1
_FOLD_KEYS = ("step", "phase", "positions", "dropped", "schedule", "pool", "cut")


class Plan:
    """The rows of a stage, step after step.

    Arguments mirror the config: `mixture` are the shares in KINDS order; `ratio_unit`, `mix`, `over_long` are the
    schema's enums or their values; `samples_per_row` is None where the batch counts packed rows; `training_steps`
    (None: endless) bounds the steps for which every kind must have a source. Attributes: `step`, the number of the step
    that `next_step` will return; `sources`; `unused`, the names of the sources that are never drawn, with the reason.

    Raises:
        ConfigError: if a number is out of range, two sources share a name, a kind with a share has no source at some
            step, or `samples_per_row` documents cannot fit a row.
        DataError: if a source in use is empty, or none of its samples can be used.
    """

    def __init__(
        self,
        sources: Sequence[PlanSource],
        *,
        seed: int,
        rows_per_step: int,
        seq_len: int,
        pool_size: int,
        mixture: Sequence[float],
        ratio_unit: RatioUnit | str = RatioUnit.samples,
        mix: Mix | str = Mix.carry,
        samples_per_row: int | None = None,
        pad_dropout: float = 0.0,
        first_sentence: float = 0.0,
        over_long: OverLong | str = OverLong.truncate,
        snapshot_steps: int = 1000,
        training_steps: int | None = None,
    ) -> None:
        self.sources = tuple(sources)
        self.seed, self.rows_per_step, self.seq_len, self.samples_per_row = (
            seed,
            rows_per_step,
            seq_len,
            samples_per_row,
        )
        self.pool_size, self.snapshot_steps = pool_size, snapshot_steps
        self.ratio_unit, self.mix, self.over_long = RatioUnit(ratio_unit), Mix(mix), OverLong(over_long)
        self.pad_dropout, self.first_sentence = pad_dropout, first_sentence
        self._check_numbers()
        self.mixture = Mixture(self.sources, mixture, training_steps)
        self.unused = self.mixture.unused
        self._rules = self._make_rules()
        sequences = self._sequences()
        for sequence in sequences.values():
            sequence.check_usable()
        by_tokens = self.ratio_unit is RatioUnit.tokens
        self._mean_costs = {
            index: Fraction(*sequence.mean_length()) if by_tokens else Fraction(1)
            for index, sequence in sequences.items()
        }
        self._recipe: dict[str, Any] | None = None
        self._fingerprint: str | None = None
        self._fold = _Fold(self)
        self._replay: _Fold | None = None
        self._snapshots: dict[int, dict[str, Any]] = {0: self._fold.state()}

    def _check_numbers(self) -> None:
        at_least = {"rows_per_step": 1, "seq_len": 4, "pool_size": self.samples_per_row or 1, "snapshot_steps": 1}
        if self.samples_per_row is not None:
            at_least["samples_per_row"] = 1
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ConfigError(f"the plan needs {name} >= {least}, got {getattr(self, name)}")
        for name in ("pad_dropout", "first_sentence"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"data.{name} is a probability, expected 0 to 1, got {getattr(self, name)}")
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ConfigError(f"data.sources must have different names, got {', '.join(sorted(names))}")

    def _make_rules(self) -> DocumentRules:
        """How long a document may be: a row; where rows hold a fixed number of documents, what is left of one beside
        short ones.

        Short is the quartile, so that the pool always has partners for the longest. With the shortest of all instead,
        documents that hardly anything fits beside pile up in the pool, until no row can be made of it, days into a run.
        """
        used = [source for source in self.sources if source.name not in self.unused]
        for source in used:
            source.check()
        limit = self.seq_len
        if self.samples_per_row is not None:
            short = self._short_length(used)
            limit -= (self.samples_per_row - 1) * short
            if limit < short:
                raise ConfigError(
                    f"stage.samples_per_row is {self.samples_per_row}, but a row of data.seq_len {self.seq_len} "
                    f"tokens cannot hold that many documents: three quarters of them have {short} tokens or more. Set "
                    f"samples_per_row <= {max(1, self.seq_len // short)} or seq_len >= {self.samples_per_row * short}"
                )
        return DocumentRules(
            seed=self.seed,
            limit=limit,
            cut_texts=self.samples_per_row is None,
            drop=self.over_long is OverLong.drop,
            first_sentence=self.first_sentence,
            pad_dropout=self.pad_dropout,
        )

    def _short_length(self, used: Sequence[PlanSource]) -> int:
        """The median of the sources' quartiles, each source counting with its share of the mixture."""
        mass: dict[int, Fraction] = {}
        for source in used:
            kind_weight = sum(Fraction(other.weight) for other in used if other.kind == source.kind)
            share = self.mixture.shares[KINDS.index(source.kind)] * Fraction(source.weight) / kind_weight
            mass[source.quartile()] = mass.get(source.quartile(), Fraction(0)) + share
        lower = Fraction(0)
        for quartile in sorted(mass):
            lower += mass[quartile]
            if 2 * lower >= sum(mass.values()):
                break
        return quartile

    def _sequences(self) -> dict[int, SourceSequence]:
        return {
            index: SourceSequence(source, index, self._rules)
            for index, source in enumerate(self.sources)
            if source.name not in self.unused
        }

    @property
    def step(self) -> int:
        """The number of the step that `next_step` returns next."""
        return self._fold.step

    @property
    def dropped(self) -> dict[str, int]:
        """Documents passed over so far by `over_long`, per source in use, including those looked at for the pool."""
        return {self.sources[index].name: dropped for index, dropped in self._fold.stream.dropped().items()}

    def next_step(self, first: int = 0, last: int | None = None) -> list[RowSpec]:
        """The `rows_per_step` rows of step `step`, and go on to the next. `first`, `last`: only rows [first, last) are
        returned, so that a rank does not make the rows of the others.

        Raises:
            ConfigError: if no `samples_per_row` documents of the pool fit a row, or a kind runs out of sources
            (`training_steps` not given).
        """
        step, rows = self.step, self._advance()
        return row_specs(step, first, *self._fold.documents(rows[first:last]))

    def next_table(self) -> tuple[np.ndarray, np.ndarray]:
        """The step that `next_step` would return, as numbers: (documents int64 [D, 8], columns as
        `sequence.COLUMNS`; the row of each, int64 [D]). For statistics over many steps."""
        documents, counts = self._fold.documents(self._advance())
        return documents.T, np.repeat(np.arange(len(counts)), counts)

    def _advance(self) -> list[_Taken]:
        rows = self._fold.advance()
        if self._fold.step % self.snapshot_steps == 0:
            self._snapshots[self._fold.step] = self._fold.state()
        return rows

    def sequence(self, name: str) -> SourceSequence:
        """A new sequence of the documents of a source in use, from its first draw."""
        index = next(index for index, source in enumerate(self.sources) if source.name == name)
        return SourceSequence(self.sources[index], index, self._rules)

    def rows_at(self, step: int) -> list[RowSpec]:
        """The rows of any step, before or after the current one, by a fold from the nearest snapshot at or before it.

        The running state is not disturbed. Costs one step's planning for each step between (consecutive calls go on
        from each other).
        """
        if step < 0:
            raise ValueError(f"steps count from 0, got {step}")
        nearest = max(start for start in self._snapshots if start <= step)
        fold = self._replay
        if fold is None or not nearest <= fold.step <= step:
            fold = _Fold(self)
            fold.restore(self._snapshots[nearest])
        self._replay = None  # so that an error on the way leaves no half-advanced fold behind
        while fold.step < step:
            fold.advance()
            if fold.step % self.snapshot_steps == 0:
                self._snapshots.setdefault(fold.step, fold.state())
        rows = fold.advance()
        self._replay = fold
        return row_specs(step, 0, *fold.documents(rows))

    def state(self) -> dict[str, Any]:
        """All that is needed to continue at step `step`, JSON-able, a few kilobytes: what a checkpoint stores."""
        return {
            "version": STATE_VERSION,
            "fingerprint": self.fingerprint(),
            "recipe": self.recipe(),
            **self._fold.state(),
        }

    def state_at(self, step: int, positions: Mapping[str, int]) -> dict[str, Any]:
        """A state for studies of far steps: an empty pool, no deficits, source NAME at draw number `positions[NAME]`.

        No run passes through it: from here the pool needs a step or so until rows are as full as a run's.
        """
        fold = _Fold(self)
        fold.step = step
        state = fold.state()
        phase = self.mixture.phase_index(step)
        schedule = (
            [0]
            if self.mix is Mix.sampled
            else [[0] * len(KINDS), [[0] * len(of_kind) for of_kind in self.mixture.phases[phase].members]]
        )
        numbers = [positions.get(source.name, 0) if source.name not in self.unused else -1 for source in self.sources]
        header = {"version": STATE_VERSION, "fingerprint": self.fingerprint(), "recipe": self.recipe()}
        return {**header, **state, "phase": phase, "schedule": schedule, "positions": numbers}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a `state()` of the same recipe, lengths and seed. Costs the same at any step.

        Raises:
            DataError: if the state belongs to another plan; the message names what differs.
        """
        self.add_snapshot(state)
        self._fold.restore(state)

    def snapshots(self) -> list[dict[str, Any]]:
        """The states kept so far, in order of step: every `snapshot_steps`, the start, and those added; each as
        `state()`."""
        header = {"version": STATE_VERSION, "fingerprint": self.fingerprint(), "recipe": self.recipe()}
        return [{**header, **self._snapshots[step]} for step in sorted(self._snapshots)]

    def add_snapshot(self, state: dict[str, Any]) -> None:
        """Let `rows_at` start from `state` (of a checkpoint, or of another process's `snapshots`).

        Raises:
            DataError: as `restore`.
        """
        self._check_state(state)
        self._snapshots[state["step"]] = {key: state[key] for key in _FOLD_KEYS}

    def recipe(self) -> dict[str, Any]:
        """What the rows depend on, JSON-able: the settings, and per source its settings and the fingerprint of its
        lengths."""
        if self._recipe is None:
            settings = {
                "seed": self.seed,
                "rows_per_step": self.rows_per_step,
                "seq_len": self.seq_len,
                "pool_size": self.pool_size,
                "mixture": ":".join(str(share) for share in self.mixture.shares),
                "ratio_unit": self.ratio_unit.value,
                "mix": self.mix.value,
                "samples_per_row": self.samples_per_row,
                "pad_dropout": self.pad_dropout,
                "first_sentence": self.first_sentence,
                "over_long": self.over_long.value,
                "sources": " ".join(source.name for source in self.sources),
            }
            for source in self.sources:
                if source.name not in self.unused:
                    settings[f"sources.{source.name}"] = (
                        f"{source.kind.value}, weight {float(source.weight)!r}, steps {source.from_step} to "
                        f"{source.to_step}, {'cuttable, ' if source.cuttable else ''}{source.samples} samples, "
                        f"lengths {source.fingerprint()}"
                    )
            self._recipe = settings
        return dict(self._recipe)

    def fingerprint(self) -> str:
        """32 hex digits of `recipe()`: equal fingerprints, equal rows."""
        if self._fingerprint is None:
            self._fingerprint = hashlib.blake2b(
                json.dumps(self.recipe(), sort_keys=True).encode(), digest_size=16
            ).hexdigest()
        return self._fingerprint

    def _check_state(self, state: dict[str, Any]) -> None:
        if state.get("version") != STATE_VERSION:
            raise DataError(
                f"the plan state has version {state.get('version')!r}, this program reads version {STATE_VERSION}: "
                "continue with the program that wrote it"
            )
        missing = {"fingerprint", "recipe", *_FOLD_KEYS} - state.keys()
        if missing:
            raise DataError(
                f"the plan state is damaged: it lacks {', '.join(sorted(missing))}. Resume from another checkpoint"
            )
        if state["fingerprint"] == self.fingerprint():
            return
        theirs, ours = state["recipe"], self.recipe()
        differences = [
            f"{key}: the state has {theirs.get(key, 'none')}, this run has {ours.get(key, 'none')}"
            for key in sorted({**theirs, **ours})
            if theirs.get(key) != ours.get(key)
        ]
        raise DataError(
            f"the plan state of step {state['step']} belongs to other data; its rows would not continue. "
            + "; ".join(differences)
            + ". Restore these, or start a new run with model.init_from (weights only)"
        )


class _Taken(NamedTuple):
    """The documents of a row, by their numbers in the stream: of the first, `start` tokens are in rows before; of
    the last, only `cut_length` tokens are taken (0: all)."""

    numbers: list[int]
    start: int
    cut_length: int


_taken = partial(tuple.__new__, _Taken)  # its constructor takes four times as long, once a row


class _Fold:
    """The running state of a plan: everything that changes from step to step."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.step = 0
        sequences = plan._sequences()
        carry = plan.mix is Mix.carry
        self.stream = DocumentStream(
            sequences,
            lambda: (
                CarrySchedule(plan.mixture) if carry else SampledSchedule(plan.mixture, plan.seed, plan._mean_costs)
            ),
            by_tokens=carry and plan.ratio_unit is RatioUnit.tokens,
        )
        self._cuttable_sources = {
            index for index in sequences if plan.sources[index].cuttable and plan.samples_per_row is None
        }
        self._phase = 0
        self._pool: list[int] = []  # numbers in the stream, oldest first, after the tail of a cut text, if there is one
        self._lengths: list[int] = []  # of the pool, what is still to be placed
        self._cut = 0  # tokens of pool[0] that earlier rows hold; 0 if it is whole

    def advance(self) -> list[_Taken]:
        """Plan one step. Returns what its rows take, as `documents` needs it; valid until the next step."""
        self._enter_phase()
        stream = self.stream
        stream.forget(min(self._pool, default=stream.taken))
        plan, pool, lengths, take = self._plan, self._pool, self._lengths, self._take
        pool_size, seq_len, cuttable, packed = (
            plan.pool_size,
            plan.seq_len,
            self._is_cuttable,
            plan.samples_per_row is None,
        )
        given, rows = stream.taken, []
        for _ in range(plan.rows_per_step):
            missing = pool_size - len(pool)
            if missing > 0:
                lengths += stream.take(missing)
                pool += range(given, given + missing)
                given += missing
            layout = pack_tokens(lengths, cuttable, seq_len, tail=self._cut > 0) if packed else self._samples_layout()
            rows.append(take(layout))
        self.step += 1
        return rows

    def documents(self, rows: Sequence[_Taken]) -> tuple[np.ndarray, list[int]]:
        """The documents of rows of the last step, int64 [8, D] as `sequence.COLUMNS`, and how many each row has."""
        counts = [len(row.numbers) for row in rows]
        documents = self.stream.table(list(chain.from_iterable(row.numbers for row in rows)))
        first = 0
        for row, count in zip(rows, counts, strict=True):
            if row.start:
                documents[START, first] = row.start
                documents[LENGTH, first] -= row.start
            first += count
            if row.cut_length:
                documents[LENGTH, first - 1] = row.cut_length
        return documents, counts

    def _enter_phase(self) -> None:
        """At a step where sources join or leave: documents of a source that left are taken out of the pool (a text
        already begun is not)."""
        phase = self._plan.mixture.phase_index(self.step)
        if phase == self._phase:
            return
        self._plan.mixture.check_phase(phase)
        self._phase = phase
        active = {source for members in self._plan.mixture.phases[phase].members for source in members}
        owners = [self.stream.source(number) for number in self._pool]
        stays = [owner in active or (position == 0 and self._cut > 0) for position, owner in enumerate(owners)]
        leaving = [number for number, stay in zip(self._pool, stays, strict=True) if not stay]
        kinds = [
            KINDS.index(self._plan.sources[owner].kind) for owner, stay in zip(owners, stays, strict=True) if not stay
        ]
        self.stream.enter_phase(phase, self.stream.table(leaving), kinds)
        self._pool, self._lengths = list(compress(self._pool, stays)), list(compress(self._lengths, stays))

    def _is_cuttable(self, position: int) -> bool:
        return bool(self._cuttable_sources) and self.stream.source(self._pool[position]) in self._cuttable_sources

    def _samples_layout(self) -> Layout:
        plan = self._plan
        assert plan.samples_per_row is not None
        layout = pack_samples(self._lengths, plan.seq_len, plan.samples_per_row)
        if layout is None:
            raise ConfigError(
                f"step {self.step}: no {plan.samples_per_row} of the {len(self._lengths)} pending documents fit a row "
                f"of data.seq_len {plan.seq_len} tokens; their lengths: {sorted(self._lengths)}. Lower "
                "stage.samples_per_row, raise data.seq_len, or raise data.pool_size"
            )
        return layout

    def _take(self, layout: Layout) -> _Taken:
        """Remove a row's documents from the pool; the tail of a cut text goes to its front."""
        pool, lengths = self._pool, self._lengths
        whole, cut, cut_length = layout
        numbers = []
        for position in reversed(whole):
            numbers.append(pool.pop(position))
            del lengths[position]
        numbers.reverse()
        start, self._cut = self._cut, 0
        if cut >= 0:
            cut -= sum(position < cut for position in whole)
            number, length = pool.pop(cut), lengths.pop(cut)
            numbers.append(number)
            self._cut = cut_length if whole else start + cut_length
            pool.insert(0, number)
            lengths.insert(0, length - cut_length)
        return _taken((numbers, start, cut_length))

    def state(self) -> dict[str, Any]:
        """JSON-able; lists are indexed as the recipe's sources (-1 position for one that is not in use)."""
        pool = self.stream.table(self._pool)
        return {
            "step": self.step,
            "phase": self._phase,
            **self.stream.state(len(self._plan.sources)),
            "pool": pool[[SOURCE, NUMBER]].T.tolist(),
            "cut": self._cut,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state()`."""
        self.step, self._phase, self._cut = state["step"], state["phase"], state["cut"]
        self.stream.restore(state, self._phase, state["pool"])
        self._pool = list(range(len(state["pool"])))
        self._lengths = self.stream.table(self._pool)[LENGTH].tolist()
        if self._cut:
            self._lengths[0] -= self._cut
