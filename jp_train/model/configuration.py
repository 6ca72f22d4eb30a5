"""jp_train's model configuration as transformers' configuration (the way back: stored_config.py)."""

from __future__ import annotations

from typing import NamedTuple

from transformers import JanusConfig, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

from jp_train.config.schema import ModelConfig
from jp_train.config.validate import check_sizes
from jp_train.errors import CheckpointError


class Parts(NamedTuple):
    """The configurations of a model's three parts."""

    vision: JanusVisionConfig
    vq: JanusVQVAEConfig
    text: LlamaConfig


def parts_of(config: JanusConfig) -> Parts:
    """Its parts, which transformers declares as a dictionary or any configuration.

    Raises:
        CheckpointError: if one is of another kind.
    """
    vision, vq, text = config.vision_config, config.vq_config, config.text_config
    if isinstance(vision, JanusVisionConfig) and isinstance(vq, JanusVQVAEConfig) and isinstance(text, LlamaConfig):
        return Parts(vision, vq, text)
    kinds = ", ".join(type(part).__name__ for part in (vision, vq, text))
    raise CheckpointError(f"the model has parts {kinds}; expected Janus' vision tower and tokenizer, and a Llama")


def rope_theta(text: LlamaConfig) -> float:
    """The base of the rotary position embedding."""
    theta = (text.rope_parameters or {}).get("rope_theta")
    if not isinstance(theta, (int, float)):
        raise CheckpointError(f"rope_parameters {text.rope_parameters} name no rope_theta")
    return float(theta)


def build_config(
    model: ModelConfig, image_token_id: int, *, bos_token_id: int | None = None, eos_token_id: int | None = None
) -> JanusConfig:
    """transformers' configuration of a jp_train model.

    ``tie_word_embeddings`` is False at both levels (JanusConfig defaults to True and would really tie the text head),
    the language model has no padding row (Janus trains the pad token's embedding), and GELU is the exact erf form.

    Raises:
        ConfigError: if sizes do not fit each other.
    """
    check_sizes(model)
    vision, language = model.vision, model.language
    vision_config = JanusVisionConfig(
        hidden_size=vision.hidden_size,
        num_hidden_layers=vision.layers,
        num_attention_heads=vision.heads,
        mlp_ratio=vision.mlp_ratio,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        projection_dim=language.hidden_size,
        num_image_tokens=(vision.image_size // vision.patch_size) ** 2,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )
    text_config = LlamaConfig(
        hidden_size=language.hidden_size,
        intermediate_size=language.intermediate_size,
        num_hidden_layers=language.layers,
        num_attention_heads=language.heads,
        num_key_value_heads=language.heads,
        vocab_size=language.vocab_size,
        rms_norm_eps=language.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": language.rope_theta},
        max_position_embeddings=language.max_position_embeddings,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
    )
    return JanusConfig(
        text_config=text_config,
        vision_config=vision_config,
        vq_config=build_vq_config(model),
        image_token_id=image_token_id,
        tie_word_embeddings=False,
    )


def build_vq_config(model: ModelConfig) -> JanusVQVAEConfig:
    """transformers' configuration of the VQ tokenizer and of the generation aligner and head that share it."""
    vq, width = model.vq, model.language.hidden_size
    return JanusVQVAEConfig(
        embed_dim=vq.embed_dim,
        num_embeddings=vq.codebook_size,
        latent_channels=vq.latent_channels,
        base_channels=vq.base_channels,
        channel_multiplier=list(vq.channel_multiplier),
        num_res_blocks=vq.res_blocks,
        num_patches=model.vision.image_size // model.vision.patch_size,
        projection_dim=width,
        image_token_embed_dim=width,
        hidden_act="gelu",
    )
