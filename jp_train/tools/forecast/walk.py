"""The order in which ZeRO-3 sees the modules of one forward and backward pass, with the bytes of activations that exist
at each.

A visit is one fetch of DeepSpeed's hooks (`fetch_sub_module`), forward or backward. Containers own no parameter but are
visited too: every visit starts a prefetch. The order is that of `JanusPro.forward`; a test compares it with the one
that a real DeepSpeed engine recorded. A layer is one visit, as one leaf of ZeRO-3; recomputed in the backward pass, it
is visited no second time, because transformers recomputes inside the hooks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jp_train.tools.forecast import activations
from jp_train.tools.forecast.activations import Block, Numerics
from jp_train.tools.forecast.shapes import MicroBatch, Shapes

FORWARD, BACKWARD = "forward", "backward"

ADAPTOR = ("", "fc1", "activation_fn", "hidden_layers.0")
IMAGE_HEAD = ("", "proj_out", "activation_fn", "vision_head")
LANGUAGE = "model.language_model"
VISION = "model.vision_model"


@dataclass(frozen=True, slots=True)
class Visit:
    """`activation`: bytes that exist while the module runs; `released`: whether its parameters may be released after it
    (a module whose input needs no gradient has no hook after its backward pass: DeepSpeed releases its parameters at
    the end of the pass)."""

    path: str
    phase: str
    activation: int
    released: bool = True


class _Walk:
    def __init__(self, shapes: Shapes, batch: MicroBatch, numerics: Numerics, checkpointing: int) -> None:
        self.shapes, self.checkpointing = shapes, checkpointing
        self.language = activations.language_block(shapes, batch, numerics)
        self.vision = activations.vision_block(shapes, batch, numerics)
        self.text = activations.text_head(shapes, batch, numerics)
        self.image = activations.image_head(shapes, batch, numerics)
        self.images = activations.images(shapes, batch, numerics)
        self.placing = activations.placing(shapes, batch, numerics)
        self.norm = activations.final_norm(shapes, batch, numerics)
        self.rotary = activations.rotary(shapes, batch, numerics)
        self.hidden = numerics.size * batch.tokens * shapes.width
        self.saved = 0
        """Bytes kept for the backward pass so far."""

    def forward(self) -> Iterator[Visit]:
        shapes, grows = self.shapes, self.shapes.through_language_model
        yield Visit("", FORWARD, 0)
        yield Visit(f"{LANGUAGE}.embed_tokens", FORWARD, self.hidden)
        for path in ("", ".embeddings", ".embeddings.patch_embedding", ".embeddings.position_embedding", ".encoder"):
            yield Visit(VISION + path, FORWARD, self.hidden + self.vision.forward)
        for layer in range(shapes.vision_layers):
            path = f"{VISION}.encoder.layers.{layer}"
            yield self._layer(path, self.vision, self._again(layer), "vision_model" in shapes.learns)
        yield Visit(f"{VISION}.post_layernorm", FORWARD, self.saved + self.hidden + self.vision.forward)
        # transformers pools with it
        yield Visit(f"{VISION}.post_layernorm", FORWARD, self.saved + self.hidden + self.vision.forward)
        self.saved += self.images
        for part in ADAPTOR:
            yield Visit(_join("model.aligner", part), FORWARD, self.saved + self.placing)
        yield Visit("model.generation_embeddings", FORWARD, self.saved + self.placing)
        for part in ADAPTOR:
            yield Visit(_join("model.generation_aligner", part), FORWARD, self.saved + self.placing)
        yield Visit(LANGUAGE, FORWARD, self.saved + self.placing)
        self.saved += self.rotary
        yield Visit(f"{LANGUAGE}.rotary_emb", FORWARD, self.saved + self.hidden)
        for layer in range(shapes.layers):
            yield self._layer(f"{LANGUAGE}.layers.{layer}", self.language, self._again(layer), grows)
        self.saved += self.norm
        yield Visit(f"{LANGUAGE}.norm", FORWARD, self.saved + 2 * self.hidden)
        self.saved += self.text.saved
        yield Visit("lm_head", FORWARD, self.saved + self.hidden + self.text.forward)
        self.saved += self.image.saved
        for part in IMAGE_HEAD:
            yield Visit(_join("model.generation_head", part), FORWARD, self.saved + self.hidden + self.image.forward)

    def _again(self, layer: int) -> bool:
        """Whether a layer is computed again in the backward pass."""
        return self.checkpointing > 0 and layer % self.checkpointing == 0

    def _layer(self, path: str, block: Block, again: bool, keeps: bool) -> Visit:
        kept = (block.entry if again else block.saved) if keeps else 0
        level = self.saved + (block.forward + kept if again or not keeps else block.saved + block.entry)
        self.saved += kept
        return Visit(path, FORWARD, level)

    def backward(self) -> Iterator[Visit]:
        shapes = self.shapes
        level = self.saved + self.image.backward
        for _ in range(2):  # the two losses leave through the root
            yield Visit("", BACKWARD, self.saved, False)
        for part in ("", "vision_head", "activation_fn", "proj_out"):
            yield Visit(_join("model.generation_head", part), BACKWARD, level, shapes.through_language_model)
        self.saved -= self.image.saved
        # the gradient of the hidden states at the image positions is spread over all of them, and waits for the text
        # head's
        yield Visit("lm_head", BACKWARD, self.saved + self.hidden + self.text.backward, shapes.through_language_model)
        self.saved -= self.text.saved
        if not shapes.through_language_model:
            return
        yield Visit(LANGUAGE, BACKWARD, self.saved + 2 * self.hidden)
        yield Visit(f"{LANGUAGE}.norm", BACKWARD, self.saved + 4 * self.hidden)
        self.saved -= self.norm
        for layer in reversed(range(shapes.layers)):
            yield self._back_through(f"{LANGUAGE}.layers.{layer}", self.language, self._again(layer))
        level = self.saved + 2 * self.hidden
        if shapes.learns & {"gen_embed", "gen_aligner"}:
            for part in ("", "hidden_layers.0", "activation_fn", "fc1"):
                yield Visit(
                    _join("model.generation_aligner", part),
                    BACKWARD,
                    level,
                    part != "fc1" or "gen_embed" in shapes.learns,
                )
        if "gen_embed" in shapes.learns:
            yield Visit("model.generation_embeddings", BACKWARD, level, False)
        if shapes.learns & {"aligner", "vision_model"}:
            for part in ("", "hidden_layers.0", "activation_fn", "fc1"):
                yield Visit(
                    _join("model.aligner", part), BACKWARD, level, part != "fc1" or "vision_model" in shapes.learns
                )
        if "vision_model" in shapes.learns:
            yield Visit(VISION, BACKWARD, level, False)
            yield Visit(f"{VISION}.post_layernorm", BACKWARD, level)
            yield Visit(f"{VISION}.encoder", BACKWARD, level)
            for layer in reversed(range(shapes.vision_layers)):
                path = f"{VISION}.encoder.layers.{layer}"
                yield self._back_through(path, self.vision, self._again(layer), beside=self.hidden)
            for path in (".embeddings", ".embeddings.position_embedding", ".embeddings.patch_embedding"):
                yield Visit(VISION + path, BACKWARD, self.saved + self.hidden + self.vision.backward, False)
        if "language_model" in shapes.learns:
            yield Visit(f"{LANGUAGE}.embed_tokens", BACKWARD, self.saved + self.hidden, False)

    def _back_through(self, path: str, block: Block, again: bool, beside: int = 0) -> Visit:
        kept = self.saved + beside + (block.saved if again else 0)
        self.saved -= block.entry if again else block.saved
        return Visit(path, BACKWARD, kept + max(block.backward, block.attention - block.mlp))


def walk(shapes: Shapes, batch: MicroBatch, numerics: Numerics, *, checkpointing: int) -> list[Visit]:
    """All visits of one micro-batch."""
    steps = _Walk(shapes, batch, numerics, checkpointing)
    return [*steps.forward(), *steps.backward()]


def recomputed_layers(layers: int, checkpointing: int) -> int:
    """Of a tower of `layers`, every `checkpointing`-th from the first on; 0: none."""
    return -(-layers // checkpointing) if checkpointing else 0


def _join(path: str, part: str) -> str:
    return f"{path}.{part}" if part else path
