"""Rows -> PackedBatch: documents laid end to end without a padding token, with everything that attention and the two heads need.

A micro-batch without a document (every one was skipped) becomes one pad token without a label, with empty `provenance`: each rank
still runs the same forward pass, and nothing is learnt from it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from jp_train.config.schema import Packing, RunConfig
from jp_train.types import IGNORE_INDEX, KINDS, PENDING_VQ_ID, EncodedDocument, Kind, PackedBatch, Row


class Collator:
    """Makes PackedBatches of a run; `pad` is the tokenizer's pad id."""

    def __init__(self, cfg: RunConfig, pad: int) -> None:
        self._packing = cfg.data.packing
        self._seq_len = cfg.data.seq_len
        self._image_size = cfg.model.vision.image_size
        self._slots = (cfg.model.vision.image_size // cfg.model.vision.patch_size) ** 2
        self._pad = pad

    def __call__(self, rows: Sequence[Row]) -> PackedBatch:
        """The micro-batch of `rows`, in order. See PackedBatch for shapes. At least one row is required."""
        documents = [document for row in rows for document in row.documents]
        sources = [source for row in rows for source in row.source_indices]
        lengths = [len(document) for document in documents]
        segments = lengths
        if self._packing is Packing.causal:
            segments = [total for row in rows if (total := sum(len(document) for document in row.documents))]
        starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        if documents:
            kinds = [KINDS.index(document.kind) for document in documents]
            input_ids, labels, gen_labels = (
                np.concatenate([getattr(document, name) for document in documents]) for name in ("input_ids", "labels", "gen_labels")
            )
        else:
            lengths = segments = [1]
            sources, kinds = [0], [KINDS.index(Kind.TEXT)]
            input_ids = np.array([self._pad])
            labels = gen_labels = np.array([IGNORE_INDEX])
        und = [(document, start) for document, start in zip(documents, starts, strict=False) if document.und_image is not None]
        gen = [(document, start) for document, start in zip(documents, starts, strict=False) if len(document.gen_slots)]
        pending = [number for number, (document, _) in enumerate(gen) if document.vq_ids is None]
        boundaries = np.concatenate([[0], np.cumsum(segments)])
        return PackedBatch(
            input_ids=_int64(input_ids),
            position_ids=_int64(np.concatenate([np.arange(length) for length in segments])),
            labels=_int64(labels),
            gen_labels=_int64(gen_labels),
            cu_seqlens=torch.from_numpy(boundaries.astype(np.int32)),
            max_seqlen=int(max(segments)),
            und_images=self._images([document.und_image for document, _ in und]),
            und_slots=_int64(_joined([document.und_slots + start for document, start in und])),
            gen_images=self._images([gen[number][0].gen_image for number in pending]),
            gen_pending=_int64(np.array(pending)),
            gen_ids=_int64(self._gen_ids([document for document, _ in gen])),
            gen_slots=_int64(_joined([document.gen_slots + start for document, start in gen])),
            document_lengths=_int64(np.array(lengths)),
            document_kinds=_int64(np.array(kinds)),
            document_sources=_int64(np.array(sources)),
            rows=len(rows),
            seq_len=self._seq_len,
            step=rows[0].step,
            provenance=tuple(row.provenance for row in rows),
            skipped=tuple(skip for row in rows for skip in row.skipped),
            truncated_tokens=sum(row.truncated_tokens for row in rows),
        )

    def _images(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        if not images:
            return torch.zeros((0, 3, self._image_size, self._image_size), dtype=torch.uint8)
        return torch.from_numpy(np.stack(images))

    def _gen_ids(self, documents: Sequence[EncodedDocument]) -> np.ndarray:
        ids = np.full((len(documents), self._slots), PENDING_VQ_ID, np.int64)
        for number, document in enumerate(documents):
            if document.vq_ids is not None:
                ids[number] = document.vq_ids
        return ids


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, np.int64)


def _int64(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array, dtype=np.int64))
