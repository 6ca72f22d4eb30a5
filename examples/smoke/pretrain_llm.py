"""Pretrain the small language model on plain text: stage 1 freezes it."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from examples.smoke.console import PROGRESS_S
from examples.smoke.precision import autocast
from jp_train.terminal import ProgressLine


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTraining:
    """How to warm up the language model."""

    steps: int
    batch_rows: int
    row_tokens: int
    learning_rate: float
    weight_decay: float = 0.05
    bfloat16: bool = True
    """Matrix products in bfloat16 where the CPU gains from it."""


def train_llm(
    config: LlamaConfig, documents: list[list[int]], training: TextTraining, *, seed: int
) -> LlamaForCausalLM:
    """Train a Llama on documents (token lists that start with BOS and end with EOS); returns it in eval mode.

    Documents are laid end to end in a fresh order each pass and read in rows of ``row_tokens``.

    Raises:
        ValueError: if the documents together do not fill one row.
    """
    total = sum(map(len, documents))
    if total <= training.row_tokens:
        raise ValueError(f"{total} tokens of text do not fill one row of {training.row_tokens} tokens")
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.learning_rate, betas=(0.9, 0.95), weight_decay=training.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / 20) * max(0.05, 1 - s / training.steps)
    )
    progress = ProgressLine("language model", sys.stderr, every_s=PROGRESS_S)
    needed = training.batch_rows * (training.row_tokens + 1)
    stream = torch.empty(0, dtype=torch.long)
    for step in range(training.steps):
        while len(stream) < needed:
            order = torch.randperm(len(documents), generator=generator).tolist()
            stream = torch.cat([stream, *(torch.tensor(documents[i]) for i in order)])
        rows, stream = stream[:needed].view(training.batch_rows, -1), stream[needed:]
        with autocast(training.bfloat16):
            loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.show(step + 1, training.steps, f"loss {loss.item():.3f}")
    return model.eval()
