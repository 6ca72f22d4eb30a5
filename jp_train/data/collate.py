"""Rows -> PackedBatch: documents laid end to end without a padding token, with everything that attention and the two
heads need.

A micro-batch without a document (every one was skipped) becomes one pad token without a label, with empty `provenance`:
each rank still runs the same forward pass, and nothing is learnt from it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch

from jp_train.config.choices import Packing
from jp_train.config.schema import RunConfig
from jp_train.types import IGNORE_INDEX, KINDS, PENDING_VQ_ID, Kind, PackedBatch, Row


class Collator:
    """Makes PackedBatches of a run; `pad` is the tokenizer's pad id. Images of a micro-batch of one row are not
    copied."""

    def __init__(self, cfg: RunConfig, pad: int) -> None:
        self._packing = cfg.data.packing
        self._seq_len = cfg.data.seq_len
        size = cfg.model.vision.image_size
        self._no_images = torch.zeros((0, 3, size, size), dtype=torch.uint8)
        self._slots = np.arange((cfg.model.vision.image_size // cfg.model.vision.patch_size) ** 2)
        self._counting = np.arange(cfg.data.seq_len)
        self._pad = pad

    def __call__(self, rows: Sequence[Row]) -> PackedBatch:
        """The micro-batch of `rows`, in order. See PackedBatch for shapes. At least one row is required."""
        lengths = [document.length for row in rows for document in row.provenance]
        kinds = [_NUMBER[document.kind] for row in rows for document in row.provenance]
        if lengths:
            sources = [source for row in rows for source in row.source_indices]
            tokens = np.concatenate([row.tokens for row in rows], axis=1, dtype=np.int64)
        else:
            lengths, kinds, sources = [1], [_NUMBER[Kind.TEXT]], [0]
            tokens = np.array([[self._pad], [IGNORE_INDEX], [IGNORE_INDEX]])
        segments = lengths
        if self._packing is Packing.causal:
            segments = [total for row in rows if (total := row.tokens.shape[1])] or lengths
        ends = np.array(list(itertools.accumulate(lengths)))
        kind_numbers = np.array(kinds)
        counts = [count for row in rows for count in row.image_counts] or [0]
        first_slots, of_images = ends - lengths, kind_numbers
        if counts.count(1) < len(counts):  # most often every document has one image
            first_slots, of_images = np.repeat(first_slots, counts), np.repeat(of_images, counts)
        first_slots = first_slots + np.array([start for row in rows for start in row.image_starts], np.int64)
        und_slots = first_slots[of_images == _UNDERSTANDING, None] + self._slots
        gen_slots = first_slots[of_images == _GENERATION, None] + self._slots
        input_ids, labels, gen_labels = tokens
        gen_ids = gen_labels[gen_slots - 1]  # boi predicts the first id, slot i predicts id i + 1
        boundaries = [0, *itertools.accumulate(segments)]
        position_ids = np.empty(boundaries[-1], np.int64)
        for start, length in zip(boundaries, segments, strict=False):
            position_ids[start : start + length] = self._positions(length)
        return PackedBatch(
            input_ids=torch.from_numpy(input_ids),
            position_ids=torch.from_numpy(position_ids),
            labels=torch.from_numpy(labels),
            gen_labels=torch.from_numpy(gen_labels),
            cu_seqlens=torch.from_numpy(np.array(boundaries, np.int32)),
            max_seqlen=max(segments),
            und_images=self._images([row.und_images for row in rows]),
            und_slots=torch.from_numpy(und_slots.reshape(-1)),
            gen_images=self._images([row.gen_images for row in rows]),
            gen_pending=torch.from_numpy((gen_ids[:, 0] == PENDING_VQ_ID).nonzero()[0]),
            gen_ids=torch.from_numpy(gen_ids),
            gen_slots=torch.from_numpy(gen_slots.reshape(-1)),
            document_lengths=torch.from_numpy(np.array(lengths)),
            document_kinds=torch.from_numpy(kind_numbers),
            document_sources=torch.from_numpy(np.array(sources)),
            rows=len(rows),
            seq_len=self._seq_len,
            step=rows[0].step,
            provenance=tuple([row.provenance for row in rows]),
            skipped=tuple([skip for row in rows for skip in row.skipped]),
            truncated_tokens=sum([row.truncated_tokens for row in rows]),
        )

    def _positions(self, length: int) -> np.ndarray:
        if length > len(self._counting):
            self._counting = np.arange(2 * length)
        return self._counting[:length]

    def _images(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        present = [tensor for tensor in images if tensor.shape[0]]
        if not present:
            return self._no_images
        return present[0] if len(present) == 1 else torch.cat(present)


_NUMBER = {kind: number for number, kind in enumerate(KINDS)}
_UNDERSTANDING, _GENERATION = _NUMBER[Kind.UNDERSTANDING], _NUMBER[Kind.GENERATION]
