"""Cross-entropy of a wide linear head, in chunks, so that its full logits never exist.

``CrossEntropyLinear`` is an ``nn.Linear`` whose forward can also return a loss. The chunk loop lives inside ONE
autograd function inside ONE module call: under ZeRO-3 the weight is gathered once in the forward and once in the
backward pass and reduced once, whatever the number of chunks, which may differ between ranks. (A module call per chunk
would make the ranks' collective sequences differ.)

The loss is a weighted sum, so its gradients are known in the forward pass but for one factor: they are made there,
while a chunk's logits exist, and no logit is computed twice.

Shapes: N supervised positions, d hidden width, V classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from jp_train.types import IGNORE_INDEX, KINDS, LOGITS_BLOCK, PRODUCT_CLASSES, PackedBatch


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Weighted sum (a scalar) and per-position cross-entropy (no gradient) of ``hidden @ weight.T + bias``."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        weights: torch.Tensor | None,
        chunk_tokens: int,
        with_gradients: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        losses = torch.zeros(labels.shape, dtype=torch.float32, device=hidden.device)
        needed = [with_gradients and needs for needs in ctx.needs_input_grad[:3]]
        grad_hidden = torch.empty_like(hidden) if needed[0] else None
        # fp32: sums of bf16 over chunks lose 2.4e-3 to 3.9e-3 of the gradient
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needed[1] else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needed[2] else None
        for start in range(0, len(labels), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            logits = _logits(hidden[part], weight, bias)
            scales = None if weights is None else weights[part]
            _into_gradient(logits, labels[part], scales, losses[part], grad_bias, any(needed))
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[part])
            if grad_weight is not None:
                _add_product(grad_weight, logits, hidden[part])
            del logits  # before the next chunk's
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(losses)
        return (losses if weights is None else losses * weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, factor: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # the factor stays fp32: rounded to bf16 it would bias every gradient
        grad_hidden, grad_weight, grad_bias = (
            None if grad is None else grad.mul_(factor) for grad in ctx.saved_tensors
        )
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight_dtype),
            None if grad_bias is None else grad_bias.to(bias_dtype),
            *(None,) * 4,
        )


def _into_gradient(
    logits: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor | None,
    losses: torch.Tensor,
    grad_bias: torch.Tensor | None,
    with_gradient: bool,
) -> None:
    """Write the losses ``[n]`` of a chunk's logits ``[n, V]``; ``with_gradient`` also, over the logits, the gradient of
    the weighted sum of the losses, and add its sum to ``grad_bias``. In fp32, a block at a time."""
    for start in range(0, len(logits), LOGITS_BLOCK):
        rows = slice(start, start + LOGITS_BLOCK)
        block = logits[rows].float()  # fp32 logits are changed in place
        kept = labels[rows] != IGNORE_INDEX
        target = labels[rows].masked_fill(~kept, 0).unsqueeze(1)
        lse = torch.logsumexp(block, dim=1, keepdim=True)
        losses[rows] = (lse - block.gather(1, target)).squeeze(1).masked_fill(~kept, 0.0)
        if with_gradient:
            # d loss / d logits = softmax - one_hot, zero at ignored positions
            block.sub_(lse).exp_().scatter_add_(1, target, -torch.ones_like(lse))
            block.mul_((kept.float() if weights is None else weights[rows] * kept).unsqueeze(1))
            if grad_bias is not None:
                grad_bias += block.sum(0)
            logits[rows] = block


def _add_product(total: torch.Tensor, grad: torch.Tensor, hidden: torch.Tensor) -> None:
    """``total += grad.T @ hidden`` of fp32 ``[V, d]``, ``[n, V]`` and ``[n, d]``."""
    if grad.dtype == total.dtype:
        torch.addmm(total, grad.t(), hidden, out=total)  # addmm_ is not counted by torch's FLOP counter
        return
    for into, part in zip(total.split(PRODUCT_CLASSES), grad.split(PRODUCT_CLASSES, dim=1), strict=True):
        into += torch.mm(part.t(), hidden)


def _logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``[n, V]`` in the weight's dtype.  Not F.linear: DeepSpeed may patch that one."""
    return torch.mm(hidden, weight.t()) if bias is None else torch.addmm(bias, hidden, weight.t())


class CrossEntropyLinear(nn.Linear):
    """A linear head that returns logits, or a loss without keeping logits.

    Its state dict is that of ``nn.Linear``, so it takes the place of transformers' heads without renaming anything.
    """

    def forward(
        self,
        hidden: torch.Tensor,
        labels: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        chunk_tokens: int = 1024,
    ) -> Any:
        """Logits ``[..., V]`` of hidden ``[..., d]``; or, with int64 labels ``[N]`` and hidden ``[N, d]``, the sum of
        ``weights`` float32 ``[N]`` (ones without) times the losses, and the losses float32 ``[N]`` without gradient.

        Losses are in nats and zero where the label is IGNORE_INDEX (with zero, not missing, gradients). Softmax in
        float32; at most ``chunk_tokens`` rows of logits exist at one time.
        """
        if labels is None:
            return F.linear(hidden, self.weight, self.bias)
        return _ChunkedCrossEntropy.apply(
            hidden, self.weight, self.bias, labels, weights, chunk_tokens, torch.is_grad_enabled()
        )


class SupervisedPositions:
    """The positions one head is trained on, with the document, kind and source of each.

    Never empty: a head without a supervised position gets position 0 with IGNORE_INDEX, whose loss and gradients are
    exactly zero, so that the head takes part in every micro-batch (DeepSpeed ZeRO-3 would re-apply stale gradients
    otherwise).
    """

    def __init__(self, positions: torch.Tensor, labels: torch.Tensor, document_of_token: torch.Tensor) -> None:
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


def document_weights(parts: Sequence[tuple[SupervisedPositions, float]], n_documents: int) -> tuple[torch.Tensor, ...]:
    """Weights of the positions of each head, float32 ``[N]``, with which the losses of all heads add up to the sum over
    documents of (weighted loss of the document / its supervised positions).

    ``parts`` holds each head's positions and weight.
    """
    count = torch.zeros(n_documents, dtype=torch.int64, device=parts[0][0].labels.device)
    for positions, _ in parts:
        count.index_add_(0, positions.documents, (positions.labels != IGNORE_INDEX).to(torch.int64))
    share = 1.0 / count.clamp(min=1).float()
    return tuple(weight * share[positions.documents] for positions, weight in parts)


N_KINDS = len(KINDS)
