"""The model as a list of parameters by module, and what a micro-batch holds: all that memory and communication
depend on."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from jp_train.config.schema import RunConfig
from jp_train.model.freeze import VQ_MODULE, module_of
from jp_train.model.parameters import parameter_counts, parameter_shapes

_LAYER = re.compile(r"model\.(vision_model\.encoder|language_model)\.layers\.\d+(?=\.)")
"""A layer of a tower: ZeRO-3 gathers it as a whole (`config.deepspeed.LEAF_MODULES`)."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One tensor of the model: `path` is the module that ZeRO-3 gathers it for (the layer that it lies in, or the one
    that owns it), `module` its name in `stage.trainable`."""

    name: str
    path: str
    module: str
    numel: int
    trained: bool

    def share(self, world: int) -> int:
        """Elements of a rank's slice, padding included (DeepSpeed cuts every parameter into equal slices)."""
        return -(-self.numel // world)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shapes:
    """The sizes that activations depend on, and the parameters in the model's order."""

    width: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    vision_width: int
    vision_intermediate: int
    vision_layers: int
    vision_heads: int
    image_size: int
    slots: int
    """Tokens of an image."""
    codebook: int
    code_width: int
    vq_base_channels: int
    vq_parameters: int
    learns: frozenset[str]
    parameters: tuple[Parameter, ...]

    @property
    def trained_elements(self) -> int:
        return sum(p.numel for p in self.parameters if p.trained)

    @property
    def elements(self) -> int:
        return sum(p.numel for p in self.parameters)

    @property
    def through_language_model(self) -> bool:
        """Whether gradients pass through the language model."""
        return bool(self.learns & {"language_model", "vision_model", "aligner", "gen_embed", "gen_aligner"})


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """What one forward pass of one rank holds."""

    tokens: int
    und_images: int
    gen_images: int
    text_positions: int
    image_positions: int
    encoded_images: int = 0
    """Images that the VQ tokenizer encodes on the fly before the pass."""


def shapes_of(cfg: RunConfig) -> Shapes:
    """The model and what learns of it; raises ConfigError where sizes do not fit each other."""
    model, learns = cfg.model, frozenset(cfg.stage.trainable)
    parameters = tuple(
        Parameter(name, _gathered_for(name), module_of(name), math.prod(shape), module_of(name) in learns)
        for name, shape in parameter_shapes(model).items()
    )
    vision, language = model.vision, model.language
    return Shapes(
        width=language.hidden_size,
        intermediate=language.intermediate_size,
        layers=language.layers,
        heads=language.heads,
        vocabulary=language.vocab_size,
        vision_width=vision.hidden_size,
        vision_intermediate=int(vision.hidden_size * vision.mlp_ratio),
        vision_layers=vision.layers,
        vision_heads=vision.heads,
        image_size=vision.image_size,
        slots=(vision.image_size // vision.patch_size) ** 2,
        codebook=model.vq.codebook_size,
        code_width=model.vq.embed_dim,
        vq_base_channels=model.vq.base_channels,
        vq_parameters=parameter_counts(model)[VQ_MODULE],
        learns=learns,
        parameters=parameters,
    )


def _gathered_for(name: str) -> str:
    layer = _LAYER.match(name)
    return layer[0] if layer else name.rpartition(".")[0]


def worst_micro_batch(cfg: RunConfig, shapes: Shapes, rows: int) -> MicroBatch:
    """No micro-batch of the stage takes more memory: rows full, each figure at the most that any composition of a
    row reaches. Where the batch counts samples, of one image each; packed rows may hold one sample of many."""
    mixture = cfg.stage.mixture
    gen = cfg.data.seq_len // (shapes.slots + 3) if mixture.generation > 0 else 0
    und = cfg.data.seq_len // (shapes.slots + 2) if mixture.understanding > 0 else 0  # also of one document
    if cfg.stage.batch_unit.value == "samples":
        gen, und = min(gen, cfg.stage.samples_per_row), min(und, cfg.stage.samples_per_row)
    text = cfg.data.seq_len if mixture.text > 0 else und and cfg.data.seq_len - shapes.slots
    cached = cfg.data.vq_ids.value == "require"
    return MicroBatch(
        tokens=rows * cfg.data.seq_len,
        und_images=rows * und,
        gen_images=rows * gen,
        text_positions=rows * text,
        image_positions=rows * gen * shapes.slots,
        encoded_images=0 if cached else rows * gen,
    )
