"""Randomness without state: permutations and uniform numbers that are pure functions of integers and names.

A source's order in an epoch is a keyed Feistel permutation with cycle walking [1, section 5]: sample n is found in O(1)
time and memory, so the state of a source of 70 million samples is one integer. A document's random choices (pad
dropout, first sentence, crop) are hashes of what identifies the document, so every component that needs one (the
planner, a loader worker, `data explain`) computes the same value independently. Everything is 64-bit integer
arithmetic: the same on every platform, in every process, whatever PYTHONHASHSEED says. Each function has a scalar form
and a `_many` form over numpy arrays with equal results.

[1] Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002. The mixing function is the finaliser of
SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np

MASK64 = (1 << 64) - 1
ROUNDS, ROUNDS_SMALL, SMALL = 6, 24, 4096
"""Feistel rounds: four rounds of a pseudo-random function make a strong permutation (Luby and Rackoff), on grids of
many cells. Below `SMALL` samples more are used: at 5 samples, a chi-square test finds the 120 orders uneven up to 10
rounds and even from 14 on."""

_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB
_U64 = np.uint64
_MOST_TABLED, _MOST_EPOCHS = 4096, 4
"""Rounds are tabled for grids up to this side (16 million samples), where the numbers asked for are of few epochs."""


def mix64(value: int) -> int:
    """A bijection of 64-bit integers in which every output bit depends on every input bit."""
    value = ((value ^ (value >> 30)) * _MULTIPLIER_1) & MASK64
    value = ((value ^ (value >> 27)) * _MULTIPLIER_2) & MASK64
    return value ^ (value >> 31)


def _mix64_many(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> _U64(30))) * _U64(_MULTIPLIER_1)
    values = (values ^ (values >> _U64(27))) * _U64(_MULTIPLIER_2)
    return values ^ (values >> _U64(31))


@lru_cache(maxsize=4096)
def name_key(name: str) -> int:
    """The 64-bit key of a name (a source, a purpose): its BLAKE2b digest, never Python's salted `hash`."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def fold_key(key: tuple[int, ...]) -> int:
    """One 64-bit key from integers of any size and sign (taken modulo 2**64); order and count matter."""
    return _fold_prefix(key, len(key))


def _fold_prefix(prefix: tuple[int, ...], length: int) -> int:
    """`fold_key` of a key of `length` parts after its first parts, `prefix`."""
    folded = mix64((length + _GOLDEN) & MASK64)
    for part in prefix:
        folded = _absorb(folded, part)
    return folded


def _absorb(key: int, part: int) -> int:
    return mix64(((key ^ mix64(part & MASK64)) + _GOLDEN) & MASK64)


def _absorb_many(keys: np.ndarray | int, parts: np.ndarray) -> np.ndarray:
    keys = keys if isinstance(keys, np.ndarray) else _U64(keys)
    return _mix64_many((keys ^ _mix64_many(parts.astype(_U64))) + _U64(_GOLDEN))


def permute(key: tuple[int, ...], index: int, size: int) -> int:
    """Where position `index` of a pseudo-random permutation of range(size) points: for a fixed key, a bijection of
    range(size).

    `key` is any tuple of integers, here (seed, name_key(source), epoch). Costs O(1) time and no memory.

    Raises:
        ValueError: if `size` is not positive or `index` is not in range(size).
    """
    if size < 1 or not 0 <= index < size:
        raise ValueError(f"permute needs 0 <= index < size, got index {index} of size {size}")
    rows, columns = _grid(size)
    folded = fold_key(key)
    while True:
        row, column = divmod(index, columns)
        for round_number in range(_rounds(size)):
            round_key = (folded + (round_number + 1) * _GOLDEN) & MASK64
            if round_number % 2:
                column = (column + (mix64(row ^ round_key) >> 32)) % columns
            else:
                row = (row + (mix64(column ^ round_key) >> 32)) % rows
        index = row * columns + column
        if index < size:  # cycle walking: a value outside range(size) is permuted again until it falls inside
            return index


def permute_many(key: tuple[int, ...], numbers: np.ndarray, size: int) -> np.ndarray:
    """Samples at `numbers` of the endless sequence that runs through epoch 0, 1, ... of range(size), each with its own
    order.

    Element i equals `permute((*key, numbers[i] // size), numbers[i] % size, size)`. `numbers`: int64 [N], not negative;
    returns int64 [N].
    """
    result = np.empty(len(numbers), np.int64)
    rows, columns = _grid(size)
    if not len(numbers):
        return result
    epochs = range(int(numbers.min()) // size, int(numbers.max()) // size + 1)
    if max(rows, columns) > _MOST_TABLED or len(epochs) > _MOST_EPOCHS:
        of_number, indices = np.divmod(numbers, size)
        keys = _absorb_many(_fold_prefix(key, len(key) + 1), of_number)
        rounds = _rounds(size)
        _walk(result, indices, size, lambda values, pending: _feistel(values, keys[pending], rows, columns, rounds))
        return result
    for epoch in epochs:
        indices, tables = numbers - epoch * size, _round_tables(fold_key((*key, epoch)), size)
        here = slice(None) if len(epochs) == 1 else (indices >= 0) & (indices < size)
        permuted = np.empty(len(indices[here]), np.int64)
        _walk(permuted, indices[here], size, partial(_feistel_by_tables, tables=tables, rows=rows, columns=columns))
        result[here] = permuted
    return result


def _walk(
    result: np.ndarray, indices: np.ndarray, size: int, permuted: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> None:
    """Fill `result`, int64 [N], with the permuted `indices`; cycle walking as in `permute`. `permuted(values,
    pending)`: values that belong to the positions `pending` of the result."""
    pending, values = np.arange(len(indices)), indices
    while len(pending):
        values = permuted(values, pending)
        inside = values < size
        if inside.all():
            result[pending] = values
            return
        result[pending[inside]] = values[inside]
        pending, values = pending[~inside], values[~inside]


def _feistel(values: np.ndarray, keys: np.ndarray, rows: int, columns: int, rounds: int) -> np.ndarray:
    """One pass over the grid for values int64 [N] with keys uint64 [N]."""
    row, column = np.divmod(values.astype(_U64), _U64(columns))
    for round_number in range(rounds):
        keys = keys + _U64(_GOLDEN)
        if round_number % 2:
            column = _remainder(column + (_mix64_many(row ^ keys) >> _U64(32)), _U64(columns))
        else:
            row = _remainder(row + (_mix64_many(column ^ keys) >> _U64(32)), _U64(rows))
    return (row * _U64(columns) + column).astype(np.int64)


def _feistel_by_tables(
    values: np.ndarray, _: np.ndarray, *, tables: tuple[np.ndarray, ...], rows: int, columns: int
) -> np.ndarray:
    """`_feistel` for one key, whose rounds were tabled."""
    row = values // columns
    column = values - row * columns
    for round_number, table in enumerate(tables):
        changed, other, side = (column, row, columns) if round_number % 2 else (row, column, rows)
        changed += table[other]
        changed += (changed >> 63) & side  # the remainder: tables hold what is added, less the side
    return row * columns + column


@lru_cache(maxsize=64)
def _round_tables(folded: int, size: int) -> tuple[np.ndarray, ...]:
    """What each round adds to one coordinate, less that side of the grid, for every value of the other, int64: a
    round depends on nothing else, and a side of the grid is only the root of the size. At most 6 tables of
    `_MOST_TABLED` numbers each (200 KB), or 24 of a small one."""
    rows, columns = _grid(size)
    tables = []
    for round_number in range(_rounds(size)):
        other, side = (rows, columns) if round_number % 2 else (columns, rows)
        keys = _U64((folded + (round_number + 1) * _GOLDEN) & MASK64)
        tables.append(
            ((_mix64_many(np.arange(other, dtype=_U64) ^ keys) >> _U64(32)) % _U64(side)).astype(np.int64) - side
        )
    return tuple(tables)


def _rounds(size: int) -> int:
    return ROUNDS_SMALL if size < SMALL else ROUNDS


def _remainder(values: np.ndarray, divisor: np.uint64) -> np.ndarray:
    """values % divisor; numpy has a fast path for // by a scalar, and none for %."""
    return values - values // divisor * divisor


def _grid(size: int) -> tuple[int, int]:
    """Sides of the smallest near-square grid with at least `size` cells; fewer than sqrt(size) + 1 cells are spare,
    so walks are rare."""
    rows = math.isqrt(size - 1) + 1
    return rows, -(-size // rows)


def document_uniform(seed: int, source_name: str, epoch: int, sample: int, purpose: str) -> float:
    """The uniform number in [0, 1) that decides `purpose` for one document, in steps of 2**-53.

    It is independent of the step, the row, the rank and the other sources. Purposes in use: "first_sentence",
    "pad_dropout", "crop", "variant".
    """
    return (_absorb(_absorb(_document_prefix(seed, source_name, purpose), epoch), sample) >> 11) * 2.0**-53


@lru_cache(maxsize=4096)
def _document_prefix(seed: int, source_name: str, purpose: str) -> int:
    return _fold_prefix((seed, name_key(source_name), name_key(purpose)), 5)


def document_uniform_many(
    seed: int, source_name: str, epochs: np.ndarray, samples: np.ndarray, purpose: str
) -> np.ndarray:
    """`document_uniform` for N documents of one source: epochs, samples int64 [N] -> float64 [N], bit for bit the
    same."""
    keys = _absorb_many(_absorb_many(_document_prefix(seed, source_name, purpose), epochs), samples)
    return (keys >> _U64(11)).astype(np.float64) * 2.0**-53
