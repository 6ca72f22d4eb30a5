"""Names and shapes of all parameters, from the configuration alone.

Nothing here imports torch or transformers, which takes 5 s of CPU time: `check` and `forecast` need only this list.
tests/model/test_parameters.py compares it with the modules themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from jp_train.config.schema import ModelConfig
from jp_train.config.validate import check_sizes
from jp_train.model.freeze import VQ_MODULE, VQ_PREFIX, module_of

VQLayer = tuple[str, tuple[int, ...], int]
"""Name below ``model.vqmodel.``, shape of the weight, and side of the output in positions."""


def parameter_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Whole shapes of the trained module's parameters (``JanusPro.named_parameters``), in the order of the module.

    Raises:
        ConfigError: if sizes do not fit each other.
    """
    check_sizes(cfg)
    vision, vq, language = cfg.vision, cfg.vq, cfg.language
    width, inner, hidden = vision.hidden_size, int(vision.hidden_size * vision.mlp_ratio), language.hidden_size
    shapes: dict[str, tuple[int, ...]] = {}

    def add(name: str, *shape: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = shape[:1]

    tower = "model.vision_model"
    add(f"{tower}.embeddings.patch_embedding", width, 3, vision.patch_size, vision.patch_size)
    add(f"{tower}.embeddings.position_embedding", (vision.image_size // vision.patch_size) ** 2, width, bias=False)
    for layer in (f"{tower}.encoder.layers.{number}" for number in range(vision.layers)):
        add(f"{layer}.layer_norm1", width)
        for part in ("q_proj", "k_proj", "v_proj", "projection_layer"):
            add(f"{layer}.self_attn.{part}", width, width)
        add(f"{layer}.layer_norm2", width)
        add(f"{layer}.mlp.fc1", inner, width)
        add(f"{layer}.mlp.fc2", width, inner)
    add(f"{tower}.post_layernorm", width)
    add("model.aligner.fc1", hidden, width)
    add("model.aligner.hidden_layers.0", hidden, hidden)
    add("model.generation_embeddings", vq.codebook_size, vq.embed_dim, bias=False)
    add("model.generation_aligner.fc1", hidden, vq.embed_dim)
    add("model.generation_aligner.hidden_layers.0", hidden, hidden)
    add("model.generation_head.proj_out", hidden, hidden)
    add("model.generation_head.vision_head", vq.codebook_size, hidden)
    add("model.language_model.embed_tokens", language.vocab_size, hidden, bias=False)
    for layer in (f"model.language_model.layers.{number}" for number in range(language.layers)):
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            add(f"{layer}.self_attn.{part}", hidden, hidden, bias=False)
        for part in ("gate_proj", "up_proj"):
            add(f"{layer}.mlp.{part}", language.intermediate_size, hidden, bias=False)
        add(f"{layer}.mlp.down_proj", hidden, language.intermediate_size, bias=False)
        for part in ("input_layernorm", "post_attention_layernorm"):
            add(f"{layer}.{part}", hidden, bias=False)
    add("model.language_model.norm", hidden, bias=False)
    add("lm_head", language.vocab_size, hidden, bias=False)
    return shapes


def vq_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the VQ tokenizer's parameters under canonical names (``model.vqmodel.…``)."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape, _ in vq_layers(cfg):
        shapes[f"{VQ_PREFIX}{name}.weight"] = shape
        if name != "quantize.embedding":
            shapes[f"{VQ_PREFIX}{name}.bias"] = shape[:1]
    return shapes


def parameter_counts(cfg: ModelConfig) -> dict[str, int]:
    """Elements of each module, ``schema.MODULES`` plus ``gen_vision_model``."""
    counts: dict[str, int] = {}
    for name, shape in parameter_shapes(cfg).items():
        counts[module_of(name)] = counts.get(module_of(name), 0) + math.prod(shape)
    return {**counts, VQ_MODULE: sum(map(math.prod, vq_shapes(cfg).values()))}


def vq_layers(cfg: ModelConfig) -> Iterator[VQLayer]:
    """transformers' ``JanusVQVAE`` layer by layer, in the order of its parameters."""
    vq, side = cfg.vq, cfg.vision.image_size
    widths = [vq.base_channels * factor for factor in vq.channel_multiplier]
    last, width = len(widths) - 1, vq.base_channels
    yield "encoder.conv_in", (width, 3, 3, 3), side
    for level, outer in enumerate(widths):
        path, attends = f"encoder.down.{level}", level == last
        yield from _blocks(path, width, outer, vq.res_blocks, side, attends=attends)
        width = outer
        if not attends:
            side //= 2
            yield f"{path}.downsample.conv", (width, width, 3, 3), side
    yield from _middle("encoder.mid", width, side)
    yield "encoder.norm_out", (width,), side
    yield "encoder.conv_out", (vq.latent_channels, width, 3, 3), side
    yield "quantize.embedding", (vq.codebook_size, vq.embed_dim), side
    yield "quant_conv", (vq.embed_dim, vq.latent_channels, 1, 1), side
    yield "post_quant_conv", (vq.latent_channels, vq.embed_dim, 1, 1), side
    yield "decoder.conv_in", (width, vq.latent_channels, 3, 3), side
    yield from _middle("decoder.mid", width, side)
    for level, outer in enumerate(reversed(widths)):
        path = f"decoder.up.{level}"
        yield from _blocks(path, width, outer, vq.res_blocks + 1, side, attends=level == 0)
        width = outer
        if level != last:
            side *= 2
            yield f"{path}.upsample.conv", (width, width, 3, 3), side
    yield "decoder.norm_out", (width,), side
    yield "decoder.conv_out", (3, width, 3, 3), side


def _blocks(path: str, width: int, outer: int, count: int, side: int, *, attends: bool) -> Iterator[VQLayer]:
    for number in range(count):
        yield from _residual(f"{path}.block.{number}", outer if number else width, outer, side)
    for number in range(count if attends else 0):
        yield from _attention(f"{path}.attn.{number}", outer, side)


def _residual(path: str, width: int, outer: int, side: int) -> Iterator[VQLayer]:
    yield f"{path}.norm1", (width,), side
    yield f"{path}.conv1", (outer, width, 3, 3), side
    yield f"{path}.norm2", (outer,), side
    yield f"{path}.conv2", (outer, outer, 3, 3), side
    if width != outer:
        yield f"{path}.nin_shortcut", (outer, width, 1, 1), side


def _attention(path: str, width: int, side: int) -> Iterator[VQLayer]:
    yield f"{path}.norm", (width,), side
    for part in ("q", "k", "v", "proj_out"):
        yield f"{path}.{part}", (width, width, 1, 1), side


def _middle(path: str, width: int, side: int) -> Iterator[VQLayer]:
    yield from _residual(f"{path}.block_1", width, width, side)
    yield from _attention(f"{path}.attn_1", width, side)
    yield from _residual(f"{path}.block_2", width, width, side)
