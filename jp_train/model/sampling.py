"""How an export samples images unless a command says otherwise: kept in its generation_config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jp_train.errors import CheckpointError
from jp_train.files import write_atomically

GENERATION_FILE = "generation_config.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Defaults of image generation; without a file those of the paper (docs/model.md)."""

    cfg_scale: float = 5.0
    """Guidance: logits = uncond + cfg_scale x (cond - uncond)."""
    temperature: float = 1.0
    """0 takes the likeliest code."""

    def override(self, cfg_scale: float | None, temperature: float | None) -> Sampling:
        """With what is not None."""
        return Sampling(
            cfg_scale=self.cfg_scale if cfg_scale is None else cfg_scale,
            temperature=self.temperature if temperature is None else temperature,
        )

    def describe(self) -> str:
        return f"cfg scale {self.cfg_scale:g}, temperature {self.temperature:g}"

    def keys(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """As keys of generation_config.json, beside the other ``generation_kwargs``. The temperature is among these,
        because transformers would apply one of its own key to text, too."""
        return {"guidance_scale": self.cfg_scale, "generation_kwargs": {**kwargs, "temperature": self.temperature}}


def read_sampling(folder: Path) -> Sampling:
    """The defaults that an export carries; the paper's where the file or a key is missing.

    Raises:
        CheckpointError: if the file is there and cannot be read.
    """
    file = folder / GENERATION_FILE
    if not file.exists():
        return Sampling()
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        values = raw.get("guidance_scale"), (raw.get("generation_kwargs") or {}).get("temperature")
        return Sampling().override(*(None if value is None else float(value) for value in values))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file} cannot be read: {error}; mend it, or remove it to sample as the paper"
        ) from error


def write_sampling(folder: Path, sampling: Sampling) -> None:
    """Set the defaults of an export that has been written already."""
    file = folder / GENERATION_FILE
    raw = json.loads(file.read_text(encoding="utf-8"))
    raw |= sampling.keys(raw.get("generation_kwargs", {}))
    write_atomically(file, json.dumps(raw, indent=2) + "\n")
