"""Sources without data: stated length distributions instead of an index, for a forecast before the data is there.

A file of lengths (YAML or JSON) names sources, or kinds for all their sources:

    understanding: {mean: 200, sigma: 0.6, samples: 5_000_000}
    my_text: {mean: 1000, sigma: 1.0, max: 20000, samples: 2_000_000, bytes: 4000}

`mean`: tokens of text beside image and template, log-normally distributed with `sigma`, clipped to [3, `max`]; `bytes`:
of what a read of one sample fetches besides stored VQ ids, image included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from jp_train.config.choices import ImageEnd
from jp_train.config.schema import RunConfig
from jp_train.data.permute import name_key
from jp_train.data.plan import PlanSource
from jp_train.errors import ConfigError
from jp_train.types import KINDS, Kind

ARRAY_SAMPLES = 500_000
"""Lengths drawn per source at most; a larger source repeats them. Its epochs depend on their number and mean alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """The stated distribution of one source or kind."""

    mean: float
    sigma: float
    max: int = 20_000
    samples: int = 1_000_000
    bytes: int = 4_000


DEFAULTS = {
    Kind.UNDERSTANDING: Lengths(mean=200, sigma=0.6, bytes=150_000),
    Kind.TEXT: Lengths(mean=1000, sigma=1.0, bytes=4_000),
    Kind.GENERATION: Lengths(mean=80, sigma=0.8, bytes=150_000),
}
"""What bench/planner.py uses; 150 KB is a JPEG of half a megapixel."""


def read_lengths(path: str | Path | None, cfg: RunConfig) -> dict[str, Lengths]:
    """The distribution of every source of `cfg`: from the file's entry for it, else for its kind, else DEFAULTS.

    Raises:
        ConfigError: for an unreadable file, a name that is neither a source nor a kind, an unknown or impossible
        number.
    """
    stated: dict[object, dict[str, Any]] = {}
    if path is not None:
        try:
            content: object = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        except (OSError, YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
            raise ConfigError(
                f"cannot read the lengths in {path}: {error}; "
                "expected YAML or JSON with `NAME: {mean: 200, sigma: 0.6}`"
            ) from error
        names = [*cfg.data.sources, *map(str, KINDS)]
        for name, entry in content.items() if isinstance(content, dict) else [("the file", content)]:
            if name not in names:
                raise ConfigError(
                    f"{path}: {name!r} is neither a source of the configuration nor a kind; "
                    f"expected one of {', '.join(names)}"
                )
            stated[name] = _checked(f"{path}: {name}", entry)
    lengths = {}
    for name, source in cfg.data.sources.items():
        kind = Kind(source.kind.value)
        lengths[name] = replace(DEFAULTS[kind], **stated.get(str(kind), {}) | stated.get(name, {}))
    return lengths


def _checked(where: str, entry: object) -> dict[str, Any]:
    names = {field.name for field in fields(Lengths)}
    if not isinstance(entry, dict) or set(entry) - names:
        raise ConfigError(f"{where} is {entry!r}; expected numbers for some of {', '.join(sorted(names))}")
    for key, value in entry.items():
        least = 0 if key == "sigma" else 1
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value < 1e12:
            raise ConfigError(f"{where}.{key} is {value!r}; expected a number >= {least}")
    return entry


def synthetic_sources(cfg: RunConfig, lengths: Mapping[str, Lengths], slots: int) -> list[PlanSource]:
    """Sources of the plan with drawn lengths; `slots`: tokens of one image. The draws depend on the source's name
    alone."""
    sources = []
    for name, source in cfg.data.sources.items():
        kind, stated = Kind(source.kind.value), lengths[name]
        around = template_tokens(kind, cfg, slots)
        count = min(int(stated.samples), ARRAY_SAMPLES)
        words = np.random.default_rng(name_key(name)).lognormal(
            np.log(stated.mean) - stated.sigma**2 / 2, stated.sigma, count
        )
        tokens = (around + np.clip(words, 3, stated.max)).astype(np.int32)
        first = np.minimum(tokens, around + np.maximum(3, (tokens - around) // 3)).astype(np.int32)
        sources.append(
            PlanSource(
                name=name,
                kind=kind,
                tokens=tokens,
                short_tokens=first if kind is Kind.GENERATION and cfg.data.first_sentence > 0 else None,
                min_tokens=0 if kind is Kind.TEXT else around,
                weight=source.weight,
                from_step=source.from_step,
                to_step=source.to_step,
                cuttable=kind is Kind.TEXT,
            )
        )
    return sources


def template_tokens(kind: Kind, cfg: RunConfig, slots: int) -> int:
    """Tokens of a document besides its text, without a tokenizer at hand: the image with its markers, BOS and EOS."""
    if kind is Kind.TEXT:
        return 2
    if kind is Kind.UNDERSTANDING:
        return slots + 3
    return slots + 2 + {ImageEnd.eoi_eos: 2, ImageEnd.eoi: 1, ImageEnd.none: 0}[cfg.data.image_end]
