"""Which pending documents make the next row: exact subset-sum over a small pool, and nobody waits for ever.

Both functions see only lengths, oldest document first, and return a `Layout`; the plan owns the pool. Filling a row best is a
subset-sum problem. With at most a few dozen documents and rows of a few thousand tokens it is solved exactly: one Python integer
holds, as bits, every gap that can be left at the row's end, and taking a document of n tokens shifts it right by n.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Layout(NamedTuple):
    """One row: the pool positions that it takes whole, in row order, and the text (if any) of which only `cut_length` tokens are
    taken, at the row's end. `cut` is -1 where there is none."""

    whole: list[int]
    cut: int = -1
    cut_length: int = 0


def minimum_piece(seq_len: int) -> int:
    """The shortest piece that a text may be cut into, in tokens: 16 at 4096, never less than 2.

    Each cut costs the tail the context before it. A piece has to be long enough that most of its tokens see some context, and short
    enough to matter: at most 1/256 of a row stays empty for want of a piece (and only where no set of whole documents fits).
    """
    return max(2, seq_len // 256)


def best_subset(lengths: Sequence[int], capacity: int) -> tuple[list[int], int]:
    """The subset with the largest sum <= capacity, as ascending positions, and the gap it leaves.

    Of several best subsets, one whose last member comes earliest. `lengths` are positive; those beyond `capacity` are never taken.
    """
    gaps = 1 << capacity  # bit g: a subset of the documents seen so far leaves a gap of g tokens
    history: list[int] = []
    remember = history.append
    for length in lengths:
        remember(gaps)
        gaps |= gaps >> length
        if gaps & 1:
            break
    best = gap = (gaps & -gaps).bit_length() - 1
    subset = []
    last = len(history)
    while gap < capacity:
        wanted = 1 << gap
        first = 0
        while first < last:  # once there, a gap stays: a binary search for the document that brought it
            middle = (first + last) >> 1
            if history[middle] & wanted:
                last = middle
            else:
                first = middle + 1
        last -= 1
        subset.append(last)
        gap += lengths[last]
    subset.reverse()
    return subset, best


def pack_tokens(lengths: Sequence[int], cuttable: Callable[[int], bool], seq_len: int, *, tail: bool) -> Layout:
    """Lay out a row of up to `seq_len` tokens. `lengths`: of the pool, oldest first; `cuttable(position)`: whether that document may be cut,
    which those longer than `seq_len` must; it is asked only where a gap remains. `tail`: position 0 is what is left of a text cut before; it comes first, so that its spans stay in consecutive rows.

    The oldest document is always taken. The rest of the row goes to the subset of the pool that fills it best; if a gap remains, the
    oldest text that is long enough is cut to fill it. A new text is not cut after a tail that kept the oldest document out: else a chain
    of tails could keep it out for ever. So a document waits at most two rows for each document before it (cut texts: for each piece).
    """
    piece = minimum_piece(seq_len)
    if lengths[0] > seq_len:
        # If less than a piece would be left over, the row stays that much short.
        return Layout([], 0, min(seq_len, lengths[0] - piece))
    whole, capacity, oldest_waits = [0], seq_len - lengths[0], False
    if tail and len(lengths) > 1:
        oldest_waits = lengths[1] > capacity
        if not oldest_waits:
            whole, capacity = [0, 1], capacity - lengths[1]
    if not capacity:
        return Layout(whole)
    first = len(whole)
    subset, gap = best_subset(lengths[first:], capacity)
    whole += [position + first for position in subset]
    if gap >= piece:
        taken = set(whole)
        for position in (1,) if oldest_waits else range(first, len(lengths)):
            # What was not taken is longer than the gap, else the subset would not be the best.
            if position not in taken and cuttable(position) and lengths[position] >= 2 * piece:
                return Layout(whole, position, min(gap, lengths[position] - piece))
    return Layout(whole)


def pack_samples(lengths: Sequence[int], seq_len: int, count: int) -> Layout | None:
    """Lay out a row of exactly `count` whole documents within `seq_len` tokens; None if no `count` documents of the pool fit.

    The oldest document that can be part of any such row is taken, then each next oldest with which the row can still be completed.
    """
    if len(lengths) >= count and sum(lengths[:count]) <= seq_len:
        return Layout(list(range(count)))
    shortest = sorted(lengths)[:count]
    if len(shortest) < count or sum(shortest) > seq_len:
        return None
    whole: list[int] = []
    gap = seq_len
    for position, length in enumerate(lengths):
        missing = count - len(whole) - 1
        later = lengths[position + 1 :]
        if length <= gap and missing <= len(later) and length + sum(sorted(later)[:missing]) <= gap:
            whole.append(position)
            gap -= length
            if not missing:
                return Layout(whole)
    raise AssertionError("a feasible row was not completed")  # only a bug gets here: the first check proved feasibility
