"""Which parameters learn: one function sets ``requires_grad`` for the whole model from the names in
``stage.trainable``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jp_train.config.schema import MODULES
from jp_train.errors import ConfigError, one_of

if TYPE_CHECKING:  # `check` and `forecast` read names only
    from torch import nn

PREFIXES: dict[str, tuple[str, ...]] = {
    "vision_model": ("model.vision_model.",),
    "aligner": ("model.aligner.",),
    "language_model": ("model.language_model.", "lm_head."),
    "gen_embed": ("model.generation_embeddings.",),
    "gen_aligner": ("model.generation_aligner.",),
    "gen_head": ("model.generation_head.",),
}
"""Parameter-name prefixes of each name of ``stage.trainable``; token embeddings and text head belong to the language
model."""

VQ_MODULE = "gen_vision_model"
VQ_PREFIX = "model.vqmodel."

assert tuple(PREFIXES) == MODULES


@dataclass(frozen=True, kw_only=True, slots=True)
class FreezeReport:
    """What ``set_trainable`` decided.  Counts are elements (of the whole parameter when ZeRO-3 has partitioned it)."""

    trainable: dict[str, int]
    """Elements of each trainable module."""
    frozen: dict[str, int]
    """Elements of each frozen module."""
    trainable_names: tuple[str, ...]

    def describe(self) -> str:
        """One line for the log."""

        def part(counts: dict[str, int]) -> str:
            return ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "nothing"

        return f"trainable: {part(self.trainable)}; frozen: {part(self.frozen)}"


def module_of(parameter_name: str) -> str:
    """Name in ``schema.MODULES`` (or ``gen_vision_model``) of the module that a parameter belongs to.

    A leading ``module.`` (a DeepSpeed engine's) is ignored.

    Raises:
        KeyError: if the name belongs to no module of the model.
    """
    name = parameter_name.removeprefix("module.")
    for module, prefixes in PREFIXES.items():
        if name.startswith(prefixes):
            return module
    if name.startswith(VQ_PREFIX):
        return VQ_MODULE
    raise KeyError(f"parameter {parameter_name!r} belongs to none of {', '.join((*PREFIXES, VQ_MODULE))}")


def set_trainable(model: nn.Module, names: Iterable[str]) -> FreezeReport:
    """Set ``requires_grad`` on every parameter: True in the named modules, False elsewhere.

    Call it before ``deepspeed.initialize``.

    Raises:
        ConfigError: for a name that is no module (with the nearest valid one), a name given twice, or no name at all.
    """
    trainable = list(names)
    for name in trainable:
        if name not in PREFIXES:
            extra = " (the VQ tokenizer is never trained here)" if name == VQ_MODULE else ""
            raise ConfigError(f"stage.trainable: unknown module {name!r}{extra}{one_of(name, PREFIXES, cutoff=0.4)}")
    if not trainable or len(set(trainable)) != len(trainable):
        raise ConfigError(
            f"stage.trainable={trainable}: list each module that learns once, and at least one of {', '.join(PREFIXES)}"
        )

    counts: dict[bool, dict[str, int]] = {True: {}, False: {}}
    learning: list[str] = []
    for name, parameter in model.named_parameters():
        module = module_of(name)
        learns = module in trainable
        parameter.requires_grad_(learns)
        counts[learns][module] = counts[learns].get(module, 0) + getattr(parameter, "ds_numel", parameter.numel())
        if learns:
            learning.append(name)
    return FreezeReport(trainable=counts[True], frozen=counts[False], trainable_names=tuple(learning))
