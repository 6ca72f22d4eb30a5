"""What a row of the stage holds on average, from the mixture and stated document lengths alone: for FLOPs before there
is any data.

Lengths are the ones that `jp-train data simulate --synthetic` draws from (tools/simulate/synthetic.py): log-normal, by
kind. Whoever has data learns more from `jp-train data simulate`, whose figures of a synthetic stage agree with these
(tests/tools/forecast/test_workload.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np

from jp_train.config.choices import BatchUnit, Packing, RatioUnit
from jp_train.config.schema import RunConfig
from jp_train.model.flops import BatchStatistics
from jp_train.tools.simulate.synthetic import DEFAULTS, template_tokens
from jp_train.types import KINDS, Kind

FILL = 0.998
"""Share of a packed row that is filled (measured by bench/planner.py: 99.85 to 99.99 %)."""
QUANTILES = 4000


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """Means of one row. `squared`: the sum of its attention segments' lengths squared."""

    tokens: float
    squared: float
    documents: float
    und_images: float
    gen_images: float
    text_positions: float
    image_positions: float

    def step(self, rows: int, *, encoded: bool) -> BatchStatistics:
        """All rows of a step, in whole numbers. `encoded`: images to generate are encoded on the fly."""
        return BatchStatistics(
            tokens=round(rows * self.tokens),
            squared_lengths=round(rows * self.squared),
            und_images=round(rows * self.und_images),
            gen_images=round(rows * self.gen_images),
            text_positions=round(rows * self.text_positions),
            image_positions=round(rows * self.image_positions),
            encoded_images=round(rows * self.gen_images) * encoded,
        )


@cache
def _normal_quantiles() -> np.ndarray:
    return np.array([NormalDist().inv_cdf((number + 0.5) / QUANTILES) for number in range(QUANTILES)])


def lengths_of(kind: Kind, cfg: RunConfig, slots: int) -> np.ndarray:
    """Equally likely lengths of a document of this kind, in tokens, template and image included."""
    stated = DEFAULTS[kind]
    normal = _normal_quantiles()
    words = np.clip(np.exp(np.log(stated.mean) - stated.sigma**2 / 2 + stated.sigma * normal), 3, stated.max)
    if kind is Kind.GENERATION and cfg.data.first_sentence > 0:
        words = (1 - cfg.data.first_sentence) * words + cfg.data.first_sentence * np.maximum(3, words / 3)
    return template_tokens(kind, cfg, slots) + words


def average_row(cfg: RunConfig, slots: int) -> Row:
    """Documents in the mixture's ratio until the row is full (or has its samples)."""
    limit = cfg.data.seq_len
    shares = np.array([getattr(cfg.stage.mixture, str(kind)) for kind in KINDS], float)
    drawn = [lengths_of(kind, cfg, slots) for kind in KINDS]
    # long text goes on in the next row; what has an image is cut
    used = [
        lengths if kind is Kind.TEXT else np.minimum(lengths, limit) for kind, lengths in zip(KINDS, drawn, strict=True)
    ]
    means = np.array([lengths.mean() for lengths in used])
    if cfg.stage.ratio_unit is RatioUnit.tokens:
        shares = shares / means
    shares = shares / shares.sum()
    if cfg.stage.batch_unit is BatchUnit.samples:
        documents = float(cfg.stage.samples_per_row)
        means = np.array([np.minimum(lengths, limit).mean() for lengths in drawn])
    else:
        documents = FILL * limit / float(shares @ means)
    counts = dict(zip(KINDS, documents * shares, strict=True))
    squares = np.array([float((_pieces_squared(lengths, limit)).mean()) for lengths in used])
    tokens = documents * float(shares @ means)
    und, gen, text = counts[Kind.UNDERSTANDING], counts[Kind.GENERATION], counts[Kind.TEXT]
    of_kind = dict(zip(KINDS, means, strict=True))
    return Row(
        tokens=tokens,
        squared=tokens**2 if cfg.data.packing is Packing.causal else documents * float(shares @ squares),
        documents=documents,
        und_images=und,
        gen_images=gen,
        text_positions=text * (of_kind[Kind.TEXT] - 1)
        + und * (of_kind[Kind.UNDERSTANDING] - template_tokens(Kind.UNDERSTANDING, cfg, slots) + 1),
        image_positions=gen * slots,
    )


def _pieces_squared(lengths: np.ndarray, limit: int) -> np.ndarray:
    """Sum of squares of the pieces that documents of these lengths become, the start of a piece being anywhere in a
    row on average."""
    rest = lengths % limit
    return (lengths // limit) * limit**2 + rest**2
