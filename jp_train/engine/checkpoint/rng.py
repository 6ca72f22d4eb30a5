"""Random states of this process as plain tensors, for a checkpoint; and those of a rank that the checkpoint does not
know."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch

PREFIX = "rng/"


def rng_tensors() -> list[tuple[str, torch.Tensor]]:
    """torch's, CUDA's, Python's and numpy's random states, named `rng/...`."""
    _, words, gauss = random.getstate()
    legacy = np.random.get_state(legacy=False)
    assert isinstance(legacy, dict)
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.tensor(
            [*legacy["state"]["key"].tolist(), int(legacy["state"]["pos"]), int(legacy["has_gauss"])], dtype=torch.int64
        ),
        "gauss": torch.tensor([float("nan") if gauss is None else gauss, float(legacy["gauss"])], dtype=torch.float64),
    }
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return [(PREFIX + name, value) for name, value in states.items()]


def restore_rng(saved: dict[str, torch.Tensor]) -> None:
    """Set the random states of this process; `saved` as `rng_tensors` gave it."""
    torch.set_rng_state(saved["rng/torch"])
    if "rng/cuda" in saved and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(saved["rng/cuda"])
    python_gauss, numpy_gauss = saved["rng/gauss"].tolist()
    random.setstate((3, tuple(saved["rng/python"].tolist()), None if python_gauss != python_gauss else python_gauss))
    *key, pos, has_gauss = saved["rng/numpy"].tolist()
    np.random.set_state(("MT19937", np.array(key, dtype=np.uint32), pos, has_gauss, numpy_gauss))


def derive_rng(*parts: object) -> None:
    """Random states that depend on nothing but `parts`: a rank that joins at some step starts the same however often
    it is started."""
    seed = int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:4], "little")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
