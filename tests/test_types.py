"""The dataclasses that cross module boundaries: what a row holds, and what a batch counts. (Rows that are packed:
tests/data/test_collate.py.)"""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from jp_train.types import IGNORE_INDEX, KINDS, PENDING_VQ_ID, Kind, PackedBatch, Provenance, Row, SourceInfo


def row() -> Row:
    """An understanding document of 5 tokens with its image at 1 and 2, and a generation document of 4 with VQ ids 7
    and 8."""
    ids = np.arange(9)
    labels = np.array([-100, -100, 3, 4, 5, -100, -100, -100, 9])
    gen_labels = np.array([-100] * 5 + [-100, 7, 8, -100])
    kinds = [(Kind.UNDERSTANDING, 5), (Kind.GENERATION, 4)]
    return Row(
        step=2,
        row=1,
        tokens=np.stack([ids, labels, gen_labels]).astype(np.int32),
        image_slots=2,
        image_counts=(1, 1),
        image_starts=(1, 2),
        und_images=torch.full((1, 3, 2, 2), 9, dtype=torch.uint8),
        gen_images=torch.zeros((0, 3, 2, 2), dtype=torch.uint8),
        provenance=tuple(
            Provenance(source="s", shard="s.tar", key=str(kind), kind=kind, start=0, length=length)
            for kind, length in kinds
        ),
        source_indices=(0, 1),
    )


def test_kinds_have_the_order_of_the_papers_ratio_and_read_as_their_names() -> None:
    assert [str(kind) for kind in KINDS] == ["understanding", "text", "generation"]


def test_an_error_message_names_source_shard_and_key() -> None:
    assert str(SourceInfo(source="s", shard="a.tar", key="k")) == "source 's', shard a.tar, key 'k'"


def test_a_row_gives_each_document_its_tokens_slots_and_image() -> None:
    seen, made = row().documents
    assert (len(seen), seen.und_slots.tolist(), seen.gen_slots.tolist(), seen.vq_ids) == (5, [1, 2], [], None)
    assert seen.und_images is not None and seen.und_images.shape == (1, 3, 2, 2) and int(seen.und_images.min()) == 9
    assert (made.input_ids.tolist(), made.gen_slots.tolist(), made.und_images) == ([5, 6, 7, 8], [2, 3], None)
    assert made.vq_ids is not None and made.vq_ids.tolist() == [7, 8], "slot i is predicted at position i - 1"
    assert made.gen_image is None, "ids that are known need no image"


def test_a_row_whose_ids_are_pending_has_the_image_instead() -> None:
    pending = row()
    pending.tokens[2, 6:8] = PENDING_VQ_ID
    object.__setattr__(pending, "gen_images", torch.ones((1, 3, 2, 2), dtype=torch.uint8))
    made = pending.documents[1]
    assert made.vq_ids is None and made.gen_image is not None and int(made.gen_image.sum()) == 12


def test_a_row_is_the_same_after_pickling() -> None:
    sent, received = row(), pickle.loads(pickle.dumps(row()))
    assert received.provenance == sent.provenance and (received.tokens == sent.tokens).all()
    assert torch.equal(received.und_images, sent.und_images)
    assert (received.step, received.row, received.image_starts) == (2, 1, (1, 2))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_batch_counts_the_positions_of_each_head_and_moves_whole(device: str) -> None:
    zeros = torch.zeros(4, dtype=torch.int64)
    labels = torch.tensor([IGNORE_INDEX, 5, 6, IGNORE_INDEX])
    tensors = dict.fromkeys(
        ("input_ids", "position_ids", "cu_seqlens", "und_images", "und_slots", "gen_images", "gen_pending", "gen_ids",
         "gen_slots", "document_lengths", "document_kinds", "document_sources"), zeros
    )  # fmt: skip
    batch = PackedBatch(
        labels=labels, gen_labels=torch.full((4,), IGNORE_INDEX), max_seqlen=4, rows=1, seq_len=4, step=3, **tensors
    )
    assert (batch.supervised_text_tokens, batch.supervised_image_tokens) == (2, 0)
    moved = batch.to(device)
    assert (moved.step, moved.seq_len) == (3, 4)
    assert {getattr(moved, name).device.type for name in (*tensors, "labels", "gen_labels")} == {device}
