"""Janus-Pro, composed of transformers' Janus modules and run on packed rows.

State-dict names are exactly those of ``transformers.JanusForConditionalGeneration`` (prefix: none), without
``model.vqmodel.*``: the VQ tokenizer is a plain module outside (``vq.py``), because it is never trained.

Two rules of DeepSpeed ZeRO-3 shape the forward pass (docs/zero3.md, rules 1 and 2): every module is called exactly once
per micro-batch, in the same order, on every rank; and every trainable parameter takes part in every micro-batch. So a
missing image of a kind is replaced by one constant dummy whose features enter the input embeddings times zero (there,
not in the loss: with a frozen LLM a text-only rank would otherwise have no backward pass through it), and each head is
always called on at least one position.

Shapes: T tokens of a micro-batch, d hidden width, U/G understanding/generation images, S slots per image, V text
vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import JanusConfig, JanusVQVAEConfig, LlamaConfig
from transformers.models.janus.modeling_janus import (
    JanusVisionAlignerMLP,
    JanusVisionModel,
    JanusVQVAEAlignerMLP,
    JanusVQVAEHead,
)
from transformers.models.llama.modeling_llama import LlamaModel, LlamaRMSNorm

from jp_train.config.choices import Reduction
from jp_train.config.schema import LossConfig, ModelConfig
from jp_train.model.attention import PACKED_ATTENTION
from jp_train.model.configuration import build_config, parts_of, rope_theta
from jp_train.model.loss import (
    N_KINDS,
    CrossEntropyLinear,
    SupervisedPositions,
    document_of_token,
    document_weights,
    grouped_sums,
)
from jp_train.types import IGNORE_INDEX, LossTerms, PackedBatch, positions


class Float32Rotary(nn.Module):
    """Rotary position embedding whose frequencies are float32 however the model was built or cast.

    ``deepspeed.zero.Init`` rounds every tensor made under it to the model's dtype, and bf16 frequencies are wrong by
    radians at position 4000. So nothing is stored: frequencies are computed in the forward pass (d/2 numbers).
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.theta = rope_theta(config)

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin ``[B, T, head_dim]`` in x's dtype, of ``position_ids`` int64 ``[B, T]``."""
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=x.device) / self.head_dim
        angles = position_ids[..., None].float() * (1.0 / self.theta**exponent)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class GenerationHead(JanusVQVAEHead):
    """transformers' image head with a last layer that can return losses instead of logits; the names stay."""

    def __init__(self, config: JanusVQVAEConfig) -> None:
        super().__init__(config)
        self.vision_head = CrossEntropyLinear(config.projection_dim, config.num_embeddings)

    def forward(
        self,
        hidden: torch.Tensor,
        labels: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        chunk_tokens: int = 1024,
    ) -> Any:
        """As ``CrossEntropyLinear.forward``."""
        return self.vision_head(self.activation_fn(self.proj_out(hidden)), labels, weights, chunk_tokens)


def _use_torch_norms(tower: LlamaModel) -> None:
    """Put torch's RMSNorm in place of each of transformers': one kernel on CUDA, which keeps its input in the run's
    dtype where the other keeps it in fp32 and its value besides. fp32 gives the same bits, bf16 is rounded once
    less."""
    norms = [
        (parent, name, norm)
        for parent in tower.modules()
        for name, norm in parent.named_children()
        if isinstance(norm, LlamaRMSNorm)
    ]
    for parent, name, norm in norms:
        parent.register_module(name, nn.RMSNorm(tower.config.hidden_size, eps=norm.variance_epsilon))


class JanusBody(nn.Module):
    """The modules that transformers keeps under ``model.``; it has no forward itself."""

    def __init__(self, config: JanusConfig) -> None:
        super().__init__()
        vision, vq, text = parts_of(config)
        self.vision_model = JanusVisionModel(vision)
        self.aligner = JanusVisionAlignerMLP(vision)
        self.generation_embeddings = nn.Embedding(vq.num_embeddings, vq.embed_dim)
        self.generation_aligner = JanusVQVAEAlignerMLP(vq)
        self.generation_head = GenerationHead(vq)
        self.language_model = LlamaModel(text)
        self.language_model.register_module("rotary_emb", Float32Rotary(text))
        _use_torch_norms(self.language_model)


class JanusPro(nn.Module):
    """The trained module: packed micro-batch in, summed losses out.

    Weights are undefined after construction (transformers' initialisation is void under ``deepspeed.zero.Init``): set
    every one with ``pretrained.init_fresh`` or ``pretrained.load_weights``.

    Args:
        n_sources: number of sources of the recipe, the length of ``LossTerms.source_sums``.
        recompute_every: recompute every k-th layer of each tower in the backward pass (in training mode); 0: none.
        image_token_id: id of ``<image_placeholder>``, kept in the exported configuration.
    """

    def __init__(
        self, cfg: ModelConfig, loss: LossConfig, n_sources: int, recompute_every: int, image_token_id: int
    ) -> None:
        super().__init__()
        config = build_config(cfg, image_token_id)
        self.parts = parts_of(config)
        self.parts.vision._attn_implementation = "sdpa"
        self.parts.text._attn_implementation = PACKED_ATTENTION
        self.janus_config = config
        self.loss_config = loss
        self.n_sources = n_sources
        self.side = cfg.vision.image_size
        self.slots = self.parts.vision.num_image_tokens
        self.model = JanusBody(config)
        self.lm_head = CrossEntropyLinear(self.parts.text.hidden_size, self.parts.text.vocab_size, bias=False)
        if recompute_every:
            for part in (self.model.vision_model, self.model.language_model):
                part.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=recompute_every)

    def forward(self, batch: PackedBatch) -> LossTerms:
        """Summed losses of one micro-batch; an empty batch (no token at all) gives zeros, with gradients.

        Raises:
            ValueError: if VQ ids are still pending (``vq.fill_pending`` comes first), or slots and images do not
            match.
        """
        batch = _never_empty(batch)
        hidden = self.hidden_states(batch)
        owner = document_of_token(batch)
        chunk = self.loss_config.chunk_tokens
        text = SupervisedPositions(positions(batch.text_positions, batch.labels), batch.labels, owner)
        image = SupervisedPositions(positions(batch.image_positions, batch.gen_labels), batch.gen_labels, owner)
        by_document = self.loss_config.reduction is Reduction.sample_mean
        weights: tuple[torch.Tensor | None, ...] = (None, None)
        if by_document:
            heads_weights = ((text, self.loss_config.text_weight), (image, self.loss_config.image_weight))
            weights = document_weights(heads_weights, len(batch.document_lengths))
        text_sum, text_losses = self.lm_head(hidden[text.positions], text.labels, weights[0], chunk)
        image_sum, image_losses = self.model.generation_head(hidden[image.positions], image.labels, weights[1], chunk)

        heads = ((text_losses, text), (image_losses, image))
        kinds = [grouped_sums(x, supervised, batch.document_kinds, N_KINDS) for x, supervised in heads]
        sources = [grouped_sums(x, supervised, batch.document_sources, self.n_sources) for x, supervised in heads]
        return LossTerms(
            text_sum=text_losses.sum() if by_document else text_sum,
            image_sum=image_losses.sum() if by_document else image_sum,
            text_tokens=text.count,
            image_tokens=image.count,
            kind_sums=kinds[0][0] + kinds[1][0],
            kind_tokens=kinds[0][1] + kinds[1][1],
            source_sums=sources[0][0] + sources[1][0],
            source_tokens=sources[0][1] + sources[1][1],
            document_mean_sum=text_sum + image_sum if by_document else None,
        )

    def hidden_states(self, batch: PackedBatch) -> torch.Tensor:
        """The language model's output ``[T, d]``, after its final norm."""
        if self.parts.text._attn_implementation != PACKED_ATTENTION:
            raise ValueError("packed rows inside `plain_attention()`: documents would see each other")
        embeddings = self.input_embeddings(batch)
        out = self.model.language_model(
            inputs_embeds=embeddings.unsqueeze(0),
            position_ids=batch.position_ids.unsqueeze(0),
            use_cache=False,
            cu_seqlens=batch.cu_seqlens,
            max_seqlen=batch.max_seqlen,
        )
        return out.last_hidden_state.squeeze(0)

    def input_embeddings(self, batch: PackedBatch) -> torch.Tensor:
        """Token embeddings ``[T, d]`` with images in their slots; an absent kind of image adds its dummy times zero."""
        _check_slots(batch, self.slots)
        embeddings = self.model.language_model.embed_tokens(batch.input_ids)

        present = len(batch.und_images) > 0
        images = batch.und_images if present else batch.und_images.new_zeros(1, 3, self.side, self.side)
        features = self.image_features(images).flatten(0, 1)
        embeddings = _place(embeddings, batch.und_slots if present else None, features)

        present = len(batch.gen_ids) > 0
        ids = batch.gen_ids.flatten() if present else batch.gen_ids.new_zeros(1)
        return _place(embeddings, batch.gen_slots if present else None, self.code_embeddings(ids))

    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        """Understanding path: uint8 ``[U, 3, H, W]`` to ``[U, S, d]``: last SigLIP block, final LayerNorm, aligner."""
        pixels = (images.float() / 255 - 0.5) / 0.5
        return self.model.aligner(self.model.vision_model(pixels).last_hidden_state)

    def code_embeddings(self, ids: torch.Tensor) -> torch.Tensor:
        """Generation path: VQ ids int64 ``[...]`` to ``[..., d]``: gen_embed, gen_aligner."""
        return self.model.generation_aligner(self.model.generation_embeddings(ids))

    @contextmanager
    def plain_attention(self) -> Iterator[None]:
        """Within it the language model takes ordinary batches with a padding mask and a KV cache; packed rows are
        refused."""
        config = self.parts.text
        config._attn_implementation = "sdpa"
        try:
            yield
        finally:
            config._attn_implementation = PACKED_ATTENTION


def _place(embeddings: torch.Tensor, slots: torch.Tensor | None, features: torch.Tensor) -> torch.Tensor:
    """``embeddings`` with rows ``slots`` replaced by ``features``; without slots, plus the features' sum times zero."""
    if slots is None:
        return embeddings + 0.0 * features.sum().to(embeddings.dtype)
    return embeddings.index_copy(0, slots, features.to(embeddings.dtype))


def _check_slots(batch: PackedBatch, slots: int) -> None:
    """Shapes only: reads no device value."""
    if len(batch.gen_pending):
        raise ValueError(
            f"{len(batch.gen_pending)} generation images have no VQ ids yet: call vq.fill_pending(batch, vq) before "
            "the model"
        )
    for name, images in (("und", len(batch.und_images)), ("gen", len(batch.gen_ids))):
        positions = len(getattr(batch, f"{name}_slots"))
        if positions != images * slots:
            raise ValueError(
                f"{name}_slots has {positions} positions for {images} images of {slots} slots: the data was encoded "
                "for another image size or patch size than model.vision says"
            )


def _never_empty(batch: PackedBatch) -> PackedBatch:
    """A micro-batch without a token (an idle rank in validation) becomes one unsupervised token, so that every
    module still runs."""
    if len(batch.input_ids):
        return batch
    zero = batch.input_ids.new_zeros(1)
    ignored = torch.full_like(zero, IGNORE_INDEX)
    return replace(
        batch,
        input_ids=zero,
        position_ids=zero,
        labels=ignored,
        gen_labels=ignored,
        text_positions=zero[:0],
        image_positions=zero[:0],
        cu_seqlens=torch.tensor([0, 1], dtype=torch.int32, device=zero.device),
        max_seqlen=1,
        document_lengths=torch.ones_like(zero),
        document_kinds=zero,
        document_sources=zero,
    )
