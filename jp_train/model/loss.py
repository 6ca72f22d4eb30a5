"""Cross-entropy of a wide linear head, in chunks, so that its full logits never exist.

``CrossEntropyLinear`` is an ``nn.Linear`` whose forward can also return per-position losses. The chunk loop lives
inside ONE autograd function inside ONE module call: under ZeRO-3 the weight is gathered once in the forward and once in
the backward pass and reduced once, whatever the number of chunks, which may differ between ranks. (A module call per
chunk would make the ranks' collective sequences differ.)

Shapes: N supervised positions, d hidden width, V classes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from jp_train.types import IGNORE_INDEX, KINDS, PackedBatch


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Per-position cross-entropy of ``hidden @ weight.T + bias``; logits are recomputed chunk by chunk in the
    backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        chunk_tokens: int,
    ) -> torch.Tensor:
        losses = torch.zeros(labels.shape, dtype=torch.float32, device=hidden.device)
        lse = torch.empty_like(losses)
        for start in range(0, len(labels), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            logits = _logits(hidden[part], weight, bias).float()
            target = labels[part]
            kept = target != IGNORE_INDEX
            picked = logits.gather(1, target.masked_fill(~kept, 0).unsqueeze(1)).squeeze(1)
            lse[part] = torch.logsumexp(logits, dim=1)
            losses[part] = (lse[part] - picked).masked_fill(~kept, 0.0)
        ctx.save_for_backward(hidden, weight, bias, labels, lse)
        ctx.chunk_tokens = chunk_tokens
        return losses

    @staticmethod
    def backward(ctx: Any, grad_losses: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, labels, lse = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        grad_bias = (
            torch.zeros_like(bias, dtype=torch.float32) if bias is not None and ctx.needs_input_grad[2] else None
        )
        for start in range(0, len(labels), ctx.chunk_tokens):
            part = slice(start, start + ctx.chunk_tokens)
            target = labels[part]
            kept = target != IGNORE_INDEX
            # d loss / d logits = softmax - one_hot, zero at ignored positions
            grad = _logits(hidden[part], weight, bias).float().sub_(lse[part].unsqueeze(1)).exp_()
            ones = torch.ones(len(target), 1, dtype=grad.dtype, device=grad.device)
            grad.scatter_add_(1, target.masked_fill(~kept, 0).unsqueeze(1), -ones)
            grad.mul_(torch.where(kept, grad_losses[part].float(), 0.0).unsqueeze(1))
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight.addmm_(grad.t(), hidden[part])
        return grad_hidden, grad_weight, None if grad_bias is None else grad_bias.to(bias.dtype), None, None


def _logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``[n, V]`` in the weight's dtype.  Not F.linear: DeepSpeed may patch that one."""
    return torch.mm(hidden, weight.t()) if bias is None else torch.addmm(bias, hidden, weight.t())


class CrossEntropyLinear(nn.Linear):
    """A linear head that returns logits, or the cross-entropy at each position without keeping logits.

    Its state dict is that of ``nn.Linear``, so it takes the place of transformers' heads without renaming anything.
    """

    def forward(
        self, hidden: torch.Tensor, labels: torch.Tensor | None = None, chunk_tokens: int = 1024
    ) -> torch.Tensor:
        """Logits ``[..., V]`` of hidden ``[..., d]``; or, with int64 labels ``[N]`` and hidden ``[N, d]``, float32
        losses ``[N]``.

        Losses are in nats and zero where the label is IGNORE_INDEX (with zero, not missing, gradients). Softmax in
        float32; at most ``chunk_tokens`` rows of logits exist at one time, in the forward and in the backward pass.
        """
        if labels is None:
            return F.linear(hidden, self.weight, self.bias)
        return _ChunkedCrossEntropy.apply(hidden, self.weight, self.bias, labels, chunk_tokens)


class SupervisedPositions:
    """The positions one head is trained on, with the document, kind and source of each.

    Never empty: a head without a supervised position gets position 0 with IGNORE_INDEX, whose loss and gradients are
    exactly zero, so that the head takes part in every micro-batch (DeepSpeed ZeRO-3 would re-apply stale gradients
    otherwise).
    """

    def __init__(self, labels: torch.Tensor, document_of_token: torch.Tensor) -> None:
        positions = torch.nonzero(labels != IGNORE_INDEX).squeeze(1)
        self.count = int(positions.shape[0])
        """Supervised positions; 0 when only the stand-in is present."""
        self.positions = positions if self.count else positions.new_zeros(1)
        self.labels = labels[self.positions]
        self.documents = document_of_token[self.positions]


def document_of_token(batch: PackedBatch) -> torch.Tensor:
    """Number of the document that each token belongs to, int64 ``[T]``.

    Raises:
        ValueError: if the document lengths do not add up to the number of tokens.
    """
    lengths, tokens = batch.document_lengths, len(batch.input_ids)
    if lengths.device.type == "cpu" and int(lengths.sum()) != tokens:
        raise ValueError(
            f"document_lengths add up to {int(lengths.sum())} but the batch has {tokens} tokens: a bug in collate"
        )
    return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths, output_size=tokens)


def grouped_sums(
    losses: torch.Tensor, positions: SupervisedPositions, groups: torch.Tensor, n_groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums float32 ``[n_groups]`` and counts int64 ``[n_groups]`` of losses by a property ``groups`` int64 ``[D]``
    of their document."""
    index = groups[positions.documents]
    sums = torch.zeros(n_groups, dtype=torch.float32, device=losses.device).index_add_(0, index, losses.detach())
    ones = (positions.labels != IGNORE_INDEX).to(torch.int64)
    return sums, torch.zeros(n_groups, dtype=torch.int64, device=losses.device).index_add_(0, index, ones)


def document_mean_sum(parts: list[tuple[torch.Tensor, SupervisedPositions, float]], n_documents: int) -> torch.Tensor:
    """Sum over documents of (weighted loss of the document / its supervised positions), a scalar with gradient.

    ``parts`` holds, for each head, its losses ``[N]``, its positions and its weight.
    """
    total = parts[0][0].new_zeros(n_documents)
    count = torch.zeros(n_documents, dtype=torch.int64, device=total.device)
    for losses, positions, weight in parts:
        total = total.index_add(0, positions.documents, losses * weight)
        count.index_add_(0, positions.documents, (positions.labels != IGNORE_INDEX).to(torch.int64))
    return (total / count.clamp(min=1)).sum()


N_KINDS = len(KINDS)
