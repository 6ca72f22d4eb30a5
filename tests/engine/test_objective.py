"""Losses normalised over the whole step, whatever the split into ranks and micro-batches."""

from __future__ import annotations

import pytest
import torch

from jp_train.config.schema import LossConfig, Reduction
from jp_train.engine.objective import SupervisedTotals, count_supervised, micro_batch_loss
from jp_train.types import IGNORE_INDEX, Kind, LossTerms
from tests.model.janus_tiny import pack, random_docs, tiny_model

ZERO = torch.zeros(3)


def terms(text: float, image: float, document_mean: float | None = None) -> LossTerms:
    return LossTerms(
        text_sum=torch.tensor(text),
        image_sum=torch.tensor(image),
        text_tokens=1,
        image_tokens=1,
        kind_sums=ZERO,
        kind_tokens=ZERO.long(),
        source_sums=ZERO,
        source_tokens=ZERO.long(),
        document_mean_sum=None if document_mean is None else torch.tensor(document_mean),
    )


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [(Reduction.token_mean, (2 * 6.0 + 3 * 8.0) / 10), (Reduction.task_mean, 2 * 6.0 / 6 + 3 * 8.0 / 4)],
)
def test_reductions_by_hand(reduction, expected):
    cfg = LossConfig(reduction=reduction, text_weight=2.0, image_weight=3.0)
    assert float(micro_batch_loss(terms(6.0, 8.0), SupervisedTotals(6, 4, 3), cfg)) == pytest.approx(expected)


def test_sample_mean_divides_by_supervised_documents():
    cfg = LossConfig(reduction=Reduction.sample_mean)
    assert float(micro_batch_loss(terms(1.0, 1.0, 9.0), SupervisedTotals(6, 4, 3), cfg)) == 3.0


def test_a_step_without_any_supervised_token_gives_zero_not_nan():
    for reduction in Reduction:
        assert (
            float(micro_batch_loss(terms(0.0, 0.0, 0.0), SupervisedTotals(0, 0, 0), LossConfig(reduction=reduction)))
            == 0.0
        )


def test_counts_see_both_heads_and_documents_without_a_label():
    docs = random_docs(3, [Kind.TEXT, Kind.GENERATION, Kind.UNDERSTANDING, Kind.TEXT])
    docs[3].labels = [IGNORE_INDEX] * len(docs[3].labels)
    batch = pack(docs)
    found = count_supervised([batch, pack([])])
    labels = sum(label != IGNORE_INDEX for doc in docs for label in doc.labels)
    images = sum(label != IGNORE_INDEX for doc in docs for label in doc.gen_labels)
    assert found == SupervisedTotals(labels, images, 3)


@pytest.mark.parametrize("reduction", list(Reduction))
def test_splitting_the_rows_changes_neither_loss_nor_gradient(reduction):
    cfg = LossConfig(reduction=reduction, text_weight=0.5, chunk_tokens=7)
    model = tiny_model(loss=cfg)
    docs = random_docs(5, [Kind.TEXT, Kind.GENERATION, Kind.UNDERSTANDING, Kind.TEXT, Kind.GENERATION])

    def gradients(splits: list[list]) -> tuple[float, list[torch.Tensor]]:
        batches = [pack(part) for part in splits]
        totals = count_supervised(batches)
        model.zero_grad(set_to_none=True)
        losses = [micro_batch_loss(model(batch), totals, cfg) for batch in batches]
        for loss in losses:
            loss.backward()
        return sum(float(loss) for loss in losses), [p.grad.clone() for p in model.parameters()]

    whole, split = gradients([docs]), gradients([docs[:1], docs[1:4], docs[4:]])
    assert split[0] == pytest.approx(whole[0], rel=1e-5)
    for one, other in zip(whole[1], split[1], strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)
