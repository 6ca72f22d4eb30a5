"""The dealt order and the rows of every preset, pinned: a change here changes what every run trains on.

The literals were taken from the first release. If one differs, runs in progress cannot be continued: raise
plan.STATE_VERSION, and say so in the changelog.
"""

from __future__ import annotations

import hashlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from jp_train.config import RunConfig, batch_plan, load_config, preset_names
from jp_train.data.mixture import CarrySchedule, Mixture
from jp_train.data.plan import Plan, PlanSource
from jp_train.types import KINDS, Kind

LETTERS = {Kind.UNDERSTANDING: "U", Kind.TEXT: "T", Kind.GENERATION: "G"}

DEALT = {
    (1, 0, 3): "GUGGGUGGGUGGGUGGGUGGGUGG",
    (2, 3, 5): "GTUGTGGUTGGTUGTGGUTGGTUG",
    (5, 1, 4): "UGUGUTGUGUUGUGUTGUGUUGUG",
    (1, 0, 1): "UGUGUGUGUGUGUGUGUGUGUGUG",
    (7, 3, 10): "GUGTUGGUGUTGUGGUTGUGGUGT",
}
"""The first 24 documents of each mixture of the papers (understanding, text, generation), by kind."""

ROWS = {
    "janus_1b/stage1": "b9d3897c6464658b49fea5cf360916222d313fa0ae3832b3e3f22ba33589efb5",
    "janus_1b/stage2": "81976c76eb7447cc6111a4d5ecf46af36e535f6e52308ef9fc7ef0e79fe2412b",
    "janus_1b/stage3": "9b5fa8ba09feefa90e7ae6d51b112e8d00d1ee8faeca8e221901878a6392da34",
    "janus_pro_1b/stage1": "9b2e10175559adbfc035c498899833ae35e31482520413f071d5a99f46c7462c",
    "janus_pro_1b/stage2": "81976c76eb7447cc6111a4d5ecf46af36e535f6e52308ef9fc7ef0e79fe2412b",
    "janus_pro_1b/stage3": "459f25d4fcddecaf5abe438f492424fc9e87a5d527df526a8e67f64cd04456ba",
    "janus_pro_7b/stage1": "9b2e10175559adbfc035c498899833ae35e31482520413f071d5a99f46c7462c",
    "janus_pro_7b/stage2": "81976c76eb7447cc6111a4d5ecf46af36e535f6e52308ef9fc7ef0e79fe2412b",
    "janus_pro_7b/stage3": "459f25d4fcddecaf5abe438f492424fc9e87a5d527df526a8e67f64cd04456ba",
    "tiny/stage1": "7d0f882fe170238458cd697e216df0bab75b540c51378f1275c9d080cf520744",
    "tiny/stage2": "178e962c32048c6470a5df2fe9362059deea446d2b58d0419c417772ee2adf0c",
    "tiny/stage3": "b3633fa6b23faa2cacd778286df3148f07e705cfd06c3d3ae8f7080c704f4680",
}
"""SHA-256 over the documents of the first rows of each preset (`preset_digest`)."""


def preset_config(preset: str, folder: Path) -> RunConfig:
    file = folder / "run.yaml"
    file.write_text(f"preset: {preset}\nrun_dir: {folder / 'run'}\nseed: 11\n", encoding="utf-8")
    return load_config(file)


def lengths(count: int, low: int, spread: int, stride: int) -> np.ndarray:
    """`count` token lengths from `low` to `low + spread - 1` in a fixed, irregular order."""
    return (low + np.arange(count, dtype=np.int64) * stride % spread).astype(np.int32)


def preset_plan(cfg: RunConfig) -> Plan:
    """A plan of the preset over six sources with made-up lengths: two of each kind, unequal weights, step ranges."""
    batch, stage = batch_plan(cfg, 1), cfg.stage
    image = cfg.data.seq_len // max(7, 2 * (batch.samples_per_row or 1))
    text = image * 7 // 9
    generation = lengths(1009, image, text // 4, 7919)
    sources = [
        PlanSource(name="vqa", kind=Kind.UNDERSTANDING, tokens=lengths(997, image, text, 7919), min_tokens=image - 9),
        PlanSource(name="captions", kind=Kind.UNDERSTANDING, tokens=lengths(811, image + 3, text, 104729), weight=0.5),
        PlanSource(name="books", kind=Kind.TEXT, tokens=lengths(499, text, 9 * text, 1299709), cuttable=True),
        PlanSource(name="chats", kind=Kind.TEXT, tokens=lengths(701, 20, text, 15485863), weight=2.0),
        PlanSource(
            name="real",
            kind=Kind.GENERATION,
            tokens=generation + 7,
            short_tokens=generation if cfg.data.first_sentence > 0 else None,
            dropped_tokens=np.full(1009, image - 4, np.int32) if cfg.data.pad_dropout > 0 else None,
        ),
        PlanSource(name="late", kind=Kind.GENERATION, tokens=lengths(887, image, text // 3, 32452843), from_step=2),
    ]
    return Plan(
        sources,
        seed=cfg.seed,
        rows_per_step=batch.rows_per_step,
        seq_len=cfg.data.seq_len,
        pool_size=cfg.data.pool_size,
        mixture=[getattr(stage.mixture, kind.value) for kind in KINDS],
        ratio_unit=stage.ratio_unit,
        mix=stage.mix,
        samples_per_row=batch.samples_per_row,
        pad_dropout=cfg.data.pad_dropout,
        first_sentence=cfg.data.first_sentence,
        over_long=cfg.data.over_long,
        training_steps=stage.early_stop.at_step or stage.training_steps,
    )


def preset_digest(cfg: RunConfig) -> str:
    """Over source, epoch, sample, span, caption form and truncation of every document, row by row, of the first steps
    that hold at least 600 rows (at least 4 steps, so that the late source joins)."""
    plan, digest, rows, steps = preset_plan(cfg), hashlib.sha256(), 0, 0
    while rows < 600 or steps < 4:
        for row in plan.next_step():
            rows += 1
            for document in row.documents:
                fields = (
                    row.step, row.row, document.source, document.epoch, document.sample, document.start,
                    document.length, int(document.short_caption), document.truncated,
                )  # fmt: skip
                digest.update(repr(fields).encode())
        steps += 1
    return digest.hexdigest()


@pytest.mark.parametrize("shares", DEALT, ids=lambda shares: ":".join(map(str, shares)))
def test_the_dealt_order_of_every_mixture_of_the_papers_is_the_pinned_one(shares: tuple[int, int, int]) -> None:
    sources = [PlanSource(name=kind.value, kind=kind, tokens=np.ones(1, np.int32)) for kind in KINDS]
    dealt = "".join(LETTERS[KINDS[source]] for source in CarrySchedule(Mixture(sources, shares)).deal(1000))
    assert dealt[:24] == DEALT[shares]
    # the rule in one line, independently: who would be furthest behind after the next document has been counted
    had = [0, 0, 0]
    for number, letter in enumerate(dealt, start=1):
        behind = [Fraction(share * number, sum(shares)) - given for share, given in zip(shares, had, strict=True)]
        kind = max((k for k in range(3) if shares[k]), key=behind.__getitem__)
        assert letter == LETTERS[KINDS[kind]], f"document {number}"
        had[kind] += 1


def test_every_preset_is_pinned_and_deals_one_of_the_pinned_mixtures(tmp_path) -> None:
    assert set(ROWS) == set(preset_names())
    mixtures = [preset_config(preset, tmp_path).stage.mixture for preset in ROWS]
    assert {(m.understanding, m.text, m.generation) for m in mixtures} == set(DEALT)


@pytest.mark.parametrize("preset", ROWS)
def test_the_rows_of_every_preset_are_the_pinned_ones(preset: str, tmp_path) -> None:
    assert preset_digest(preset_config(preset, tmp_path)) == ROWS[preset]
