"""Pretrain the small vision encoder with SigLIP's sigmoid image-text loss (a text tower is trained along and thrown
away).

Only transformers' ``JanusVisionModel`` is kept: Janus uses the last block's tokens after the final LayerNorm, never
the pooled vector, so the pooling here is a plain mean over tokens and carries no weights.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.janus.configuration_janus import JanusVisionConfig
from transformers.models.janus.modeling_janus import JanusVisionModel

from examples.smoke.console import PROGRESS_S
from examples.smoke.precision import autocast
from examples.smoke.pretrain_vq import scale_weights, to_model_range
from jp_train.terminal import ProgressLine


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionTraining:
    """How to pretrain the vision encoder."""

    steps: int
    batch_pairs: int
    learning_rate: float
    weight_decay: float = 0.05
    embedding_size: int = 128
    """Length of the shared image-text vectors."""
    bfloat16: bool = True
    """Matrix products in bfloat16 where the CPU gains from it."""


class TextTower(nn.Module):
    """One transformer layer over token embeddings, averaged over the real tokens."""

    def __init__(self, vocab_size: int, width: int, out: int, max_tokens: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width)
        self.places = nn.Parameter(torch.randn(max_tokens, width) * 0.02)
        self.layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.out = nn.Linear(width, out)

    def forward(self, ids: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """``ids`` int64 and ``real`` bool, both ``[n, T]`` → ``[n, out]``."""
        hidden = self.tokens(ids) + self.places[: ids.shape[1]]
        hidden = self.layer(hidden, src_key_padding_mask=~real)
        weight = real.unsqueeze(-1).float()
        return self.out((hidden * weight).sum(1) / weight.sum(1))


def pad_ids(encoded: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-pad token lists to one tensor: ids int64 and a bool mask of real tokens, both ``[n, T]``."""
    width = max(map(len, encoded))
    ids = torch.zeros(len(encoded), width, dtype=torch.long)
    real = torch.zeros(len(encoded), width, dtype=torch.bool)
    for row, tokens in enumerate(encoded):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        real[row, : len(tokens)] = True
    return ids, real


def sigmoid_loss(
    image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, same: torch.Tensor
) -> torch.Tensor:
    """SigLIP's loss of unit vectors ``[n, d]``: every pair is a yes/no question.

    ``same`` bool ``[n, n]`` marks the pairs that belong together: the diagonal, and pairs whose texts are equal.
    Returns the sum over pairs divided by n, as in the SigLIP paper.
    """
    logits = image @ text.t() * scale + bias
    return -F.logsigmoid(torch.where(same, logits, -logits)).sum() / len(image)


def train_vision(
    config: JanusVisionConfig,
    images: torch.Tensor,
    texts: list[list[int]],
    training: VisionTraining,
    *,
    vocab_size: int,
    seed: int,
) -> JanusVisionModel:
    """Pretrain a vision encoder on uint8 images ``[n, 3, S, S]`` and the token lists of their texts; returns it in
    eval mode.

    Raises:
        ValueError: if images and texts do not pair up, or the images have another side than the config.
    """
    if len(images) != len(texts):
        raise ValueError(f"{len(images)} images but {len(texts)} texts")
    if images.shape[-1] != config.image_size:
        raise ValueError(f"images are {images.shape[-1]} px, the encoder takes {config.image_size} px")
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    ids, real = pad_ids(texts)
    identity: dict[tuple[int, ...], int] = {}
    text_number = torch.tensor([identity.setdefault(tuple(t), len(identity)) for t in texts])
    vision = JanusVisionModel(config).train()
    scale_weights(vision, generator)
    vision.config._attn_implementation = "sdpa"
    width = training.embedding_size
    image_out = nn.Linear(config.hidden_size, width)
    tower = TextTower(vocab_size, width, width, ids.shape[1])
    log_scale, bias = nn.Parameter(torch.tensor(2.3)), nn.Parameter(torch.tensor(-10.0))
    modules = nn.ModuleList([vision, image_out, tower])
    trained = [*modules.parameters(), log_scale, bias]
    optimizer = torch.optim.AdamW(
        trained, lr=training.learning_rate, betas=(0.9, 0.95), weight_decay=training.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / 50) * max(0.02, 1 - s / training.steps)
    )
    progress = ProgressLine("vision encoder", sys.stderr, every_s=PROGRESS_S)
    for step in range(training.steps):
        rows = torch.randint(len(images), (training.batch_pairs,), generator=generator)
        length = int(real[rows].sum(1).max())
        with autocast(training.bfloat16):
            tokens = vision(to_model_range(images[rows])).last_hidden_state
            image = F.normalize(image_out(tokens.mean(1)).float(), dim=-1)
            text = F.normalize(tower(ids[rows, :length], real[rows, :length]).float(), dim=-1)
        same = text_number[rows, None] == text_number[None, rows]
        loss = sigmoid_loss(image, text, log_scale.exp(), bias, same)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            hit = same[torch.arange(len(rows)), (image @ text.t()).argmax(1)].float().mean().item()
        progress.show(step + 1, training.steps, f"loss {loss.item():.3f}", f"right text among {len(rows)}: {hit:.0%}")
    return vision.eval()
