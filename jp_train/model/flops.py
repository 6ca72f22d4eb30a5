"""Parameter counts without memory, and the arithmetic of a step without a profiler.

A multiply-add counts 2.  FLOPs follow the PaLM paper's model-FLOPs utilisation (appendix B): matrix multiplications and the two
attention products only, attention over the full square of each document (not halved for causality), nothing for
recomputation.  They differ from "6 N" where a stage freezes modules: a frozen weight has no weight gradient, and gradients are only
propagated as far down as something learns (in stage 1 they still run through the frozen language model).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from jp_train.config.schema import LossConfig, ModelConfig
from jp_train.model.freeze import VQ_MODULE, module_of
from jp_train.model.janus_pro import JanusPro
from jp_train.model.vq import VQTokenizer
from jp_train.types import PackedBatch


def parameter_counts(cfg: ModelConfig) -> dict[str, int]:
    """Elements of each module, ``schema.MODULES`` plus ``gen_vision_model``, counted on the meta device (no memory, 0.1 s)."""
    with torch.device("meta"):
        model = JanusPro(cfg, LossConfig(), 1, False, 0)
        vq = VQTokenizer(cfg.vq, cfg.vision.image_size)
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        module = module_of(name)
        counts[module] = counts.get(module, 0) + parameter.numel()
    counts[VQ_MODULE] = sum(p.numel() for p in vq.parameters())
    return counts


def trainable_count(cfg: ModelConfig, trainable: Iterable[str]) -> int:
    """Elements that learn when ``trainable`` modules do."""
    counts = parameter_counts(cfg)
    return sum(counts[name] for name in trainable)


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchStatistics:
    """What a step's arithmetic depends on.  Sums over the micro-batches (and ranks) of the step."""

    tokens: int
    squared_lengths: int
    """Sum over attention segments of their length squared, in tokens^2."""
    und_images: int
    gen_images: int
    text_positions: int
    """Positions where the text head is supervised."""
    image_positions: int
    encoded_images: int = 0
    """Pictures encoded by the VQ tokenizer on the fly."""

    def __add__(self, other: BatchStatistics) -> BatchStatistics:
        return BatchStatistics(**{name: getattr(self, name) + getattr(other, name) for name in self.__slots__})

    @classmethod
    def of(cls, batch: PackedBatch) -> BatchStatistics:
        """Statistics of one micro-batch; reads tensor values, so call it on the CPU copy."""
        lengths = batch.cu_seqlens.to(torch.int64).diff()
        return cls(
            tokens=len(batch.input_ids),
            squared_lengths=int(lengths.square().sum()),
            und_images=len(batch.und_images),
            gen_images=len(batch.gen_ids),
            text_positions=batch.supervised_text_tokens,
            image_positions=batch.supervised_image_tokens,
            encoded_images=len(batch.gen_pending),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFlops:
    """FLOPs of a step.  ``total`` is what MFU divides by time x devices x peak."""

    forward: float
    backward: float
    vq_encode: float
    """On-the-fly VQ encoding: data preparation, not in ``total``."""

    @property
    def total(self) -> float:
        return self.forward + self.backward


def step_flops(cfg: ModelConfig, statistics: BatchStatistics, trainable: Iterable[str]) -> StepFlops:
    """Model FLOPs of a step with the given statistics when the ``trainable`` modules learn.

    Dummy passes for absent pictures are not counted: they are overhead, not work.
    """
    learns = set(trainable)
    s, width = statistics, cfg.language.hidden_size
    slots = (cfg.vision.image_size // cfg.vision.patch_size) ** 2

    vision = s.und_images * _vision_forward(cfg, slots)
    aligner = s.und_images * slots * 2.0 * (cfg.vision.hidden_size * width + width * width)
    gen_aligner = s.gen_images * slots * 2.0 * (cfg.vq.embed_dim * width + width * width)
    layer = 2.0 * (4 * width * width + 3 * width * cfg.language.intermediate_size)
    llm_weights = cfg.language.layers * s.tokens * layer
    llm_attention = cfg.language.layers * 4.0 * width * s.squared_lengths
    text_head = s.text_positions * 2.0 * width * cfg.language.vocab_size
    image_head = s.image_positions * 2.0 * (width * width + width * cfg.vq.codebook_size)
    forward = vision + aligner + gen_aligner + llm_weights + llm_attention + text_head + image_head

    # Each weight product costs its forward again per gradient: once towards its input (if anything below it learns), once for
    # the weight (if it learns). Attention has no weight: two gradients or none.
    below_llm = bool(learns & {"vision_model", "aligner", "gen_aligner", "gen_embed"})
    llm = "language_model" in learns
    through_llm = below_llm or llm
    backward = 2 * vision if "vision_model" in learns else 0.0
    backward += aligner * (("aligner" in learns) + ("vision_model" in learns))
    backward += gen_aligner * (("gen_aligner" in learns) + ("gen_embed" in learns))
    backward += llm_weights * (through_llm + llm) + llm_attention * 2 * through_llm
    backward += text_head * (through_llm + llm)
    backward += image_head * (through_llm + ("gen_head" in learns))
    return StepFlops(forward=forward, backward=backward, vq_encode=s.encoded_images * vq_flops(cfg)[0] if s.encoded_images else 0.0)


def _vision_forward(cfg: ModelConfig, slots: int) -> float:
    """Forward FLOPs of the SigLIP tower for one picture (0.381e12 for SigLIP-L at 384 px)."""
    width = cfg.vision.hidden_size
    patches = slots * 2.0 * 3 * cfg.vision.patch_size**2 * width
    hidden = int(width * cfg.vision.mlp_ratio)
    block = slots * 2.0 * (4 * width * width + 2 * width * hidden) + 4.0 * width * slots * slots
    return patches + cfg.vision.layers * block


def vq_flops(cfg: ModelConfig) -> tuple[float, float]:
    """FLOPs to VQ-encode and to decode one picture, counted by torch on the meta device."""
    with torch.device("meta"):
        vq = VQTokenizer(cfg.vq, cfg.vision.image_size).vqmodel
        side, grid = cfg.vision.image_size, cfg.vision.image_size // 2 ** (len(cfg.vq.channel_multiplier) - 1)
        with torch.no_grad(), FlopCounterMode(display=False) as encode:
            vq.quant_conv(vq.encoder(torch.empty(1, 3, side, side)))
        with torch.no_grad(), FlopCounterMode(display=False) as decode:
            vq.decoder(vq.post_quant_conv(torch.empty(1, cfg.vq.embed_dim, grid, grid)))
    codes = 2.0 * grid * grid * cfg.vq.embed_dim * cfg.vq.codebook_size
    return encode.get_total_flops() + codes, float(decode.get_total_flops())
