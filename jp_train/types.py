"""The frozen dataclasses that cross module boundaries: from a reference in the plan to the loss.

    RowSpec -> RawSample -> UnderstandingSample | TextSample | GenerationSample -> EncodedDocument -> Row -> PackedBatch
    -> LossTerms

Shape letters: T tokens of a document, row or micro-batch; D documents; U understanding images; G generation images; S
slots an image (576 in Janus-Pro); H, W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:  # 2 s of start-up that the importers and a misspelt key need not wait for
    import torch

IGNORE_INDEX = -100
"""Label of a position that no head is trained on."""

LOGITS_BLOCK = 128
"""Positions whose logits stand in fp32 at one time while a chunk becomes losses and gradients (model/loss.py)."""

PRODUCT_CLASSES = 16384
"""Classes of which a chunk's part of a head's weight gradient exists in the run's dtype, beside the sum in fp32."""

IMAGE_MARKER = "<image>"
"""Where an image stands in a question."""

PENDING_VQ_ID = -1
"""`gen_labels` of a supervised image slot whose VQ id is not known yet: the trainer encodes the image on the fly."""


class Kind(str, Enum):
    """What a document trains. The order is the paper's ratio order, understanding : text : generation."""

    UNDERSTANDING = "understanding"
    TEXT = "text"
    GENERATION = "generation"

    def __str__(self) -> str:
        return self.value


KINDS: tuple[Kind, ...] = (Kind.UNDERSTANDING, Kind.TEXT, Kind.GENERATION)
_KIND_OF = {kind.value: kind for kind in KINDS}


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceInfo:
    """Where a sample came from, carried to every error message, ledger line and dump."""

    source: str
    shard: str
    key: str

    def __str__(self) -> str:
        return f"source {self.source!r}, shard {self.shard}, key {self.key!r}"


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentRef:
    """One document, or a span of one long text, as the plan names it. Integers only: no file is read to make one.

    `source` indexes the recipe's sources; `epoch` and `sample` give the sample's number in the source's index; `start`
    and `length` are the token span used (the whole document unless a text was cut at a row's end); `short_caption` says
    that the plan drew the first-sentence caption, whose length the index knows; `truncated` counts tokens of an
    over-long document that are lost.
    """

    source: int
    epoch: int
    sample: int
    start: int
    length: int
    short_caption: bool = False
    truncated: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class RowSpec:
    """The content of one row as planned: `row` counts from 0 within `step`; `documents` in the order in which they are
    laid out."""

    step: int
    row: int
    documents: tuple[DocumentRef, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class RawSample:
    """The tar members of one sample: `fields` maps an extension without its dot ("jpg", "json", "vq.npy") to its bytes.

    `vq_ids` uint16 [S] are those stored beside the shard; `image_fault` is why there are none: the reason for which
    decoding the image would fail. With either, the image's bytes are left empty. `token_ids` is the stored record of
    its texts (data/token_ids.py): with it the bytes of the texts are left empty. `extensions` are those of all its
    files, also of those that are not needed, for messages.
    """

    info: SourceInfo
    fields: dict[str, bytes]
    vq_ids: np.ndarray | None = None
    image_fault: str = ""
    token_ids: bytes | None = None
    extensions: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One question and its answer; an IMAGE_MARKER in `question` is where an image stands."""

    question: str
    answer: str


@dataclass(frozen=True, kw_only=True, slots=True)
class UnderstandingSample:
    """Images and a conversation about them, or a `text` in which they stand. `images` are the undecoded files, in the
    order of the IMAGE_MARKERs in questions (or text); where there is none, they come before the first question.
    `system` replaces `data.system_prompt`. With the stored record `token_ids` there are no turns."""

    info: SourceInfo
    images: tuple[bytes, ...]
    turns: tuple[Turn, ...] = ()
    text: str | None = None
    system: str = ""
    token_ids: bytes | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSample:
    """Pure text: a plain document (`text`), a conversation (`turns`), or the stored record of either (`token_ids`);
    exactly one is set. `system`: what a conversation begins with (stage 3)."""

    info: SourceInfo
    text: str | None = None
    turns: tuple[Turn, ...] = ()
    system: str = ""
    token_ids: bytes | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationSample:
    """A caption and the image to generate: the undecoded file, or its stored VQ ids `vq_ids` uint16 [S], or
    `image_fault`, why it cannot be used. With the stored record `token_ids` the caption is empty."""

    info: SourceInfo
    caption: str
    image: bytes | None = None
    vq_ids: np.ndarray | None = None
    image_fault: str = ""
    token_ids: bytes | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedDocument:
    """One sample as tokens, next-token shifted once, here: `labels[i]` is what position i must predict.

    All arrays have length T. `labels` are the text head's targets, `gen_labels` the image head's (VQ ids, or
    PENDING_VQ_ID); IGNORE_INDEX elsewhere; never both set at one position. `und_slots` int64 [I * S] / `gen_slots`
    int64 [S] are the positions filled by the features of I images / by VQ embeddings (empty when the document has no
    such image). Images are uint8 [3, H, W], already at model size; `und_images` [I, 3, H, W].
    """

    info: SourceInfo
    kind: Kind
    input_ids: np.ndarray
    labels: np.ndarray
    gen_labels: np.ndarray
    und_slots: np.ndarray
    gen_slots: np.ndarray
    und_images: np.ndarray | None = None
    gen_image: np.ndarray | None = None
    vq_ids: np.ndarray | None = None

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class SkippedDocument:
    """A document that could not be used: its place in the row is empty, `reason` goes to the ledger."""

    info: SourceInfo
    ref: DocumentRef
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """One packed document and its token span; the row hash and `data explain` are made of these."""

    source: str
    shard: str
    key: str
    kind: Kind
    start: int
    length: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One packed sequence of at most `seq_len` tokens: whole documents, save a text cut at the row's end.

    Its D documents lie end to end in a few arrays, so that a row crosses processes as one small message, with the
    images in shared memory: `tokens` int32 [3, T] are input_ids, labels and gen_labels; `image_counts` [D] the images
    of each document, `image_starts` the first slot of each image, of all documents in order, within its document, of
    `image_slots` each; `und_images` uint8 [U, 3, H, W] and `gen_images` uint8 [P, 3, H, W] the images of the
    understanding documents, and of the generation documents whose ids are pending, in order. `provenance` and
    `source_indices` are parallel to the documents; provenance holds their lengths.
    """

    step: int
    row: int
    tokens: np.ndarray
    image_slots: int
    image_counts: tuple[int, ...]
    image_starts: tuple[int, ...]
    und_images: torch.Tensor
    gen_images: torch.Tensor
    provenance: tuple[Provenance, ...]
    source_indices: tuple[int, ...]
    skipped: tuple[SkippedDocument, ...] = ()
    truncated_tokens: int = 0

    @property
    def documents(self) -> tuple[EncodedDocument, ...]:
        """The documents one by one, as views; `info` names the shard by its file name alone."""
        documents: list[EncodedDocument] = []
        gen, at, image, seen, none = iter(self.gen_images), 0, 0, 0, np.zeros(0, np.int64)
        for origin, count in zip(self.provenance, self.image_counts, strict=True):
            input_ids, labels, gen_labels = self.tokens[:, at : at + origin.length]
            at += origin.length
            understanding, generation = origin.kind is Kind.UNDERSTANDING, origin.kind is Kind.GENERATION
            starts = np.array(self.image_starts[image : image + count], np.int64)
            image += count
            slots = (starts[:, None] + np.arange(self.image_slots)).reshape(-1)
            shown = self.und_images[seen : seen + count].numpy() if understanding else None
            seen += count * understanding
            ids = gen_labels[slots - 1] if generation else none
            pending = generation and ids[0] == PENDING_VQ_ID
            documents.append(
                EncodedDocument(
                    info=SourceInfo(source=origin.source, shard=origin.shard, key=origin.key),
                    kind=origin.kind,
                    input_ids=input_ids,
                    labels=labels,
                    gen_labels=gen_labels,
                    und_slots=slots if understanding else none,
                    gen_slots=slots if generation else none,
                    und_images=shown,
                    gen_image=next(gen).numpy() if pending else None,
                    vq_ids=ids if generation and not pending else None,
                )
            )
        return tuple(documents)

    def __reduce__(self) -> tuple[Any, ...]:
        """As plain tuples: pickling thousands of small dataclasses costs more than making their rows."""
        provenance = tuple([(p.source, p.shard, p.key, p.kind.value, p.start, p.length) for p in self.provenance])
        arrays = (
            self.tokens, self.image_slots, self.image_counts, self.image_starts, self.und_images, self.gen_images
        )  # fmt: skip
        return (
            _received_row,
            (self.step, self.row, *arrays, provenance, self.source_indices, self.skipped, self.truncated_tokens),
        )


def _received_row(
    step: int,
    row: int,
    tokens: np.ndarray,
    image_slots: int,
    image_counts: tuple[int, ...],
    image_starts: tuple[int, ...],
    und_images: torch.Tensor,
    gen_images: torch.Tensor,
    provenance: Iterable[tuple[str, str, str, str, int, int]],
    sources: tuple[int, ...],
    skipped: tuple[SkippedDocument, ...],
    truncated: int,
) -> Row:
    return Row(
        step=step,
        row=row,
        tokens=tokens,
        image_slots=image_slots,
        image_counts=image_counts,
        image_starts=image_starts,
        und_images=und_images,
        gen_images=gen_images,
        provenance=tuple(
            [
                Provenance(source=source, shard=shard, key=key, kind=_KIND_OF[kind], start=start, length=length)
                for source, shard, key, kind, start, length in provenance
            ]
        ),
        source_indices=sources,
        skipped=skipped,
        truncated_tokens=truncated,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBatch:
    """One micro-batch of rows, laid end to end without a padding token.

    input_ids, position_ids, labels, gen_labels: int64 [T]; `position_ids` restart per document (per row with `packing:
    causal`); cu_seqlens: int32 [segments + 1], the attention segments; `max_seqlen` a plain int;
    und_images uint8 [U, 3, H, W] and und_slots int64 [U * S]; gen_slots int64 [G * S], gen_ids int64 [G, S]
    (PENDING_VQ_ID rows where `gen_pending` int64 [P] points: those images are in gen_images uint8 [P, 3, H, W], and
    VQ encoding fills them in); document_lengths, document_kinds (index into KINDS) and document_sources: int64 [D]. All
    zero-size where absent, never None.
    text_positions, image_positions: int64 [N], the positions that each head is trained on. They follow from the labels;
    `to` looks them up before those are on a GPU, where the host would have to wait for everything before.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    gen_labels: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    und_images: torch.Tensor
    und_slots: torch.Tensor
    gen_images: torch.Tensor
    gen_pending: torch.Tensor
    gen_ids: torch.Tensor
    gen_slots: torch.Tensor
    document_lengths: torch.Tensor
    document_kinds: torch.Tensor
    document_sources: torch.Tensor
    rows: int
    seq_len: int
    step: int
    provenance: tuple[tuple[Provenance, ...], ...] = ()
    skipped: tuple[SkippedDocument, ...] = ()
    truncated_tokens: int = 0
    text_positions: torch.Tensor | None = None
    image_positions: torch.Tensor | None = None

    @property
    def supervised_text_tokens(self) -> int:
        """Positions of this micro-batch that the text head is trained on."""
        return _count(self.text_positions, self.labels)

    @property
    def supervised_image_tokens(self) -> int:
        """Positions of this micro-batch that the image head is trained on."""
        return _count(self.image_positions, self.gen_labels)

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with every tensor on `device`; to a GPU from pinned memory, so that the host need not wait."""
        import torch

        moved: dict[str, Any] = {
            "text_positions": positions(self.text_positions, self.labels),
            "image_positions": positions(self.image_positions, self.gen_labels),
        }
        pinned = torch.device(device).type == "cuda"
        for name in self.__slots__:
            value = moved.get(name, getattr(self, name))
            if isinstance(value, torch.Tensor):
                moved[name] = (value.pin_memory() if pinned else value).to(device, non_blocking=True)
        return replace(self, **moved)


def positions(known: torch.Tensor | None, labels: torch.Tensor) -> torch.Tensor:
    """Supervised positions of labels, int64 [N]; `known` if they have been looked up."""
    return (labels != IGNORE_INDEX).nonzero().squeeze(1) if known is None else known


def _count(known: torch.Tensor | None, labels: torch.Tensor) -> int:
    return int((labels != IGNORE_INDEX).sum()) if known is None else len(known)


class LossTerms(NamedTuple):
    """What one forward pass returns. Sums, not means: the caller divides by the global count.

    A named tuple, not a dataclass: DeepSpeed's hooks look for the output tensors inside tuples, lists and dicts only,
    and would miss (or fail on) any other class. Construct it by keyword.

    text_sum, image_sum: scalars, the summed cross-entropy (nats) of each head (head weights not applied), with gradient
    unless document_mean_sum is given;
    text_tokens, image_tokens: supervised positions of each head;
    kind_sums float32 [3] and kind_tokens int64 [3] in KINDS order, source_sums float32 [n_sources] and source_tokens
    int64 [n_sources]: detached, for the curves.
    document_mean_sum: scalar with gradient, the sum over documents of the document's mean loss (used by loss.reduction:
    sample_mean).
    """

    text_sum: torch.Tensor
    image_sum: torch.Tensor
    text_tokens: int
    image_tokens: int
    kind_sums: torch.Tensor
    kind_tokens: torch.Tensor
    source_sums: torch.Tensor
    source_tokens: torch.Tensor
    document_mean_sum: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SpecialTokens:
    """Ids of the tokens that layouts need, always looked up by their string (Janus and Janus-Pro number them
    differently)."""

    bos: int
    eos: int
    pad: int
    boi: int
    eoi: int
    image_placeholder: int
