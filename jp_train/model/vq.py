"""The VQ tokenizer of generated images (LlamaGen VQ-16): frozen, replicated on every rank, never part of the trained
module.

Wraps transformers' ``JanusVQVAE``, whose ``encode`` leaves out the L2 normalisation of the released code: here encoder
outputs and codebook rows are both brought to unit length before the nearest row is searched (docs/model.md, the second
difference).

Shapes: n images, H = W = image side, S = ids an image (row-major), K codes of c channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

from jp_train.config.schema import VQConfig
from jp_train.errors import ConfigError
from jp_train.types import PENDING_VQ_ID, PackedBatch

IMAGES_AT_ONCE = 8
"""Images per convolution call: bounds memory (a 384 px image needs about 0.5 GiB of activations), changes no id."""

UNIT_TOLERANCE = 1e-5
"""Codebook rows this close to length 1 are taken as they are, so that normalising twice changes no bit."""


def unit_rows(rows: torch.Tensor) -> torch.Tensor:
    """float32 rows ``[K, c]`` of unit length; rows that are already unit come back bit-equal."""
    rows = rows.float()
    if bool(((rows.norm(dim=-1) - 1).abs() <= UNIT_TOLERANCE).all()):
        return rows
    return F.normalize(rows, dim=-1)


class VQTokenizer(nn.Module):
    """Images to ids and back.  Always float32, always frozen, always in eval mode.

    Build it outside ``deepspeed.zero.Init``: it is a plain replicated module.  Weights come from ``pretrained``; its
    parameter
    names, prefixed with ``model.``, are those of transformers' JanusForConditionalGeneration (``vqmodel.encoder...``).

    Raises:
        ConfigError: if the image side is not a multiple of the stride.
    """

    def __init__(self, cfg: VQConfig, image_size: int) -> None:
        super().__init__()
        stride = 2 ** (len(cfg.channel_multiplier) - 1)
        if image_size % stride:
            raise ConfigError(f"model.vision.image_size={image_size} is not a multiple of the VQ stride {stride}")
        self.image_size = image_size
        self.grid = image_size // stride
        self.vqmodel = JanusVQVAE(
            JanusVQVAEConfig(
                embed_dim=cfg.embed_dim,
                num_embeddings=cfg.codebook_size,
                latent_channels=cfg.latent_channels,
                base_channels=cfg.base_channels,
                channel_multiplier=list(cfg.channel_multiplier),
                num_res_blocks=cfg.res_blocks,
                num_patches=self.grid,
            )
        ).float()
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> VQTokenizer:
        """Stays in eval mode whatever the surrounding model does."""
        return super().train(False)

    @property
    def codebook(self) -> torch.Tensor:
        """Codebook rows of unit length, float32 ``[K, c]``."""
        return unit_rows(self.vqmodel.quantize.embedding.weight)

    @torch.no_grad()
    def encode(self, images: torch.Tensor, at_once: int = IMAGES_AT_ONCE) -> torch.Tensor:
        """VQ ids int64 ``[n, S]`` of uint8 images ``[n, 3, H, W]``: the code nearest to each unit-length encoder
        output.

        ``at_once`` images go through the convolutions together.

        Raises:
            ValueError: if the images are not uint8 of the model's side.
        """
        if images.dtype != torch.uint8 or images.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(
                f"expected uint8 images [n, 3, {self.image_size}, {self.image_size}], got {images.dtype} "
                f"{list(images.shape)}"
            )
        codebook = self.codebook
        ids = [torch.empty(0, self.grid**2, dtype=torch.int64, device=images.device)]
        with _full_precision(images.device):
            for part in images.split(at_once) if len(images) else ():
                pixels = (part.float() / 255 - 0.5) / 0.5
                latent = self.vqmodel.quant_conv(self.vqmodel.encoder(pixels))
                unit = F.normalize(latent.permute(0, 2, 3, 1).flatten(1, 2), dim=-1)
                # among unit rows the nearest one has the largest dot product
                ids.append((unit @ codebook.t()).argmax(-1))
        return torch.cat(ids)

    @torch.no_grad()
    def decode(self, ids: torch.Tensor) -> torch.Tensor:
        """uint8 images ``[n, 3, H, W]`` of VQ ids int64 ``[n, S]``: (x + 1) / 2 * 255, clipped and rounded."""
        if ids.ndim != 2 or ids.shape[1] != self.grid**2:
            raise ValueError(f"expected ids [n, {self.grid**2}], got {list(ids.shape)}")
        images = [torch.empty(0, 3, self.image_size, self.image_size, dtype=torch.uint8, device=ids.device)]
        with _full_precision(ids.device):
            for part in ids.split(IMAGES_AT_ONCE) if len(ids) else ():
                pixels = self.vqmodel.decode(part)
                images.append(((pixels + 1) / 2 * 255).clamp(0, 255).round().to(torch.uint8))
        return torch.cat(images)

    def fingerprint(self) -> str:
        """Hex digest of all that decides an id: image side, normalisation, encoder weights and unit codebook rows.

        Stored VQ ids carry it; ids of another fingerprint belong to another tokenizer.
        """
        digest = hashlib.sha256(f"janus-vq/1 side={self.image_size} range=[-1,1] l2=both".encode())
        tensors = {k: v for k, v in self.vqmodel.state_dict().items() if k.startswith(("encoder.", "quant_conv."))}
        tensors["quantize.embedding.weight"] = self.codebook
        for name in sorted(tensors):
            tensor = tensors[name].detach().float().cpu().contiguous()
            digest.update(f"{name}{list(tensor.shape)}".encode())
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()[:32]


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """No autocast and no TF32: an id must not depend on where it was computed more than float32 forces it to."""
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield


@torch.no_grad()
def fill_pending(batch: PackedBatch, vq: VQTokenizer) -> PackedBatch:
    """The batch with the VQ ids of its pending images encoded: ``gen_ids`` and the pending ``gen_labels`` are complete.

    The id of slot position p is the label of position p - 1 (the first one of boi), where that label is PENDING_VQ_ID;
    an unsupervised image only gets its inputs. Batches without pending images come back unchanged.
    """
    if not len(batch.gen_pending):
        return batch
    ids = vq.encode(batch.gen_images)
    slots = batch.gen_slots.view(len(batch.gen_ids), -1)[batch.gen_pending]
    before = slots.flatten() - 1
    current = batch.gen_labels[before]
    labels = torch.where(current == PENDING_VQ_ID, ids.flatten(), current)
    return replace(
        batch,
        gen_ids=batch.gen_ids.index_copy(0, batch.gen_pending, ids),
        gen_labels=batch.gen_labels.index_copy(0, before, labels),
        gen_pending=batch.gen_pending.new_zeros(0),
        gen_images=batch.gen_images[:0],
    )
