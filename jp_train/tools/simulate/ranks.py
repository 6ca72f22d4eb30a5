"""How planned rows are distributed over ranks: which lack a kind, and how long they wait, for every world size.

Rank k of W holds rows [kR/W, (k+1)R/W) of a step, in micro-batches of consecutive rows, as the loader deals them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

LARGEST_WORLD = 4096


def rank_balance(
    work: np.ndarray, kinds: np.ndarray, names: Sequence[str], micro_batch_rows: int
) -> list[dict[str, Any]]:
    """One entry per world size (powers of two that divide the step, and all others up to 4096 that do).

    work: FLOPs of every row, float64 [steps, R]; kinds: whether a row holds a kind, bool [steps, R, len(names)]. `step`
    and `micro_batch` say how often ranks wait for each other: ZeRO-3 gathers weights in every micro-batch, so ranks
    synchronise at least that often. `max_over_mean` is the mean over synchronisations of the slowest rank's FLOPs over
    the average; `lost_percent` the share of all arithmetic during which the other ranks wait; `some_rank_lacks` the
    share of synchronisations in which at least one rank has no document of the kind, `a_rank_lacks` the probability for
    a single rank.
    """
    rows = work.shape[1]
    balance = []
    for world in (size for size in range(1, min(rows, LARGEST_WORLD) + 1) if rows % size == 0):
        entry: dict[str, Any] = {"world": world, "rows_per_rank": rows // world}
        rows_between = {"step": rows // world}
        if rows // world % micro_batch_rows == 0:
            rows_between["micro_batch"] = micro_batch_rows
        for name, size in rows_between.items():
            # [steps, ranks, synchronisations of a step, rows between two of them] -> what a rank does between two
            per_rank = work.reshape(len(work), world, -1, size).sum(3)
            has = kinds.reshape(len(work), world, -1, size, len(names)).any(3)
            slowest, mean = per_rank.max(1), per_rank.mean(1)
            entry[name] = {
                "max_over_mean": float((slowest / mean).mean()),
                "worst": float((slowest / mean).max()),
                "lost_percent": float(100 * (1 - mean.sum() / slowest.sum())),
                "a_rank_lacks": dict(zip(names, (1 - has.mean((0, 1, 2))).tolist(), strict=True)),
                "some_rank_lacks": dict(zip(names, (1 - np.all(has, axis=1).mean((0, 1))).tolist(), strict=True)),
            }
            counts, edges = np.histogram(slowest / mean, bins=40)
            entry[name]["histogram"] = {"edges": edges.tolist(), "counts": counts.tolist()}
        balance.append(entry)
    return balance
