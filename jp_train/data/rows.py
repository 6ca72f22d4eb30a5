"""RowSpec -> Row: what a loader worker does. Stateless: the same RowSpec gives the same Row in any process.

A row is built as a whole: all its texts are tokenised in one call, all tokens are written into one array, and images
are decoded straight into one tensor per role, which lies in shared memory where the row goes to another process.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from jp_train.config.choices import PadDropoutForm
from jp_train.config.schema import RunConfig
from jp_train.data.encode import Draft, Encoder, check_length
from jp_train.data.image_threads import ImageThreads
from jp_train.data.index import SourceLocator
from jp_train.data.sample_reader import SampleReader, ShardTable
from jp_train.data.samples import Sample, parse_sample
from jp_train.data.tokenizer import Tokenizer
from jp_train.errors import DataError, SkipSample
from jp_train.types import IGNORE_INDEX, DocumentRef, Kind, Provenance, Row, RowSpec, SkippedDocument


class RowBuilder:
    """Reads, decodes, encodes and cuts the documents of a row.

    `held_out` turns every random choice off, for validation; `shared_images` puts images into shared memory. One
    per process; what is sent to a worker is small (no per-sample array).
    """

    def __init__(
        self,
        cfg: RunConfig,
        locators: Sequence[SourceLocator],
        tokenizer: Tokenizer,
        *,
        held_out: bool = False,
        shared_images: bool = False,
    ) -> None:
        self._cfg = cfg
        self._locators = tuple(locators)
        self._tokenizer = tokenizer
        self._held_out, self._shared = held_out, shared_images
        self._encoder = Encoder(cfg, tokenizer)
        self._samples = SampleReader(self._locators, cfg.data.crop, cfg.data.io_retries)
        self._threads = ImageThreads(cfg.data.image_threads)
        size = self._encoder.image_size
        self._no_images = torch.zeros((0, 3, size, size), dtype=torch.uint8)
        self._length_may_change = not held_out and cfg.data.pad_dropout_form is not PadDropoutForm.every_token

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (self._cfg, self._locators, self._tokenizer, self._held_out, self._shared))

    def build(self, spec: RowSpec) -> Row:
        """The row that `spec` names; an unusable document leaves its place empty and is listed in `skipped`.

        Raises:
            DataError: when a shard cannot be read, or the index does not describe it.
        """
        skipped: dict[int, SkippedDocument] = {}
        documents = self._drafted(spec, skipped)
        und_images = self._images(documents, Kind.UNDERSTANDING, skipped)
        gen_images = self._images(documents, Kind.GENERATION, skipped)
        documents = [document for document in documents if document.place not in skipped]
        tokens = np.full((3, sum(document.ref.length for document in documents)), IGNORE_INDEX, np.int32)
        at = 0
        for document in documents:
            end = at + document.ref.length
            if document.tokens is not None:
                tokens[:, at:end] = document.tokens
            else:
                assert document.draft is not None
                self._encoder.write(document.draft, tokens[:, at:end])
            at = end
        return Row(
            step=spec.step,
            row=spec.row,
            tokens=tokens,
            image_slots=self._encoder.image_slots,
            image_counts=tuple([len(document.image_starts) for document in documents]),
            image_starts=tuple([start for document in documents for start in document.image_starts]),
            und_images=und_images,
            gen_images=gen_images,
            provenance=tuple([document.provenance() for document in documents]),
            source_indices=tuple([document.ref.source for document in documents]),
            skipped=tuple([skip for _, skip in sorted(skipped.items())]),
            truncated_tokens=sum([document.ref.truncated for document in documents]),
        )

    def describe(self, ref: DocumentRef) -> str:
        """Source, shard and key of a reference, for messages; never raises."""
        return self._samples.describe(ref)

    def close(self) -> None:
        """Close the shards, end the threads."""
        self._threads.close()
        self._samples.close()

    def _drafted(self, spec: RowSpec, skipped: dict[int, SkippedDocument]) -> list[_Document]:
        """The documents of the row whose texts are usable, each as long as the plan says; others go to `skipped`."""
        encoder = self._encoder
        documents: list[_Document] = []
        draws: list[tuple[Sample, bool, bool]] = []
        for place, ref in enumerate(spec.documents):
            table, entries = self._samples.find(ref)
            locator = self._locators[ref.source]
            variant = 0
            if len(entries) > 1 and not self._held_out:
                variant = encoder.variant(locator.name, ref.epoch, ref.sample, len(entries))
            entry = entries[variant]
            try:
                raw = self._samples.read(ref, table, entry)
                sample = parse_sample(
                    raw,
                    locator.fields,
                    image_slots=encoder.image_slots,
                    codebook_size=encoder.codebook_size,
                    variant=variant,
                )
            except SkipSample as reason:
                skipped[place] = SkippedDocument(
                    info=self._samples.info(ref, table, entry), ref=ref, reason=str(reason)
                )
                continue
            generation = locator.kind is Kind.GENERATION
            dropped = generation and not self._held_out and encoder.drops_condition(locator.name, ref.epoch, ref.sample)
            draws.append((sample, generation and ref.short_caption and not self._held_out, dropped))
            documents.append(
                _Document(place, ref, table, self._expected(ref, table, entry, dropped), sample, locator.kind)
            )
        for document, draft in zip(documents, encoder.draft_many(draws), strict=True):
            try:
                self._settle(document, draft)
            except SkipSample as reason:
                skipped[document.place] = document.skip(reason)
        return documents

    def _expected(self, ref: DocumentRef, table: ShardTable, entry: int, dropped: bool) -> int:
        """The length that the index counted for these draws."""
        tokens = table.tokens
        if dropped and self._length_may_change:
            return int((tokens.short_dropped_tokens if ref.short_caption else tokens.dropped_tokens)[entry])
        return int((tokens.short_tokens if ref.short_caption else tokens.tokens)[entry])

    def _settle(self, document: _Document, draft: Draft) -> None:
        """Check a document against index and plan; truncate or cut it to its span."""
        ref, expected = document.ref, document.expected
        check_length(draft, expected)
        document.draft, document.image_starts = draft, draft.image_starts
        if ref.start == 0 and ref.length == expected:
            return
        if ref.start == 0 and ref.length + ref.truncated == expected:
            document.tokens, document.image_starts = self._encoder.truncated(draft, ref.length)
            return
        end = ref.start + ref.length
        if document.kind is not Kind.TEXT or ref.truncated or end > expected:
            raise DataError(
                f"the plan uses tokens {ref.start} to {end} ({ref.truncated} truncated) of {document.sample.info}, "
                f"which has {expected}: plan and index do not belong together; start again"
            )
        # the label at the cut still names the token after it
        document.tokens = self._encoder.written(draft)[:, ref.start : end]

    def _images(self, documents: Sequence[_Document], kind: Kind, skipped: dict[int, SkippedDocument]) -> torch.Tensor:
        """uint8 [N, 3, H, W]: the images of the documents of one kind, in order; a document with an undecodable one
        goes to `skipped`, and its images with it."""
        wanted = [
            (document, number)
            for document in documents
            if document.kind is kind and document.place not in skipped
            for number in range(self._encoder.images(document.sample))
        ]
        size = self._encoder.image_size
        if not wanted:
            return self._no_images
        images = _uint8((len(wanted), 3, size, size), shared=self._shared)
        pixels = images.numpy()

        def decode(place: int) -> SkipSample | None:
            document, number = wanted[place]
            try:
                pixels[place] = self._encoder.image(
                    document.sample,
                    number,
                    source=document.sample.info.source,
                    epoch=document.ref.epoch,
                    sample_index=document.ref.sample,
                    held_out=self._held_out,
                )
            except SkipSample as reason:
                return reason
            return None

        faults = list(self._threads.map(decode, range(len(wanted))))
        for (document, _), fault in zip(wanted, faults, strict=True):
            if fault is not None:
                skipped.setdefault(document.place, document.skip(fault))
        done = 0
        for place, (document, _) in enumerate(wanted):
            if document.place in skipped:
                continue
            if done < place:  # close the gap that an undecodable one left
                pixels[done] = pixels[place]
            done += 1
        return images[:done]


class _Document:
    """One document while its row is built; `tokens` only where it is not the whole draft."""

    __slots__ = ("draft", "expected", "image_starts", "kind", "place", "ref", "sample", "table", "tokens")

    def __init__(
        self, place: int, ref: DocumentRef, table: ShardTable, expected: int, sample: Sample, kind: Kind
    ) -> None:
        self.place, self.ref, self.table, self.expected, self.sample = place, ref, table, expected, sample
        self.kind = kind
        self.draft: Draft | None = None
        self.tokens: np.ndarray | None = None
        self.image_starts: list[int] = []

    def skip(self, reason: SkipSample) -> SkippedDocument:
        return SkippedDocument(info=self.sample.info, ref=self.ref, reason=str(reason))

    def provenance(self) -> Provenance:
        info, ref = self.sample.info, self.ref
        return Provenance(
            source=info.source, shard=self.table.name, key=info.key, kind=self.kind, start=ref.start, length=ref.length
        )


def _uint8(shape: tuple[int, ...], *, shared: bool) -> torch.Tensor:
    """An uninitialised tensor; a shared one crosses processes without a copy."""
    if not shared:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


def _rebuild(
    cfg: RunConfig, locators: Sequence[SourceLocator], tokenizer: Tokenizer, held_out: bool, shared_images: bool
) -> RowBuilder:
    return RowBuilder(cfg, locators, tokenizer, held_out=held_out, shared_images=shared_images)
