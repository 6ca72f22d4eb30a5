"""Run by test_plan.py in processes of their own: prints a digest of the first rows of a fixed plan that uses every
feature."""

from __future__ import annotations

import hashlib

import numpy as np

from jp_train.data.plan import Plan, PlanSource
from jp_train.types import KINDS, Kind


def main() -> None:
    tokens = np.arange(997, dtype=np.int32) * 7919 % 900 + 100
    sources = [
        PlanSource(name="und", kind=Kind.UNDERSTANDING, tokens=tokens, min_tokens=90, to_step=6),
        PlanSource(name="und later", kind=Kind.UNDERSTANDING, tokens=tokens + 3, from_step=4),
        PlanSource(name="text", kind=Kind.TEXT, tokens=tokens * 9, cuttable=True),
        PlanSource(name="real", kind=Kind.GENERATION, tokens=tokens + 50, short_tokens=tokens, weight=0.7),
        PlanSource(name="synthetic", kind=Kind.GENERATION, tokens=tokens + 1, dropped_tokens=np.full(997, 80)),
    ]
    shares = [(2, 3, 5)[KINDS.index(kind)] for kind in KINDS]
    digest = hashlib.sha256()
    for unit in ("samples", "tokens"):
        for mix in ("carry", "sampled"):
            plan = Plan(
                sources,
                seed=3,
                rows_per_step=16,
                seq_len=1024,
                pool_size=24,
                mixture=shares,
                ratio_unit=unit,
                mix=mix,
                first_sentence=0.25,
                pad_dropout=0.1,
            )
            for _ in range(10):
                for row in plan.next_step():
                    for d in row.documents:
                        fields = (
                            row.row,
                            d.source,
                            d.epoch,
                            d.sample,
                            d.start,
                            d.length,
                            int(d.short_caption),
                            d.truncated,
                        )
                        digest.update(repr(fields).encode())
    print(digest.hexdigest())


if __name__ == "__main__":
    main()
