"""What a row holds, in words and numbers, and a micro-batch as a file: the format of `data explain` and of the dumps of
a bad step.

A described row is made of plain values only (JSON-able):

    step               as metrics.jsonl and wandb count: the optimizer step, from 1, that the row belongs to (plan step
                       + 1)
    row                number of the row within the step
    tokens, seq_len    tokens in the row, and how many it could hold; fill = tokens / seq_len
    supervised         {"text": n, "image": n}: positions that each head is trained on
    truncated_tokens   tokens lost because a document was longer than a row may be (None: not known from the batch
                       alone)
    documents          in the order they are laid out, each:
        source, shard, key, kind
        document_span  [a, b): the tokens of the whole document that lie here
        row_span       [a, b): where they lie in the row; position_ids restart at a (at the row's start with
                       data.packing causal)
        begun_before, goes_on
                       whether an earlier / a later row holds the start / the rest of this text
        truncated      tokens of this document that no row holds (None: not known from the batch alone)
        image_slots    {"understanding": [[a, b), ...], "generation": [[a, b), ...]} of the row
        loss           {"text": {"tokens": n, "spans": [[a, b), ...]}, "image": ...}: positions of the row that carry a
                       label, by head;
                       position i is trained to predict token i + 1
        condition_dropped
                       whether its caption was (data.pad_dropout); only with a tokenizer, as is
        snippet        a line of its text
    skipped            documents whose place in the row is empty, each: source, shard, key, document_span, reason

`a` and `b` count tokens from 0, `b` is excluded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from jp_train.data.batch_text import snippet
from jp_train.data.tokenizer import Tokenizer
from jp_train.errors import DataError
from jp_train.files import write_atomically
from jp_train.types import (
    IGNORE_INDEX,
    DocumentRef,
    Kind,
    PackedBatch,
    Provenance,
    RowSpec,
    SkippedDocument,
    SourceInfo,
)

_NUMBERS = ("step", "rows", "seq_len", "max_seqlen", "truncated_tokens")
BATCH_FORMAT = 1
HEADS = {"text": "labels", "image": "gen_labels"}


def describe_batch(
    batch: PackedBatch, tokenizer: Tokenizer | None = None, *, first_row: int = 0, specs: Sequence[RowSpec] = ()
) -> list[dict[str, Any]]:
    """Every row of a micro-batch, described; see the module's docstring. The batch may lie on any device, before or
    after VQ encoding.

    `first_row`: number within the step of the batch's first row. `specs`: the plan's RowSpecs of the rows. They hold
    what the batch does not: truncated tokens of each document, and the row that a skipped document belongs to. Without
    them, the skipped documents of a batch are listed with its first row.
    """
    if specs and len(specs) != batch.rows:
        raise ValueError(f"the batch has {batch.rows} rows, got {len(specs)} specs")
    arrays = {
        name: getattr(batch, name).cpu().numpy() for name in ("input_ids", "und_slots", "gen_slots", *HEADS.values())
    }
    described = []
    start = 0
    for number, provenance in enumerate(batch.provenance):
        end = start + sum(document.length for document in provenance)
        inside = {name: arrays[name][start:end] for name in ("input_ids", *HEADS.values())}
        for name in ("und_slots", "gen_slots"):
            slots = arrays[name]
            inside[name] = slots[(slots >= start) & (slots < end)] - start
        spec = specs[number] if specs else None
        if spec is not None:
            skipped = [skip for skip in batch.skipped if skip.ref in spec.documents]
        else:
            skipped = list(batch.skipped) if number == 0 else []
        described.append(
            _described(
                inside,
                provenance,
                skipped,
                spec,
                step=batch.step + 1,
                row=first_row + number,
                seq_len=batch.seq_len,
                truncated=batch.truncated_tokens if batch.rows == 1 else None,
                tokenizer=tokenizer,
            )
        )
        start = end
    return described


def _described(
    arrays: dict[str, np.ndarray],
    provenance: Sequence[Provenance],
    skipped: Sequence[SkippedDocument],
    spec: RowSpec | None,
    *,
    step: int,
    row: int,
    seq_len: int,
    truncated: int | None,
    tokenizer: Tokenizer | None,
) -> dict[str, Any]:
    supervised = {head: arrays[name] != IGNORE_INDEX for head, name in HEADS.items()}
    refs = [ref for ref in spec.documents if all(ref != skip.ref for skip in skipped)] if spec is not None else []
    documents = []
    start = 0
    for number, document in enumerate(provenance):
        end = start + document.length
        loss = {head: _loss(mask[start:end], start) for head, mask in supervised.items()}
        entry = {
            "source": document.source,
            "shard": document.shard,
            "key": document.key,
            "kind": str(document.kind),
            "document_span": [document.start, document.start + document.length],
            "row_span": [start, end],
            "begun_before": document.start > 0,
            # Only a cut text has a label at its last token: that of the token after the cut.
            "goes_on": bool(document.kind is Kind.TEXT and supervised["text"][end - 1]),
            "truncated": refs[number].truncated if refs else None,
            "image_slots": {
                kind: _spans(slots[(slots >= start) & (slots < end)])
                for kind, slots in (("understanding", arrays["und_slots"]), ("generation", arrays["gen_slots"]))
            },
            "loss": loss,
        }
        if tokenizer is not None:
            ids = arrays["input_ids"][start:end]
            pads = bool((ids == tokenizer.special.pad).any())  # pads stand for nothing else within a document
            entry["condition_dropped"] = document.kind is Kind.GENERATION and pads
            entry["snippet"] = snippet(ids.tolist(), tokenizer)
        documents.append(entry)
        start = end
    return {
        "step": step,
        "row": row,
        "tokens": start,
        "seq_len": seq_len,
        "fill": start / seq_len,
        "supervised": {head: int(mask.sum()) for head, mask in supervised.items()},
        "truncated_tokens": sum(ref.truncated for ref in refs) if spec is not None else truncated,
        "documents": documents,
        "skipped": [describe_skipped(skip) for skip in skipped],
    }


def describe_skipped(skip: SkippedDocument) -> dict[str, Any]:
    """A document that left its place in the row empty."""
    info, ref = skip.info, skip.ref
    return {
        "source": info.source,
        "shard": info.shard,
        "key": info.key,
        "document_span": [ref.start, ref.start + ref.length],
        "reason": skip.reason,
    }


def _loss(mask: np.ndarray, start: int) -> dict[str, Any]:
    positions = np.flatnonzero(mask)
    return {"tokens": len(positions), "spans": _spans(positions + start)}


def _spans(positions: np.ndarray) -> list[list[int]]:
    """Ascending integers as [first, last + 1] of each run of neighbours."""
    if not len(positions):
        return []
    breaks = np.flatnonzero(np.diff(positions) != 1)
    firsts, lasts = positions[np.concatenate([[0], breaks + 1])], positions[np.concatenate([breaks, [-1]])]
    return [[int(first), int(last) + 1] for first, last in zip(firsts, lasts, strict=True)]


# -- a micro-batch as a file -----------------------------------------------------------------------


def sidecar_of(path: Path) -> Path:
    """`x.safetensors` -> `x.json`."""
    return path.with_suffix(".json")


def save_batch(batch: PackedBatch, path: str | Path) -> Path:
    """Write a micro-batch bit for bit: its tensors to `path` (.safetensors), everything else to the JSON file beside
    it. Returns `path`.

    Both are replaced whole, the JSON last; it holds the tensors' SHA-256, so that `load_batch` never pairs files of two
    batches. Raises DataError when they cannot be written.
    """
    path = Path(path)
    tensors = {name: getattr(batch, name).cpu().contiguous() for name in _tensor_fields()}
    data = save(tensors)
    sidecar = {
        "format": BATCH_FORMAT,
        "tensors_sha256": hashlib.sha256(data).hexdigest(),
        **{name: getattr(batch, name) for name in _NUMBERS},
        "provenance": [
            [asdict(document) | {"kind": str(document.kind)} for document in row] for row in batch.provenance
        ],
        "skipped": [asdict(skip) for skip in batch.skipped],
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
        write_atomically(sidecar_of(path), json.dumps(sidecar, indent=1) + "\n")
    except OSError as error:
        raise DataError(f"cannot write the batch to {path}: {error}; give another place") from error
    return path


def load_batch(path: str | Path) -> PackedBatch:
    """The micro-batch that `save_batch` wrote, equal in every tensor and field.

    Raises DataError when a file is missing, damaged, or the two do not belong together.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        sidecar = json.loads(sidecar_of(path).read_text(encoding="ascii"))
        if sidecar["format"] != BATCH_FORMAT:
            raise DataError(
                f"{sidecar_of(path)} has format {sidecar['format']!r}, this program reads format {BATCH_FORMAT}"
            )
        if hashlib.sha256(data).hexdigest() != sidecar["tensors_sha256"]:
            raise DataError(f"{path} is not the file that {sidecar_of(path)} was written with: save the batch again")
        tensors = load(data)
        fields: dict[str, Any] = {name: tensors[name] for name in _tensor_fields()}
        fields |= {name: int(sidecar[name]) for name in _NUMBERS}
        return PackedBatch(
            **fields,
            provenance=tuple(tuple(_provenance(document) for document in row) for row in sidecar["provenance"]),
            skipped=tuple(
                SkippedDocument(info=SourceInfo(**skip["info"]), ref=DocumentRef(**skip["ref"]), reason=skip["reason"])
                for skip in sidecar["skipped"]
            ),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise DataError(
            f"{path} and {sidecar_of(path).name} beside it are not a saved batch ({type(error).__name__}: {error}); "
            "save it again"
        ) from error


def _provenance(saved: dict[str, Any]) -> Provenance:
    return Provenance(**{**saved, "kind": Kind(saved["kind"])})


def _tensor_fields() -> list[str]:
    return [name for name, kind in PackedBatch.__annotations__.items() if kind in (torch.Tensor, "torch.Tensor")]
