"""The arithmetic of a step without a profiler.

A multiply-add counts 2.  FLOPs follow the PaLM paper's model-FLOPs utilisation (appendix B): matrix multiplications and
the two attention products only, attention over the full square of each document (not halved for causality), nothing for
recomputation.  They differ from "6 N" where a stage freezes modules: a frozen weight has no weight gradient, and
gradients are only propagated as far down as something learns (in stage 1 they still run through the frozen language
model).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from jp_train.config.schema import ModelConfig
from jp_train.model.parameters import vq_layers
from jp_train.types import PackedBatch


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
    """Images encoded by the VQ tokenizer on the fly."""

    def __add__(self, other: BatchStatistics) -> BatchStatistics:
        return BatchStatistics(**{name: getattr(self, name) + getattr(other, name) for name in self.__slots__})

    @classmethod
    def of(cls, batch: PackedBatch) -> BatchStatistics:
        """Statistics of one micro-batch; reads tensor values, so call it on the CPU copy."""
        lengths = batch.cu_seqlens.long().diff()
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

    Dummy passes for absent images are not counted: they are overhead, not work.
    """
    learns = set(trainable)
    s, width = statistics, cfg.language.hidden_size
    slots = (cfg.vision.image_size // cfg.vision.patch_size) ** 2
    sees = "vision_model" in learns
    llm = "language_model" in learns
    through_llm = llm or bool(learns & {"vision_model", "aligner", "gen_aligner", "gen_embed"})

    patches = s.und_images * slots * 2.0 * 3 * cfg.vision.patch_size**2 * cfg.vision.hidden_size
    blocks = s.und_images * cfg.vision.layers * _vision_block(cfg, slots)
    aligner = _Chain(
        s.und_images * slots, (cfg.vision.hidden_size, width, width), learns="aligner" in learns, below=sees
    )
    gen_aligner = _Chain(
        s.gen_images * slots,
        (cfg.vq.embed_dim, width, width),
        learns="gen_aligner" in learns,
        below="gen_embed" in learns,
    )
    layer = 2.0 * (4 * width * width + 3 * width * cfg.language.intermediate_size)
    weights = cfg.language.layers * s.tokens * layer
    attention = cfg.language.layers * 4.0 * width * s.squared_lengths
    text_head = _Chain(s.text_positions, (width, cfg.language.vocab_size), learns=llm, below=through_llm)
    image_head = _Chain(
        s.image_positions, (width, width, cfg.vq.codebook_size), learns="gen_head" in learns, below=through_llm
    )
    chains = (aligner, gen_aligner, text_head, image_head)

    # A weight product costs its forward again per gradient: one towards its input, if anything below learns, one for
    # the weight, if it learns. Attention has no weight: two gradients or none. Pixels need no gradient.
    forward = patches + blocks + weights + attention + sum(chain.forward for chain in chains)
    backward = (patches + 2 * blocks) * sees + weights * (through_llm + llm) + 2 * attention * through_llm
    backward += sum(chain.backward for chain in chains)
    encoding = s.encoded_images * vq_flops(cfg)[0] if s.encoded_images else 0.0
    return StepFlops(forward=forward, backward=backward, vq_encode=encoding)


class _Chain:
    """FLOPs of a few linear layers in a row, ``sizes`` wide, on ``positions`` vectors."""

    def __init__(self, positions: int, sizes: tuple[int, ...], *, learns: bool, below: bool) -> None:
        layers = [2.0 * positions * a * b for a, b in pairwise(sizes)]
        self.forward = sum(layers)
        towards_input = sum(layers[1:]) * (learns or below) + layers[0] * below
        self.backward = towards_input + self.forward * learns


def _vision_block(cfg: ModelConfig, slots: int) -> float:
    """Forward FLOPs of one SigLIP block for one image (24 blocks and the patches of SigLIP-L at 384 px: 0.381e12)."""
    width = cfg.vision.hidden_size
    return (
        slots * 2.0 * (4 * width * width + 2 * width * int(width * cfg.vision.mlp_ratio)) + 4.0 * width * slots * slots
    )


def vq_flops(cfg: ModelConfig) -> tuple[float, float]:
    """FLOPs to VQ-encode and to decode one image: convolutions, the two attention products, and the comparison of
    each position with every code."""
    flops = {True: 0.0, False: 0.0}
    for name, shape, side in vq_layers(cfg):
        encodes = not name.startswith(("decoder.", "post_quant_conv"))
        if len(shape) > 1:
            flops[encodes] += 2.0 * side**2 * math.prod(shape)
        if name.endswith(".q"):
            flops[encodes] += 4.0 * side**4 * shape[0]
    return flops[True], flops[False]
