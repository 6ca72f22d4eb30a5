"""Sizes of the smoke run: one place for the small model's shape and for how its parts are pretrained.

The numbers were chosen by experiment on two CPU cores (about 90 GFLOP/s each); ``SmokeSizes()`` is the
demonstration run, ``SmokeSizes.minute()`` a few steps of everything, for tests of the plumbing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from transformers import LlamaConfig
from transformers.models.janus.configuration_janus import JanusConfig, JanusVisionConfig, JanusVQVAEConfig

from examples.smoke.pretrain_llm import TextTraining
from examples.smoke.pretrain_vision import VisionTraining
from examples.smoke.pretrain_vq import VQTraining
from examples.smoke.shards import ShardSizes
from jp_train.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """Shape of the tiny Janus-Pro: the 1B's modules, with these numbers."""

    image_size: int = 32
    """Image side in pixels, for understanding and generation alike."""
    patch_size: int = 8
    """Side of a vision patch; the VQ stride must be the same, so that both image kinds take the same slots."""
    vision_hidden: int = 128
    vision_layers: int = 3
    vision_heads: int = 4
    vq_codes: int = 512
    vq_embed_dim: int = 8
    vq_latent_channels: int = 64
    vq_base_channels: int = 32
    vq_channel_multiplier: tuple[int, ...] = (1, 1, 2, 4)
    vq_res_blocks: int = 1
    llm_hidden: int = 192
    llm_intermediate: int = 512
    llm_layers: int = 4
    llm_heads: int = 4
    llm_init_std: float = 0.05
    """Initial std of the language model's weights; transformers' 0.02 suits widths in the thousands."""
    max_positions: int = 1024

    def __post_init__(self) -> None:
        stride = 2 ** (len(self.vq_channel_multiplier) - 1)
        if stride != self.patch_size or self.image_size % stride:
            raise ConfigError(
                f"image_size={self.image_size}, patch_size={self.patch_size}, VQ stride {stride}: "
                "patch and stride must be equal and divide the image size"
            )

    @property
    def image_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2


def janus_config(model: ModelSizes, *, vocab_size: int, special_ids: dict[str, int]) -> JanusConfig:
    """The transformers config of the tiny model; embeddings and head are not tied, as in Janus-Pro.

    ``special_ids`` needs ``bos``, ``eos``, ``pad`` and ``image``.
    """
    text = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=model.llm_hidden,
        intermediate_size=model.llm_intermediate,
        num_hidden_layers=model.llm_layers,
        num_attention_heads=model.llm_heads,
        num_key_value_heads=model.llm_heads,
        max_position_embeddings=model.max_positions,
        rms_norm_eps=1e-6,
        initializer_range=model.llm_init_std,
        tie_word_embeddings=False,
        bos_token_id=special_ids["bos"],
        eos_token_id=special_ids["eos"],
        pad_token_id=special_ids["pad"],
    )
    vision = JanusVisionConfig(
        hidden_size=model.vision_hidden,
        num_hidden_layers=model.vision_layers,
        num_attention_heads=model.vision_heads,
        image_size=model.image_size,
        patch_size=model.patch_size,
        num_image_tokens=model.image_tokens,
        projection_dim=model.llm_hidden,
    )
    vq = JanusVQVAEConfig(
        embed_dim=model.vq_embed_dim,
        num_embeddings=model.vq_codes,
        latent_channels=model.vq_latent_channels,
        base_channels=model.vq_base_channels,
        channel_multiplier=list(model.vq_channel_multiplier),
        num_res_blocks=model.vq_res_blocks,
        num_patches=model.image_size // model.patch_size,
        projection_dim=model.llm_hidden,
        image_token_embed_dim=model.llm_hidden,
    )
    return JanusConfig(
        text_config=text,
        vision_config=vision,
        vq_config=vq,
        image_token_id=special_ids["image"],
        tie_word_embeddings=False,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SmokeSizes:
    """Everything that decides how long the smoke run's preparation takes."""

    model: ModelSizes = field(default_factory=ModelSizes)
    shards: ShardSizes = field(default_factory=ShardSizes)
    vq: VQTraining = field(
        default_factory=lambda: VQTraining(steps=580, batch_images=16, learning_rate=1.5e-3, continuous_steps=150)
    )
    vision: VisionTraining = field(
        default_factory=lambda: VisionTraining(steps=300, batch_pairs=112, learning_rate=1e-3)
    )
    text: TextTraining = field(
        default_factory=lambda: TextTraining(steps=80, batch_rows=8, row_tokens=256, learning_rate=2e-3)
    )

    @classmethod
    def minute(cls) -> SmokeSizes:
        """A few steps of everything: the same path in well under a minute, learning nothing worth showing."""
        full = cls()
        return cls(
            shards=ShardSizes(
                digits_gen=60, scenes_gen=60, digits_und=60, scenes_und=60, val_each=12, samples_per_shard=40
            ),
            vq=replace(full.vq, steps=6, continuous_steps=3, freeze_codebook_last=1, batch_images=8),
            vision=replace(full.vision, steps=3, batch_pairs=16),
            text=replace(full.text, steps=3, batch_rows=2, row_tokens=64),
        )
