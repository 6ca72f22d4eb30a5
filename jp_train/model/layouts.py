"""Parameter names: the released deepseek-ai layout, transformers' layout (the canonical one here), and pretrained
parts.

Canonical names are those of ``transformers.JanusForConditionalGeneration``, ``model.vqmodel.*`` included. One table
gives the map to and from the released ``MultiModalityCausalLM`` (docs/model.md).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum


class Piece(Enum):
    """Which piece of a released tensor a canonical tensor is."""

    WHOLE = "whole"
    QUERY = 0
    """First third of dim 0 of a fused qkv tensor."""
    KEY = 1
    VALUE = 2
    FIRST_ROW = "first row"
    """Released [1, positions, width], canonical [positions, width]."""


_TOWER, _VISION = "vision_model.vision_tower.", "model.vision_model."
_RULES: list[tuple[str, str, Piece]] = [
    (_TOWER + "patch_embed.proj.{w}", _VISION + "embeddings.patch_embedding.{w}", Piece.WHOLE),
    (_TOWER + "pos_embed", _VISION + "embeddings.position_embedding.weight", Piece.FIRST_ROW),
    (_TOWER + "blocks.{n}.norm{i}.{w}", _VISION + "encoder.layers.{n}.layer_norm{i}.{w}", Piece.WHOLE),
    (_TOWER + "blocks.{n}.attn.qkv.{w}", _VISION + "encoder.layers.{n}.self_attn.q_proj.{w}", Piece.QUERY),
    (_TOWER + "blocks.{n}.attn.qkv.{w}", _VISION + "encoder.layers.{n}.self_attn.k_proj.{w}", Piece.KEY),
    (_TOWER + "blocks.{n}.attn.qkv.{w}", _VISION + "encoder.layers.{n}.self_attn.v_proj.{w}", Piece.VALUE),
    (_TOWER + "blocks.{n}.attn.proj.{w}", _VISION + "encoder.layers.{n}.self_attn.projection_layer.{w}", Piece.WHOLE),
    (_TOWER + "blocks.{n}.mlp.fc{i}.{w}", _VISION + "encoder.layers.{n}.mlp.fc{i}.{w}", Piece.WHOLE),
    (_TOWER + "norm.{w}", _VISION + "post_layernorm.{w}", Piece.WHOLE),
    ("aligner.layers.0.{w}", "model.aligner.fc1.{w}", Piece.WHOLE),
    ("aligner.layers.2.{w}", "model.aligner.hidden_layers.0.{w}", Piece.WHOLE),
    ("gen_embed.weight", "model.generation_embeddings.weight", Piece.WHOLE),
    ("gen_aligner.layers.0.{w}", "model.generation_aligner.fc1.{w}", Piece.WHOLE),
    ("gen_aligner.layers.2.{w}", "model.generation_aligner.hidden_layers.0.{w}", Piece.WHOLE),
    ("gen_head.output_mlp_projector.{w}", "model.generation_head.proj_out.{w}", Piece.WHOLE),
    ("gen_head.vision_head.{w}", "model.generation_head.vision_head.{w}", Piece.WHOLE),
    ("language_model.lm_head.weight", "lm_head.weight", Piece.WHOLE),
    ("language_model.model.{rest}", "model.language_model.{rest}", Piece.WHOLE),
]
for _side, _list, _resample in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
    _from, _to = f"gen_vision_model.{_side}.", f"model.vqmodel.{_side}."
    _RULES += [
        (_from + "conv_blocks.{n}.res.{rest}", _to + f"{_list}.{{n}}.block.{{rest}}", Piece.WHOLE),
        (_from + "conv_blocks.{n}.attn.{rest}", _to + f"{_list}.{{n}}.attn.{{rest}}", Piece.WHOLE),
        (_from + f"conv_blocks.{{n}}.{_resample}.{{rest}}", _to + f"{_list}.{{n}}.{_resample}.{{rest}}", Piece.WHOLE),
        (_from + "mid.0.{rest}", _to + "mid.block_1.{rest}", Piece.WHOLE),
        (_from + "mid.1.{rest}", _to + "mid.attn_1.{rest}", Piece.WHOLE),
        (_from + "mid.2.{rest}", _to + "mid.block_2.{rest}", Piece.WHOLE),
        *(
            (_from + f"{name}.{{w}}", _to + f"{name}.{{w}}", Piece.WHOLE)
            for name in ("conv_in", "norm_out", "conv_out")
        ),
    ]
_RULES += [
    (f"gen_vision_model.{name}.{{w}}", f"model.vqmodel.{name}.{{w}}", Piece.WHOLE)
    for name in ("quant_conv", "post_quant_conv", "quantize.embedding")
]

_DROPPED = re.compile(
    r"vision_model\.vision_tower\.attn_pool\..*"  # SigLIP's pooling head: stored, never used
    r"|gen_vision_model\.quantize\.codebook_used"  # a usage statistic of the VQ training
    r"|language_model\.model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"  # a buffer of old transformers versions
)

_PLACEHOLDERS = {"{n}": r"(?P<n>\d+)", "{i}": r"(?P<i>\d+)", "{w}": r"(?P<w>weight|bias)", "{rest}": r"(?P<rest>.+)"}


def _pattern(template: str) -> re.Pattern[str]:
    pieces = re.split(r"(\{\w+\})", template)
    return re.compile("".join(_PLACEHOLDERS.get(piece) or re.escape(piece) for piece in pieces))


@dataclass(frozen=True, slots=True)
class _Rule:
    released: str
    canonical: str
    piece: Piece
    released_pattern: re.Pattern[str]
    canonical_pattern: re.Pattern[str]


RULES = [
    _Rule(released, canonical, piece, _pattern(released), _pattern(canonical)) for released, canonical, piece in _RULES
]


def from_released(key: str) -> list[tuple[str, Piece]]:
    """Canonical names made from a released tensor: three for a fused qkv, none for a tensor that is dropped, else one.

    Raises:
        KeyError: if the layout has no such tensor.
    """
    if _DROPPED.fullmatch(key):
        return []
    pieces = [
        (rule.canonical.format(**match.groupdict()), rule.piece)
        for rule in RULES
        if (match := rule.released_pattern.fullmatch(key))
    ]
    if not pieces:
        raise KeyError(key)
    return pieces


def to_released(name: str) -> tuple[str, Piece]:
    """The released tensor, and the piece of it, that a canonical tensor is.

    Raises:
        KeyError: if the canonical layout has no such tensor.
    """
    for rule in RULES:
        if match := rule.canonical_pattern.fullmatch(name):
            return rule.released.format(**match.groupdict()), rule.piece
    raise KeyError(name)


def is_released(keys: list[str]) -> bool:
    """Whether tensor names are those of a released Janus checkpoint."""
    return any(key.startswith(("language_model.model.", _TOWER, "gen_vision_model.")) for key in keys)


def is_canonical(keys: list[str]) -> bool:
    """Whether tensor names are those of transformers' whole Janus model."""
    return any(key.startswith("model.language_model.") for key in keys)


def language_part(key: str) -> str | None:
    """Canonical name of a tensor of a Hugging Face Llama; None for one that is not needed."""
    if key.endswith("rotary_emb.inv_freq"):
        return None
    if key.startswith("lm_head."):
        return key
    return "model.language_model." + key.removeprefix("model.")


def vision_part(key: str) -> str | None:
    """Canonical name of a tensor of a Hugging Face SigLIP or of transformers' Janus vision tower; None for one that
    is not needed."""
    if key.startswith(("text_model.", "logit_", "head.", "vision_model.head.")) or key.endswith("position_ids"):
        return None
    return _VISION + key.removeprefix("vision_model.").replace(".self_attn.out_proj.", ".self_attn.projection_layer.")


def vq_part(key: str) -> str | None:
    """Canonical name of a tensor of a LlamaGen VQ-16 file or of transformers' JanusVQVAE; None for one that is not
    needed."""
    key = key.removeprefix("vqmodel.")
    if key.startswith(("encoder.conv_blocks.", "decoder.conv_blocks.")) or re.match(
        r"(en|de)coder\.mid\.\d|quantize\.codebook_used", key
    ):
        pieces = from_released("gen_vision_model." + key)
        return pieces[0][0] if pieces else None
    return "model.vqmodel." + key
