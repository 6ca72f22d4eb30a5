"""One rule for randomness in the smoke run: a generator is a pure function of a seed and a path of names."""

from __future__ import annotations

import zlib

import numpy as np


def generator(seed: int, *path: str | int) -> np.random.Generator:
    """Return the generator that belongs to ``path`` under ``seed``.

    Sample ``n`` of a source is drawn from ``generator(seed, source, n)``, so it does not depend on how many
    samples were drawn before it, and asking for more samples leaves the earlier ones byte for byte the same.

    Raises:
        ValueError: if ``seed`` or an integer in ``path`` is negative.
    """
    words = [part if isinstance(part, int) else zlib.crc32(part.encode()) for part in path]
    if seed < 0 or any(word < 0 for word in words):
        raise ValueError(f"seed and path must not be negative, got seed={seed}, path={path}")
    return np.random.default_rng([seed, *words])
