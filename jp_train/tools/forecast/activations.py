"""Bytes of activations: what a block keeps for its backward pass, and what it takes beyond that while it runs.

Counted from the operations of transformers' Llama and SigLIP blocks in the order in which they run, with DeepSpeed's
linear layer (it keeps its input whether or not its weight learns). b is the size of the compute dtype: 2 for bf16, 4
for fp32. T tokens, N image tokens, d width, f hidden width of an MLP, H heads. Checked against torch's own accounting
of the true 1B and 7B shapes (tests/tools/forecast/test_activations.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from jp_train.tools.forecast.shapes import MicroBatch, Shapes
from jp_train.types import LOGITS_BLOCK, PRODUCT_CLASSES


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Bytes of one block. `saved`: kept from its forward to its backward pass; `entry`: all that checkpointing keeps
    instead; `forward` and `backward`: taken while it runs, besides what is saved (at its largest). Backward, the MLP
    comes first; its share of `saved`, `mlp`, is free when the attention in front of it takes `attention`."""

    saved: int
    entry: int
    forward: int
    backward: int
    mlp: int
    attention: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Numerics:
    """`size`: bytes of the compute dtype; `fused`: CUDA's kernels, for attention over all documents (otherwise one call
    a document and a copy that joins them) and for RMSNorm; `chunk`: positions whose logits exist at one time."""

    size: int
    fused: bool
    chunk: int


def language_block(shapes: Shapes, batch: MicroBatch, numerics: Numerics) -> Block:
    """One decoder layer: 16 Td + 8 Tf bytes in bf16 on CUDA."""
    b, tokens, width, hidden = numerics.size, batch.tokens, shapes.width, shapes.intermediate
    learns = "language_model" in shapes.learns
    # its output is the input of the linear layers behind
    norm = _norm(learns, numerics) * tokens * width + b * tokens * width
    # queries and keys after rotation, values, the output; without the fused kernel the documents' outputs before they
    # are joined; log-sum-exp in fp32
    attention = (4 + (not numerics.fused)) * b * tokens * width + 4 * tokens * shapes.heads
    # gate, silu(gate), up, and their product
    mlp = 4 * b * tokens * hidden
    saved = 2 * norm + attention + mlp
    return Block(
        saved=saved,
        entry=b * tokens * width,
        # residual, norm, three of the four hidden values at a time; attention before it takes less
        forward=3 * b * tokens * hidden + 3 * b * tokens * width,
        # behind the product: gradients of silu(gate), up and the product, while the product itself is already free; and
        # of the block's output
        backward=2 * b * tokens * hidden + 2 * b * tokens * width,
        mlp=mlp,
        # the norm's gradient (in four fp32 steps, or by one kernel), beside those of the block's output and the norm's
        attention=(b if numerics.fused else 16) * tokens * width + 2 * b * tokens * width,
    )


def vision_block(shapes: Shapes, batch: MicroBatch, numerics: Numerics) -> Block:
    """One SigLIP block: 32 Nd bytes in bf16 with an MLP four times as wide. Nothing is kept where the tower is
    frozen: pixels need no gradient."""
    b, width, hidden = numerics.size, shapes.vision_width, shapes.vision_intermediate
    tokens = max(1, batch.und_images) * shapes.slots
    # both norms' input and output, queries, keys, values, attention's output; the MLP before and after GELU
    saved = 8 * b * tokens * width + 2 * b * tokens * hidden + 4 * tokens * shapes.vision_heads
    learns = "vision_model" in shapes.learns
    return Block(
        saved=saved * learns,
        entry=b * tokens * width * learns,
        forward=2 * b * tokens * hidden + 2 * b * tokens * width,
        backward=b * tokens * hidden + 2 * b * tokens * width,
        mlp=2 * b * tokens * hidden * learns,
        attention=5 * b * tokens * width,
    )


def images(shapes: Shapes, batch: MicroBatch, numerics: Numerics) -> int:
    """Kept of both adaptors and of the tower's ends: the MLPs' inputs, and their values before and after GELU. An
    absent kind has a dummy."""
    b, width = numerics.size, shapes.width
    und = max(1, batch.und_images) * shapes.slots
    gen = batch.gen_images * shapes.slots or 1
    kept = und * (shapes.vision_width + 2 * width) * b + gen * (shapes.code_width + 2 * width) * b
    if "vision_model" in shapes.learns:
        pixels = max(1, batch.und_images) * 3 * shapes.image_size**2
        # the patches' pixels; the last norm's input and its statistics
        kept += b * pixels + 2 * b * und * shapes.vision_width
    return kept


def placing(shapes: Shapes, batch: MicroBatch, numerics: Numerics) -> int:
    """Taken while images are put into their slots: embeddings before and after, and the features."""
    b, width = numerics.size, shapes.width
    return 2 * b * batch.tokens * width + b * max(batch.und_images, batch.gen_images) * shapes.slots * width


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """Bytes of one head: kept of the positions it is trained on and of its weight's gradient, which is made in the
    forward pass; and taken by its logits, a chunk at a time."""

    saved: int
    forward: int
    backward: int


def text_head(shapes: Shapes, batch: MicroBatch, numerics: Numerics) -> Head:
    b, positions = numerics.size, max(1, batch.text_positions)
    weight = shapes.vocabulary * shapes.width * ("language_model" in shapes.learns)
    # the positions, and their gradient
    return Head(
        saved=b * positions * shapes.width + 4 * weight,
        forward=b * positions * shapes.width + _logits(positions, shapes.vocabulary, weight, numerics),
        backward=0,
    )


def image_head(shapes: Shapes, batch: MicroBatch, numerics: Numerics) -> Head:
    """A hidden layer, whose value is kept before and after GELU, and the logits."""
    b, positions = numerics.size, max(1, batch.image_positions)
    weight = shapes.codebook * shapes.width * ("gen_head" in shapes.learns)
    return Head(
        saved=4 * b * positions * shapes.width + 4 * weight,
        forward=_logits(positions, shapes.codebook, weight, numerics),
        backward=b * positions * shapes.width,
    )


def _logits(positions: int, classes: int, weight: int, numerics: Numerics) -> int:
    """Taken by a chunk's logits at the most: beside them a block of them in fp32, which the log-sum-exp copies once;
    later a part of the chunk's product for the gradient of `weight` elements. In fp32 both are changed in place."""
    chunk, b = min(positions, numerics.chunk), numerics.size
    block, narrow = 4 * min(chunk, LOGITS_BLOCK) * classes, b < 4
    product = b * weight * min(classes, PRODUCT_CLASSES) // classes if narrow else 0
    return b * chunk * classes + max(2 * block if narrow else block, product)


def final_norm(shapes: Shapes, batch: MicroBatch, numerics: Numerics) -> int:
    """Kept of the norm in front of the heads: as in a layer; its output is gathered at the supervised positions and
    not kept."""
    return _norm("language_model" in shapes.learns, numerics) * batch.tokens * shapes.width


def _norm(learns: bool, numerics: Numerics) -> int:
    """Bytes an element that RMSNorm keeps besides its output. On CUDA its input (and 4 bytes a token, left out);
    elsewhere the input in fp32, and the normalised value where its weight learns."""
    return numerics.size if numerics.fused else 4 + 4 * learns


def rotary(shapes: Shapes, batch: MicroBatch, numerics: Numerics) -> int:
    """Cosine and sine, shared by all layers."""
    return 2 * numerics.size * batch.tokens * shapes.width // shapes.heads


VQ_MAPS = 4
"""Feature maps of an image at full resolution that exist at one time in the VQ encoder's first blocks (input, norm,
swish's factor and product)."""
VQ_AT_ONCE = 8
"""model/vq.py IMAGES_AT_ONCE."""


def vq_encoding(shapes: Shapes, batch: MicroBatch) -> int:
    """Taken by on-the-fly encoding, always in fp32, before the forward pass."""
    return VQ_MAPS * 4 * shapes.vq_base_channels * shapes.image_size**2 * min(batch.encoded_images, VQ_AT_ONCE)
