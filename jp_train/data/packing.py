"""Which pending documents make the next row: exact subset-sum over a small pool, with a bound on how long a document
waits.

Both functions see only lengths, oldest document first, and return a `Layout`; the plan owns the pool. Filling a row
best is a subset-sum problem. With at most a few dozen documents and rows of a few thousand tokens it is solved exactly:
one Python integer holds, as bits, every gap that can be left at the row's end, and taking a document of n tokens shifts
it right by n.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple


class Layout(NamedTuple):
    """One row: the pool positions that it takes whole, in row order, and the text (if any) of which only
    `cut_length` tokens are taken, at the row's end. `cut` is -1 where there is none."""

    whole: list[int]
    cut: int = -1
    cut_length: int = 0


_layout = partial(tuple.__new__, Layout)  # its constructor takes four times as long, once a row


def minimum_piece(seq_len: int) -> int:
    """The shortest piece that a text may be cut into, in tokens: 16 at 4096, never less than 2.

    Each cut costs the tail the context before it. A piece has to be long enough that most of its tokens see some
    context, and short enough to matter: at most 1/256 of a row stays empty for want of a piece (and only where no set
    of whole documents fits).
    """
    return max(2, seq_len // 256)


def best_subset(lengths: Sequence[int], capacity: int, first: int = 0) -> tuple[list[int], int]:
    """The subset of lengths[first:] with the largest sum <= capacity, as ascending positions in `lengths`, and the gap
    it leaves.

    Of several best subsets, one whose last member comes earliest. `lengths` are positive; those beyond `capacity` are
    never taken.
    """
    gaps = 1 << capacity  # bit g: a subset of the documents seen so far leaves a gap of g tokens
    history = [gaps] * first  # history[p]: the gaps before document p
    for length in lengths[first:]:
        history.append(gaps)
        gaps |= gaps >> length
        if gaps & 1:
            best = 0
            break
    else:
        best = (gaps & -gaps).bit_length() - 1
    subset: list[int] = []
    gap, half, position = best, capacity >> 1, len(history) - 1
    # Backwards: the document that brought a gap is the last one before which it was not there. A bit of a long number
    # is tested in the way that makes the shorter number: half of all planning is spent in this function.
    while gap < half:
        bit = 1 << gap
        while history[position] & bit:
            position -= 1
        subset.append(position)
        gap += lengths[position]
        position -= 1
    while gap < capacity:
        while history[position] >> gap & 1:
            position -= 1
        subset.append(position)
        gap += lengths[position]
        position -= 1
    subset.reverse()
    return subset, best


def pack_tokens(lengths: Sequence[int], cuttable: Callable[[int], bool], seq_len: int, *, tail: bool) -> Layout:
    """Lay out a row of up to `seq_len` tokens. `lengths`: of the pool, oldest first; `cuttable(position)`: whether that
    document may be cut, which those longer than `seq_len` must; it is asked only where a gap remains. `tail`: position
    0 is what is left of a text cut before; it comes first, so that its spans stay in consecutive rows.

    The oldest document is always taken. The rest of the row goes to the subset of the pool that fills it best; if a gap
    remains, the oldest text that is long enough is cut to fill it. A new text is not cut after a tail that kept the
    oldest document out: otherwise a chain of tails could keep it out forever. So a document waits at most two rows for
    each document before it (cut texts: for each piece).
    """
    capacity = seq_len - lengths[0]
    if capacity < 0:
        # If less than a piece would be left over, the row stays that much short.
        return Layout([], 0, min(seq_len, lengths[0] - minimum_piece(seq_len)))
    whole, oldest_waits = [0], False
    if tail and len(lengths) > 1:
        oldest_waits = lengths[1] > capacity
        if not oldest_waits:
            whole, capacity = [0, 1], capacity - lengths[1]
    if not capacity:
        return _layout((whole, -1, 0))
    first = len(whole)
    subset, gap = best_subset(lengths, capacity, first)
    whole += subset
    if gap:
        piece = minimum_piece(seq_len)
        if gap >= piece:
            taken = set(whole)
            for position in (1,) if oldest_waits else range(first, len(lengths)):
                # What was not taken is longer than the gap, else the subset would not be the best.
                if position not in taken and lengths[position] >= 2 * piece and cuttable(position):
                    return Layout(whole, position, min(gap, lengths[position] - piece))
    return _layout((whole, -1, 0))


def pack_samples(lengths: Sequence[int], seq_len: int, count: int) -> Layout | None:
    """Lay out a row of exactly `count` whole documents within `seq_len` tokens; None if no `count` documents of the
    pool fit.

    The oldest document that can be part of any such row is taken, then each next oldest with which the row can still be
    completed.
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
