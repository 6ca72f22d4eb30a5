"""bfloat16 where the CPU gains from it."""

from __future__ import annotations

import contextlib

import torch


def bfloat16_pays() -> bool:
    """True where the CPU multiplies bfloat16 tiles in hardware (Intel AMX): there it is several times faster than
    float32.

    Elsewhere bfloat16 may be emulated and slower, so float32 is the choice.
    """
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(supported and supported())


def autocast(enabled: bool) -> contextlib.AbstractContextManager[None]:
    """Matrix products and convolutions in bfloat16 if that is ``enabled`` and pays on this CPU; otherwise float32."""
    if enabled and bfloat16_pays():
        return torch.autocast("cpu", torch.bfloat16)
    return contextlib.nullcontext()
