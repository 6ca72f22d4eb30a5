"""`jp-train data inspect`: packed rows of a step as one HTML page, with their images decoded where a VQ tokenizer is
at hand.

The page's writer (`tools/inspect/page.py`) knows nothing of models; here its rows are rebuilt, the VQ's weights found,
and the report's style put underneath, so that both pages look alike.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jp_train.config import RunConfig
from jp_train.config.schema import InitPartsConfig
from jp_train.data.batch_file import describe_batch
from jp_train.errors import CheckpointError, ConfigError, DataError
from jp_train.files import write_atomically
from jp_train.model.pretrained import load_vq
from jp_train.model.vq import VQTokenizer
from jp_train.tools.explain.replay import MicroBatch, Replay
from jp_train.tools.inspect.images import ShownImage
from jp_train.tools.inspect.page import inspect_page
from jp_train.tools.inspect.row import InspectedRow
from jp_train.types import EncodedDocument, Row, RowSpec


@dataclass(frozen=True, slots=True)
class PageSummary:
    """What was written: where, its size in bytes, rows, images, and where the VQ's weights came from (None: ids
    are not decoded)."""

    path: str
    bytes: int
    rows: int
    pictures: int
    vq: str | None


def inspect_rows(
    replay: Replay, step: int, *, rows: int, out: Path, model: Path | None = None, where: str = ""
) -> PageSummary:
    """Write the page of the first `rows` rows of an optimizer step (numbers as in metrics.jsonl) to `out`.

    `model`: a model, exported or released, whose VQ decodes the ids; None: what the configuration starts from, if it
    names weights and they are there. `where` names the configuration or run on the page.

    Raises:
        ConfigError: for a step, or a number of rows, that does not exist, or an `out` that is not .html.
        CheckpointError: when `model` is given and holds no VQ that fits.
        DataError: for unreadable data, or when `out` cannot be written.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--out {out}: give a file name that ends with .html")
    if rows < 1:
        raise ConfigError(f"--rows {rows}: show at least one row")
    cfg = replay.cfg
    vq, origin, missing = _vq(cfg, model)
    shown: list[InspectedRow] = []
    numbers = range(min(rows, replay.rows_per_step))
    for micro in replay.micro_batches(step, numbers):
        shown += [row for row in _inspected(micro, replay, vq) if row.described["row"] in numbers]
    notes = list(replay.notes)
    notes.append(f"VQ ids decoded with the weights of {origin}." if origin else missing)
    page = inspect_page(
        shown,
        title=f"Rows of step {step:,}",
        about=f"{where} · rows 0 to {numbers[-1]} of {replay.rows_per_step}, {cfg.data.seq_len:,} tokens each · "
        f"plan step {step - 1:,}, seed {cfg.seed}",
        sources={name: source.kind.value for name, source in cfg.data.sources.items()},
        tokenizer=replay.tokenizer,
        notes=notes,
    )
    data = page.encode("utf-8")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, data, writer=str(os.getpid()))
    except OSError as error:
        raise DataError(f"cannot write {out}: {error}; give another place with --out") from error
    image_count = sum(len(images) for row in shown for images in row.images.values())
    return PageSummary(str(out), len(data), len(shown), image_count, origin)


def _inspected(micro: MicroBatch, replay: Replay, vq: VQTokenizer | None) -> list[InspectedRow]:
    """The rows of a micro-batch for the page."""
    batch = micro.batch
    rows = []
    start = 0
    described_rows = describe_batch(batch, replay.tokenizer, first_row=micro.first_row, specs=micro.specs)
    for described, row, spec in zip(described_rows, micro.rows, micro.specs, strict=True):
        end = start + described["tokens"]
        tensors = {name: getattr(batch, name)[start:end].numpy() for name in ("input_ids", "position_ids", "labels")}
        start = end
        shown_images: dict[int, list[ShownImage]] = {}
        ids: dict[int, np.ndarray] = {}
        read = _read_images(replay, row, spec)
        for place, document in enumerate(row.documents):
            images, vq_ids = _images(document, read.get(place), vq)
            if images:
                shown_images[place] = images
            if vq_ids is not None:
                ids[place] = vq_ids
        rows.append(InspectedRow(described=described, images=shown_images, vq_ids=ids, **tensors))
    return rows


def _read_images(replay: Replay, row: Row, spec: RowSpec) -> dict[int, np.ndarray]:
    """The images of a row's documents that training takes from stored VQ ids, by document number, where the shards
    hold them."""
    stored = [place for place, document in enumerate(row.documents) if document.vq_ids is not None]
    if not stored:
        return {}
    again = replay.with_images(spec)
    by_place = {of: document.gen_image for of, document in zip(again.provenance, again.documents, strict=True)}
    return {place: image for place in stored if (image := by_place.get(row.provenance[place])) is not None}


def _images(
    document: EncodedDocument, read: np.ndarray | None, vq: VQTokenizer | None
) -> tuple[list[ShownImage], np.ndarray | None]:
    """What a document shows, and its VQ ids where they are stored or can be computed. `read`: the image that
    stored ids stand for."""
    if document.und_images is not None:
        return [
            ShownImage(pixels=pixels, title="as the vision encoder sees it") for pixels in document.und_images
        ], None
    if not len(document.gen_slots):
        return [], None
    shown = []
    ids = document.vq_ids
    if document.gen_image is not None:
        shown.append(ShownImage(pixels=document.gen_image, title="the image to generate"))
        if vq is not None:
            ids = vq.encode(torch.from_numpy(document.gen_image[None].copy()))[0].numpy()
    elif read is not None:
        shown.append(ShownImage(pixels=read, title="the image to generate; training takes its stored VQ ids"))
    if vq is not None and ids is not None:
        decoded = vq.decode(torch.from_numpy(np.array(ids, np.int64)[None]))[0].numpy()
        what = (
            "through the VQ and back: what its ids can hold"
            if document.gen_image is not None
            else "decoded from the stored VQ ids"
        )
        shown.append(ShownImage(pixels=decoded, title=what))
    return shown, None if ids is None else np.asarray(ids, np.int64)


def _vq(cfg: RunConfig, model: Path | None) -> tuple[VQTokenizer | None, str | None, str]:
    """The VQ tokenizer, where its weights came from, and, when there is none, why."""
    settings = cfg.model if model is None else replace(cfg.model, init_from=str(model), init_parts=InitPartsConfig())
    path = settings.init_from or settings.init_parts.gen_vision_model
    if not path:
        return (
            None,
            None,
            "Images to generate are not shown as VQ ids: the configuration names no weights; give a model with "
            "--model DIR.",
        )
    try:
        return load_vq(settings, seed=cfg.seed), path, ""
    except CheckpointError as error:
        if model is not None:
            raise
        return None, None, f"Images to generate are not shown as VQ ids: {error}. Give a model with --model DIR."


def describe_page(page: PageSummary) -> str:
    """One line for the terminal."""
    return f"wrote {page.path}: {page.rows} rows, {page.pictures} images, {page.bytes / 1e6:.2f} MB"


def place_of(config: Path | None, run_dir: Path | None) -> str:
    """How the page names what was inspected."""
    return " · ".join(str(part) for part in (config, run_dir) if part is not None)


def as_json(page: PageSummary, notes: Sequence[str]) -> dict[str, Any]:
    """The summary as one JSON-able object."""
    return {name: getattr(page, name) for name in PageSummary.__slots__} | {"notes": list(notes)}
