"""Train the small VQ tokenizer of the smoke run: transformers' ``JanusVQVAE`` with unit-length codes.

The released model normalises both the encoder's output and the codebook rows to unit length before it looks for the
nearest row, and decodes from unit rows. ``JanusVQVAE.encode`` normalises neither, so training here normalises both and
stores unit rows: then transformers' ids, which compare the raw encoder output with unit rows, are the same ids (for
unit rows the nearest row by distance is the row with the largest dot product, whatever the output's length).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

from examples.smoke.console import PROGRESS_S
from examples.smoke.precision import autocast
from jp_train.terminal import ProgressLine

PLAIN_INK = 0.08
"""A patch whose darkest channel value is nearer to white than this (of a range of 2) is plain paper."""
PAPER = 0
"""The code that every plain patch is taught to take. Left alone, the encoder hides what other patches show in the
codes of plain ones, which are most of a scene, and the image head has to guess hundreds of codes that all mean
white."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VQTraining:
    """How to train the VQ tokenizer.  Counts are optimizer steps where nothing else is stated."""

    steps: int
    batch_images: int
    learning_rate: float
    continuous_steps: int
    """Steps at the start without quantization; then the codebook starts as k-means of the encoder's outputs."""
    commitment: float = 0.25
    colour_weight: float = 3.0
    """Extra weight of a fully saturated pixel's error over a grey one's: small coloured shapes on white would else
    hardly count."""
    kmeans_images: int = 1500
    """Images whose encoder outputs the k-means of the codebook takes."""
    codebook_decay: float = 0.98
    """Decay a step of the running means that codebook rows are."""
    restart_every: int = 50
    """Rows that were used less than ``restart_below`` times a step on average are moved to a present output every so
    many steps."""
    restart_below: float = 0.05
    freeze_codebook_last: int = 100
    """In the last steps rows no longer restart, so that no row changes its meaning."""
    bfloat16: bool = True
    """Convolutions in bfloat16 where the CPU gains from it."""


@torch.no_grad()
def scale_weights(module: nn.Module, generator: torch.Generator) -> None:
    """Give every convolution and linear layer normal weights of std 1/sqrt(inputs) and zero bias.

    transformers starts them all with std 0.02, which suits wide layers.  In a narrow network it shrinks the image
    ten times at the first layer and at every shortcut, and training stays blind to colour for hundreds of steps.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.weight.normal_(0.0, layer.weight[0].numel() ** -0.5, generator=generator)
            if layer.bias is not None:
                layer.bias.zero_()


class UnitCodebook:
    """Codebook rows of unit length as running means of the encoder outputs assigned to them.

    Row 0 is plain paper (``PAPER``) and never moves. Holds a reference to the embedding weight ``[codes, dim]`` and
    writes it in place.
    """

    def __init__(self, weight: torch.Tensor, decay: float, generator: torch.Generator) -> None:
        self.weight, self.decay, self.generator = weight, decay, generator
        self.paper = F.one_hot(torch.tensor(PAPER), weight.shape[1]).to(weight.dtype)
        self.weight[PAPER] = self.paper
        self.sums = weight.detach().clone()
        self.counts = torch.ones(len(weight))

    def nearest(self, unit: torch.Tensor) -> torch.Tensor:
        """Row ids ``[n]`` of unit vectors ``[n, dim]``."""
        return (unit @ self.weight.t()).argmax(-1)

    @torch.no_grad()
    def kmeans(self, unit: torch.Tensor, iterations: int = 8) -> None:
        """Set the rows to spherical k-means centres of unit vectors ``[n, dim]``; empty centres move to random
        vectors."""
        self.weight.copy_(self._random_rows(unit, len(self.weight)))
        for _ in range(iterations):
            ids = self.nearest(unit)
            sums = torch.zeros_like(self.weight).index_add_(0, ids, unit)
            counts = torch.bincount(ids, minlength=len(self.weight))
            empty = counts == 0
            sums[empty] = self._random_rows(unit, int(empty.sum()))
            self.weight.copy_(F.normalize(sums, dim=-1))
        self.weight[PAPER] = self.paper
        self.sums, self.counts = self.weight.clone(), torch.ones(len(self.weight))

    @torch.no_grad()
    def update(self, unit: torch.Tensor, ids: torch.Tensor) -> None:
        """Move the rows towards the unit vectors ``[n, dim]`` that chose them."""
        sums = torch.zeros_like(self.weight).index_add_(0, ids, unit)
        counts = torch.bincount(ids, minlength=len(self.weight)).float()
        self.sums.mul_(self.decay).add_(sums, alpha=1 - self.decay)
        self.counts.mul_(self.decay).add_(counts, alpha=1 - self.decay)
        self.weight.copy_(F.normalize(self.sums, dim=-1))
        self.weight[PAPER] = self.paper

    @torch.no_grad()
    def restart(self, unit: torch.Tensor, below: float) -> int:
        """Move rows with a running count below ``below`` onto random vectors of ``unit``; return how many moved."""
        dead = self.counts < below
        dead[PAPER] = False
        moved = int(dead.sum())
        if moved:
            rows = self._random_rows(unit, moved)
            self.weight[dead], self.sums[dead], self.counts[dead] = rows, rows.clone(), 1.0
        return moved

    def _random_rows(self, unit: torch.Tensor, count: int) -> torch.Tensor:
        rows = torch.randint(len(unit), (count,), generator=self.generator)
        return F.normalize(unit[rows] + 1e-3 * torch.randn(count, unit.shape[1], generator=self.generator), dim=-1)


def to_model_range(images: torch.Tensor) -> torch.Tensor:
    """uint8 ``[n, 3, S, S]`` to float32 in [-1, 1], the range that the VQ encoder and the vision encoder take."""
    return images.float().div_(127.5).sub_(1.0)


@torch.no_grad()
def encode_ids(vq: JanusVQVAE, pixels: torch.Tensor) -> torch.Tensor:
    """Nearest-row ids ``[n, tokens]`` of images ``[n, 3, S, S]`` in [-1, 1], both sides normalised as in the
    released code."""
    latent = vq.quant_conv(vq.encoder(pixels))
    unit = F.normalize(latent.permute(0, 2, 3, 1).flatten(1, 2), dim=-1)
    rows = F.normalize(vq.quantize.embedding.weight, dim=-1)
    return (unit @ rows.t()).argmax(-1)


@torch.no_grad()
def decode_images(vq: JanusVQVAE, ids: torch.Tensor) -> torch.Tensor:
    """uint8 images ``[n, 3, S, S]`` decoded from ids ``[n, tokens]``."""
    decoded = vq.decode(ids)  # type: ignore[arg-type]  # annotated with the legacy LongTensor, which no function returns
    return decoded.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def shows_something(pixels: torch.Tensor, stride: int) -> torch.Tensor:
    """Which tokens, bool ``[n * tokens]``, show anything: some pixel of their ``stride`` x ``stride`` patch is not
    white.

    ``pixels`` is ``[n, 3, S, S]`` in [-1, 1].
    """
    ink = 1 - pixels.amin(1, keepdim=True)
    return (F.max_pool2d(ink, stride) > PLAIN_INK).flatten()


@torch.no_grad()
def _outputs_for_codes(
    vq: JanusVQVAE, images: torch.Tensor, count: int, stride: int, generator: torch.Generator
) -> torch.Tensor:
    """Unit encoder outputs ``[m, dim]`` of those tokens of ``count`` random images that show something."""
    rows = torch.randperm(len(images), generator=generator)[:count]
    outputs = []
    for part in rows.split(32):
        pixels = to_model_range(images[part])
        latent = vq.quant_conv(vq.encoder(pixels)).permute(0, 2, 3, 1)
        outputs.append(F.normalize(latent.reshape(-1, latent.shape[-1]), dim=-1)[shows_something(pixels, stride)])
    return torch.cat(outputs)


def train_vq(config: JanusVQVAEConfig, images: torch.Tensor, training: VQTraining, *, seed: int) -> JanusVQVAE:
    """Train a VQ tokenizer on uint8 images ``[n, 3, S, S]``; returns it in eval mode with unit codebook rows.

    The objective is L1 + L2 of the pixels (saturated ones count more) plus the commitment of encoder outputs to their
    rows (of plain patches: to the paper row, from the first step); gradients pass the quantizer straight through.  The
    learning rate falls linearly to zero after a short warm-up.

    Raises:
        ValueError: if the image side does not fit the configured grid.
    """
    stride = 2 ** (len(config.channel_multiplier) - 1)
    if images.shape[-1] != config.num_patches * stride:
        raise ValueError(
            f"images are {images.shape[-1]} px but the VQ grid is {config.num_patches} x stride {stride}: "
            f"use images of {config.num_patches * stride} px"
        )
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    vq = JanusVQVAE(config).train()
    scale_weights(vq, generator)
    codebook = UnitCodebook(vq.quantize.embedding.weight.data, training.codebook_decay, generator)
    vq.quantize.embedding.weight.requires_grad_(False)
    trained = [p for p in vq.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=training.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / 30) * max(0.02, 1 - s / training.steps)
    )
    progress = ProgressLine("VQ tokenizer", sys.stderr, every_s=PROGRESS_S)
    for step in range(training.steps):
        rows = torch.randint(len(images), (training.batch_images,), generator=generator)
        pixels = to_model_range(images[rows])
        with autocast(training.bfloat16):
            latent = vq.quant_conv(vq.encoder(pixels)).float()
        unit = F.normalize(latent, dim=1)
        flat = unit.permute(0, 2, 3, 1).reshape(-1, config.embed_dim)
        shows = shows_something(pixels, stride)
        chosen = torch.where(shows[:, None], flat.detach(), codebook.paper)
        if step >= training.continuous_steps:
            if step == training.continuous_steps:
                codebook.kmeans(_outputs_for_codes(vq, images, training.kmeans_images, stride, generator))
            ids = codebook.nearest(flat.detach()).masked_fill(~shows, PAPER)
            chosen = codebook.weight[ids]
            codebook.update(flat.detach()[shows], ids[shows])
            late = step >= training.steps - training.freeze_codebook_last
            if not late and step % training.restart_every == 0 and shows.any():
                codebook.restart(flat.detach()[shows], training.restart_below)
        chosen = chosen.view_as(unit.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        commitment = (unit - chosen).square().sum(1).mean()
        quantized = unit + (chosen - unit).detach()
        with autocast(training.bfloat16):
            decoded = vq.decoder(vq.post_quant_conv(quantized)).float()
        error = decoded - pixels
        chroma = (pixels.amax(1, keepdim=True) - pixels.amin(1, keepdim=True)) / 2
        weight = 1 + training.colour_weight * chroma
        loss = (weight * (error.abs() + error.square())).mean() + training.commitment * commitment
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        psnr = 10 * torch.log10(4.0 / error.detach().square().mean()).item()
        live = int((codebook.counts > training.restart_below).sum())
        codes = f"{live}/{config.num_embeddings} codes in use"
        progress.show(step + 1, training.steps, f"PSNR {psnr:.1f} dB", codes)
    vq.quantize.embedding.weight.data = F.normalize(codebook.weight, dim=-1)
    return vq.eval().requires_grad_(True)
