from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from jp_train.config.schema import Packing
from jp_train.data.collate import Collator
from jp_train.types import (
    IGNORE_INDEX,
    KINDS,
    PENDING_VQ_ID,
    DocumentRef,
    EncodedDocument,
    Kind,
    Provenance,
    Row,
    SkippedDocument,
    SourceInfo,
)
from tests.data.data_samples import IMAGE_SIZE, SLOTS

INFO = SourceInfo(source="s", shard="s.tar", key="k")
NONE = np.zeros(0, np.int64)
PAD = 2


def document(kind: Kind, length: int, first: int, *, vq: bool = False) -> EncodedDocument:
    """Tokens count up from `first`; an image, if any, starts at position 2."""
    ids = np.arange(first, first + length)
    labels = np.where(np.arange(length) % 2, ids, IGNORE_INDEX)
    gen_labels = np.full(length, IGNORE_INDEX)
    image = np.full((3, IMAGE_SIZE, IMAGE_SIZE), first % 256, np.uint8)
    slots = np.arange(2, 2 + SLOTS)
    vq_ids = (np.arange(SLOTS) + first % 7).astype(np.uint16) if vq else None
    if kind is Kind.GENERATION:
        labels = np.full(length, IGNORE_INDEX)
        gen_labels[slots - 1] = vq_ids if vq else PENDING_VQ_ID
    return EncodedDocument(
        info=INFO,
        kind=kind,
        input_ids=ids,
        labels=labels,
        gen_labels=gen_labels,
        und_slots=slots if kind is Kind.UNDERSTANDING else NONE,
        gen_slots=slots if kind is Kind.GENERATION else NONE,
        und_images=image[None] if kind is Kind.UNDERSTANDING else None,
        gen_image=image if kind is Kind.GENERATION and not vq else None,
        vq_ids=vq_ids,
    )


def pictures(images) -> torch.Tensor:
    present = [torch.from_numpy(image) for image in images if image is not None]
    return torch.stack(present) if present else torch.zeros((0, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)


def row(number: int, *documents: EncodedDocument, skipped: int = 0, truncated: int = 0) -> Row:
    provenance = tuple(
        Provenance(source="s", shard="s.tar", key=f"{number}-{i}", kind=d.kind, start=0, length=len(d))
        for i, d in enumerate(documents)
    )
    ref = DocumentRef(source=0, epoch=0, sample=0, start=0, length=5)
    return Row(
        step=3,
        row=number,
        tokens=np.concatenate([np.stack([d.input_ids, d.labels, d.gen_labels]) for d in documents], axis=1).astype(
            np.int32
        )
        if documents
        else np.zeros((3, 0), np.int32),
        image_slots=SLOTS,
        image_counts=tuple(int(len(d.und_slots) + len(d.gen_slots) > 0) for d in documents),
        image_starts=tuple(int((*d.und_slots, *d.gen_slots)[0]) for d in documents if d.kind is not Kind.TEXT),
        und_images=pictures(None if d.und_images is None else d.und_images[0] for d in documents),
        gen_images=pictures(d.gen_image for d in documents),
        provenance=provenance,
        source_indices=tuple(range(len(documents))),
        skipped=(SkippedDocument(info=INFO, ref=ref, reason="bad"),) * skipped,
        truncated_tokens=truncated,
    )


@pytest.fixture
def rows() -> list[Row]:
    text = document(Kind.TEXT, 5, 100)
    return [
        row(0, document(Kind.UNDERSTANDING, 20, 0), text, document(Kind.GENERATION, 19, 200)),
        row(1, skipped=2),
        row(
            2,
            document(Kind.GENERATION, 21, 300, vq=True),
            document(Kind.UNDERSTANDING, 22, 400),
            document(Kind.GENERATION, 18, 500),
        ),
    ]


def test_documents_lie_end_to_end_and_positions_restart(cfg, rows):
    batch = Collator(cfg, PAD)(rows)
    documents = [d for r in rows for d in r.documents]
    lengths = [20, 5, 19, 21, 22, 18]
    assert batch.document_lengths.tolist() == lengths
    assert batch.input_ids.tolist() == np.concatenate([d.input_ids for d in documents]).tolist()
    assert batch.labels.tolist() == np.concatenate([d.labels for d in documents]).tolist()
    assert batch.gen_labels.tolist() == np.concatenate([d.gen_labels for d in documents]).tolist()
    assert batch.position_ids.tolist() == [p for length in lengths for p in range(length)]
    assert batch.cu_seqlens.tolist() == [0, 20, 25, 44, 65, 87, 105] and batch.cu_seqlens.dtype == torch.int32
    assert batch.max_seqlen == 22 and type(batch.max_seqlen) is int
    assert [KINDS[k] for k in batch.document_kinds] == [d.kind for d in documents]
    assert batch.document_sources.tolist() == [0, 1, 2, 0, 1, 2]
    assert (batch.rows, batch.step, batch.seq_len) == (3, 3, 256)
    assert [len(p) for p in batch.provenance] == [3, 0, 3] and len(batch.skipped) == 2


def test_slots_point_at_the_image_tokens_of_their_documents(cfg, rows):
    batch = Collator(cfg, PAD)(rows)
    assert batch.input_ids[batch.und_slots].view(2, SLOTS)[:, 0].tolist() == [2, 402]
    assert batch.input_ids[batch.gen_slots].view(3, SLOTS)[:, -1].tolist() == [201 + SLOTS, 301 + SLOTS, 501 + SLOTS]
    assert batch.und_images.dtype == torch.uint8 and batch.und_images[:, 0, 0, 0].tolist() == [0, 400 % 256]
    assert batch.gen_pending.tolist() == [0, 2]
    assert batch.gen_images[:, 0, 0, 0].tolist() == [200, 500 % 256]
    assert batch.gen_ids[1].tolist() == list(range(300 % 7, 300 % 7 + SLOTS))
    assert (batch.gen_ids[[0, 2]] == PENDING_VQ_ID).all()
    # what a slot's predecessor must predict is the id embedded in the slot
    assert batch.gen_labels[batch.gen_slots - 1].view(3, SLOTS).tolist() == batch.gen_ids.tolist()


def test_with_causal_packing_a_row_is_one_segment(cfg, rows):
    cfg.data.packing = Packing.causal
    batch = Collator(cfg, PAD)(rows)
    assert batch.cu_seqlens.tolist() == [0, 44, 105] and batch.max_seqlen == 61
    assert batch.position_ids.tolist() == [*range(44), *range(61)]
    assert len(batch.document_lengths) == 6


@pytest.mark.parametrize("packing", list(Packing))
def test_a_batch_without_documents_is_one_unsupervised_pad_token(cfg, packing):
    cfg.data.packing = packing
    batch = Collator(cfg, PAD)([row(0, skipped=1), row(1)])
    assert batch.input_ids.tolist() == [PAD] and batch.position_ids.tolist() == [0]
    assert batch.cu_seqlens.tolist() == [0, 1] and batch.max_seqlen == 1
    assert batch.supervised_text_tokens == batch.supervised_image_tokens == 0
    assert batch.und_images.shape == batch.gen_images.shape == (0, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert batch.gen_ids.shape == (0, SLOTS)
    for name in ("und_slots", "gen_slots", "gen_pending"):
        assert getattr(batch, name).shape == (0,) and getattr(batch, name).dtype == torch.int64
    assert batch.document_lengths.tolist() == [1] and batch.provenance == ((), ())


def test_counts_are_sums_over_the_rows(cfg, rows):
    batch = Collator(cfg, PAD)([*rows, row(3, document(Kind.TEXT, 4, 7), truncated=11)])
    assert batch.supervised_image_tokens == 3 * SLOTS
    assert batch.supervised_text_tokens == sum(int((d.labels >= 0).sum()) for r in rows for d in r.documents) + 2
    assert batch.truncated_tokens == 11


def test_a_row_gives_its_documents_back_and_survives_pickling(rows):
    whole = [
        document(Kind.UNDERSTANDING, 20, 0),
        document(Kind.TEXT, 5, 100),
        document(Kind.GENERATION, 19, 200),
        document(Kind.GENERATION, 21, 300, vq=True),
    ]
    packed = row(0, *whole, skipped=1, truncated=4)
    for copy in (packed, pickle.loads(pickle.dumps(packed))):
        assert (copy.step, copy.row, copy.truncated_tokens) == (3, 0, 4)
        assert (
            copy.provenance == packed.provenance
            and copy.skipped == packed.skipped
            and copy.source_indices == packed.source_indices
        )
        for made, given in zip(copy.documents, whole, strict=True):
            assert made.kind is given.kind
            for name in (
                "input_ids",
                "labels",
                "gen_labels",
                "und_slots",
                "gen_slots",
                "und_images",
                "gen_image",
                "vq_ids",
            ):
                actual, expected = getattr(made, name), getattr(given, name)
                assert (actual is None) == (expected is None), name
                if expected is not None:
                    np.testing.assert_array_equal(actual, expected, err_msg=name)


def test_the_pictures_of_a_micro_batch_of_one_row_are_not_copied(cfg, rows):
    batch = Collator(cfg, PAD)(rows[:1])
    assert batch.und_images.data_ptr() == rows[0].und_images.data_ptr()
    assert batch.gen_images.data_ptr() == rows[0].gen_images.data_ptr()
