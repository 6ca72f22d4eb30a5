"""The loss of a step as a sum over its micro-batches: each contributes sums divided by numbers that every rank knows
before the first backward.

So the update does not depend on how rows are spread over ranks and accumulation steps (a mean per micro-batch is off by
9% in gradient norm on unequal rows: docs/zero3.md, rule 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from jp_train.config.choices import Reduction
from jp_train.config.schema import LossConfig
from jp_train.types import IGNORE_INDEX, LossTerms, PackedBatch


@dataclass(frozen=True)
class SupervisedTotals:
    """Supervised positions of one step over all ranks and micro-batches: per head, and documents that have at least
    one."""

    text_tokens: int
    image_tokens: int
    documents: int


def count_supervised(batches: Sequence[PackedBatch]) -> SupervisedTotals:
    """This rank's share of the totals, from labels alone (pending VQ ids count: their images are supervised)."""
    return SupervisedTotals(
        text_tokens=sum(batch.supervised_text_tokens for batch in batches),
        image_tokens=sum(batch.supervised_image_tokens for batch in batches),
        documents=sum(_supervised_documents(batch) for batch in batches),
    )


def micro_batch_loss(terms: LossTerms, totals: SupervisedTotals, cfg: LossConfig) -> torch.Tensor:
    """One micro-batch's contribution: the contributions of all micro-batches of all ranks add up to the step's loss
    (nats).

    `token_mean`: (w_text sum_text + w_image sum_image) / all supervised tokens; `task_mean`: a mean per head, weighted
    and added; `sample_mean`: the mean over supervised documents of their (weighted) mean, computed in the model.
    """
    if cfg.reduction is Reduction.sample_mean:
        assert terms.document_mean_sum is not None, (
            "the model computes document_mean_sum for loss.reduction: sample_mean"
        )
        return terms.document_mean_sum / max(1, totals.documents)
    if cfg.reduction is Reduction.task_mean:
        text, image = max(1, totals.text_tokens), max(1, totals.image_tokens)
    else:
        text = image = max(1, totals.text_tokens + totals.image_tokens)
    return cfg.text_weight * terms.text_sum / text + cfg.image_weight * terms.image_sum / image


def _supervised_documents(batch: PackedBatch) -> int:
    supervised = ((batch.labels != IGNORE_INDEX) | (batch.gen_labels != IGNORE_INDEX)).cumsum(0)
    if not len(supervised):
        return 0
    up_to = torch.cat((supervised.new_zeros(1), supervised[batch.document_lengths.cumsum(0) - 1]))
    return int((up_to[1:] > up_to[:-1]).sum())
