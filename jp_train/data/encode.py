"""A sample -> tokens and labels (the layouts are those of layouts.py). The only place that shifts labels.

Documents are encoded in three steps, so that a whole row is tokenised in one call and written into one array: `draft`
lays out and tokenises, `Draft` knows the length, `write` fills ids and labels in. `encode` is the same for one document
alone.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jp_train.config.choices import Crop, Template
from jp_train.config.schema import RunConfig
from jp_train.data.image import load_generation_image, load_understanding_image
from jp_train.data.layouts import ASK, LEARN, PAD, READ, ImageBlock, Layouts, Part
from jp_train.data.permute import document_uniform
from jp_train.data.samples import Sample, first_sentence
from jp_train.data.token_ids import IMAGE, Run, condition_runs, pack, planes_for, unpack
from jp_train.data.tokenizer import Tokenizer
from jp_train.errors import ConfigError, DataError, SkipSample
from jp_train.types import (
    IGNORE_INDEX,
    PENDING_VQ_ID,
    EncodedDocument,
    GenerationSample,
    Kind,
    TextSample,
    UnderstandingSample,
)

ENCODING_VERSION = 1
"""Part of every index fingerprint: raise it when a layout or the rule of first sentences changes, and old counts and
ids become stale."""

Piece = tuple[list[int] | np.ndarray | int | ImageBlock, int]
"""A part whose text has become ids."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenCounts:
    """Length of one sample in tokens, in four forms: whole; with the first-sentence caption; with the text condition
    dropped, for the whole and for the short caption.

    Without a caption to shorten or a condition to drop, all are equal. `images` it has; below `min_tokens` it cannot be
    truncated: its images, and what stands before the last of them; 0 for text.
    """

    tokens: int
    short_tokens: int
    dropped_tokens: int
    short_dropped_tokens: int
    images: int = 0
    min_tokens: int = 0


def too_many_images(images: int, min_tokens: int, seq_len: int) -> str:
    """Why a sample of so many images is never used; empty for one that a row can hold."""
    if images < 2 or min_tokens <= seq_len:
        return ""
    return (
        f"its {images} images and the text before the last take {min_tokens:,} tokens, and a row has {seq_len:,} "
        "(data.seq_len): never used"
    )


class Draft:
    """A tokenised document that is not written yet: `length` in tokens, `pieces` in order, `image_starts` the
    position of the first slot of each image."""

    __slots__ = ("image_starts", "length", "pieces", "sample")

    def __init__(self, sample: Sample, pieces: list[Piece]) -> None:
        self.sample, self.pieces = sample, pieces
        self.length = 0
        self.image_starts: list[int] = []
        for piece, _ in pieces:
            if isinstance(piece, int):
                self.length += 1
            elif isinstance(piece, ImageBlock):
                self.image_starts.append(self.length + 1)
                self.length += len(piece.ids)
            else:
                self.length += len(piece)


class Encoder:
    """Encodes samples of one stage; also builds the prompts of inference, by the same code.

    Raises ConfigError when the model's embedding has fewer rows than the tokenizer has ids.
    """

    def __init__(self, cfg: RunConfig, tokenizer: Tokenizer) -> None:
        if tokenizer.vocab_size > cfg.model.language.vocab_size:
            raise ConfigError(
                f"tokenizer {cfg.tokenizer.path} has {tokenizer.vocab_size} ids, but model.language.vocab_size is "
                f"{cfg.model.language.vocab_size}; use at least {tokenizer.vocab_size}"
            )
        self.tokenizer = tokenizer
        self.template = cfg.stage.template
        self.image_slots = (cfg.model.vision.image_size // cfg.model.vision.patch_size) ** 2
        """S: positions that one image takes, in both directions (the config checks that they agree)."""
        self.codebook_size = cfg.model.vq.codebook_size
        self.image_size = cfg.model.vision.image_size
        self._layouts = Layouts(cfg, tokenizer, self.image_slots)
        self._data = cfg.data
        self._seed = cfg.seed
        self._markers: tuple[int, int] | None = None
        self._learnt = (LEARN,) if cfg.data.mask_question else (LEARN, ASK)
        self._planes = planes_for(tokenizer.vocab_size)

    @property
    def fingerprint(self) -> str:
        """Hex digest of everything that determines a document's length and the ids of its texts, except the sample
        itself and the class prompt of its source."""
        data = self._data
        parts = {
            "version": ENCODING_VERSION,
            "tokenizer": self.tokenizer.fingerprint,
            "template": self.template.value,
            "image_slots": self.image_slots,
            "codebook_size": self.codebook_size,
            "crop": data.crop.value,
            "image_end": data.image_end.value,
            "space_before_boi": data.space_before_boi,
            "pad_dropout_form": data.pad_dropout_form.value,
            "system_prompt": data.system_prompt,
            "caption_question": data.caption_question,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def texts(self, sample: Sample) -> list[Run]:
        """The texts of a sample as ids, before any random choice: what the index counts and `record` stores."""
        if isinstance(sample, GenerationSample):
            whole, short = sample.caption, first_sentence(sample.caption)
            ids = self._ids(self._layouts.condition(whole))
            return condition_runs(ids, ids if short == whole else self._ids(self._layouts.condition(short)))
        runs: list[Run] = []
        for piece, role in self.draft(sample).pieces:
            if isinstance(piece, ImageBlock):
                runs.append(((), IMAGE))
                continue
            ids = [piece] if isinstance(piece, int) else list(piece)
            if runs and runs[-1][1] == role:
                ids = [*runs.pop()[0], *ids]
            runs.append((ids, role))
        return runs

    def record(self, texts: Sequence[Run]) -> bytes:
        """What the index stores of a sample's `texts`: a sample that carries it as `token_ids` is the same document."""
        return pack(texts, self._planes)

    def token_counts(self, sample: Sample, texts: Sequence[Run] | None = None) -> TokenCounts:
        """The lengths that the index stores; images are not touched. `texts` are those of the sample, where they are
        known.

        Raises SkipSample for a text or caption that the tokenizer turns into nothing.
        """
        runs = self.texts(sample) if texts is None else texts
        if not isinstance(sample, GenerationSample):
            tokens = images = min_tokens = 0
            for ids, role in runs:
                tokens += len(self._layouts.understanding_block.ids) if role == IMAGE else len(ids)
                images, min_tokens = (images + 1, tokens) if role == IMAGE else (images, min_tokens)
            if tokens <= 2:  # BOS and EOS alone
                raise SkipSample("the text has no token", "empty_text")
            return TokenCounts(
                tokens=tokens,
                short_tokens=tokens,
                dropped_tokens=tokens,
                short_dropped_tokens=tokens,
                images=images,
                min_tokens=min_tokens,
            )
        both, whole, short = [len(ids) for ids, _ in runs]
        if min(whole, short) + both <= sum(self._condition_markers()):
            raise SkipSample("the caption has no token", "empty_text")
        rest = self._length(self._layouts.generation([]))
        least = rest + sum(self._condition_markers())
        dropped = self._layouts.dropped([(np.zeros(0, np.int32), READ)])
        counts = [rest + both + whole, rest + both + short]
        kept = counts if dropped and dropped[0][1] == PAD else [rest + len(dropped)] * 2
        return TokenCounts(
            tokens=counts[0],
            dropped_tokens=kept[0],
            short_tokens=counts[1],
            short_dropped_tokens=kept[1],
            images=1,
            min_tokens=least,
        )

    def length(self, sample: Sample, *, short_caption: bool = False, drop_condition: bool = False) -> int:
        """Tokens of `sample` as `encode` lays it out under these two draws."""
        counts = self.token_counts(sample)
        if drop_condition:
            return counts.short_dropped_tokens if short_caption else counts.dropped_tokens
        return counts.short_tokens if short_caption else counts.tokens

    def min_tokens(self, kind: Kind) -> int:
        """The length below which no document of `kind` can be truncated: an image, and the template around it (before
        it, of an image to understand). Documents of several images have more (`token_counts`)."""
        if kind is Kind.GENERATION:
            return self._length(self._layouts.generation([])) + sum(self._condition_markers())
        if kind is Kind.UNDERSTANDING:
            ids = self._ids(self._layouts.question_prompt("", self.template))
            return ids.index(self.tokenizer.special.boi) + 1 + self.image_slots + 1
        return 0

    def drops_condition(self, source: str, epoch: int, sample_index: int) -> bool:
        """Whether this document of a generation source loses its text condition (unconditional training)."""
        return document_uniform(self._seed, source, epoch, sample_index, "pad_dropout") < self._data.pad_dropout

    def variant(self, source: str, epoch: int, sample_index: int, variants: int) -> int:
        """Which of a sample's captions this epoch draws."""
        if variants == 1:
            return 0
        return int(document_uniform(self._seed, source, epoch, sample_index, "variant") * variants)

    def draft(self, sample: Sample, *, short_caption: bool = False, drop_condition: bool = False) -> Draft:
        """One document, laid out and tokenised under these two draws."""
        return self.draft_many([(sample, short_caption, drop_condition)])[0]

    def draft_many(self, samples: Sequence[tuple[Sample, bool, bool]]) -> list[Draft]:
        """Documents of (sample, short_caption, drop_condition), their texts tokenised in one call."""
        laid_out = [(sample, self._parts(sample, short, drop)) for sample, short, drop in samples]
        texts = [piece for _, parts in laid_out for piece, _ in parts if isinstance(piece, str)]
        ids = iter(self.tokenizer.encode_many(texts) if texts else ())
        return [
            Draft(sample, [(next(ids) if isinstance(piece, str) else piece, role) for piece, role in parts])
            for sample, parts in laid_out
        ]

    def _parts(self, sample: Sample, short: bool, drop: bool) -> list[Part]:
        """The parts of a document, with ids in place of texts where they are stored. Raises DataError for a damaged
        record."""
        layouts = self._layouts
        if sample.token_ids is None:
            return layouts.parts(sample, short_caption=short, drop_condition=drop)
        try:
            runs, ids = unpack(sample.token_ids, self._planes)
            if len(ids) and ids.max() >= self.tokenizer.vocab_size:
                raise ValueError(f"id {ids.max()} of {self.tokenizer.vocab_size}")
            if (ids == self.tokenizer.special.image_placeholder).any():
                raise ValueError("an image slot among the ids of a text")
            if isinstance(sample, GenerationSample):
                (both, _), (whole, _), _ = runs
                condition = np.concatenate([ids[:both], ids[both + whole :]]) if short else ids[: both + whole]
                parts: list[Part] = [(condition, READ)]
                return layouts.generation(layouts.dropped(parts) if drop else parts)
            images = len(sample.images) if isinstance(sample, UnderstandingSample) else 0
            if [role for _, role in runs].count(IMAGE) != images:
                raise ValueError("another number of images")
            if not runs or runs[0][1] != READ or not runs[0][0]:  # a label stands one place before its id
                raise ValueError("it does not begin with BOS")
        except (ValueError, struct.error) as error:
            raise DataError(
                f"the stored token ids of {sample.info} are damaged ({error}); delete the shard's .jp-tokens sidecar, "
                "or set data.token_ids=off"
            ) from None
        parts, at = [], 0
        for length, role in runs:
            parts.append(
                (
                    layouts.understanding_block if role == IMAGE else ids[at : at + length],
                    READ if role == IMAGE else role,
                )
            )
            at += length
        return parts

    def write(self, draft: Draft, tokens: np.ndarray) -> None:
        """Fill `tokens` int [3, draft.length], that hold IGNORE_INDEX: ids, text labels and image labels, the labels
        shifted."""
        ids, labels, gen_labels = tokens
        pad, at = self.tokenizer.special.pad, 0
        for piece, role in draft.pieces:
            if isinstance(piece, int):
                end = at + 1
                ids[at] = pad if role == PAD else piece
            else:
                values = piece.ids if isinstance(piece, ImageBlock) else piece
                end = at + len(values)
                ids[at:end] = pad if role == PAD else values
            if role in self._learnt:
                labels[at - 1 : end - 1] = ids[at:end]
            at = end
        if isinstance(draft.sample, GenerationSample):
            # boi predicts the first id, slot i predicts id i + 1
            boi, vq_ids = draft.image_starts[0] - 1, draft.sample.vq_ids
            gen_labels[boi : boi + self.image_slots] = PENDING_VQ_ID if vq_ids is None else vq_ids

    def written(self, draft: Draft) -> np.ndarray:
        """A new array int64 [3, draft.length] with the document; see `write`."""
        tokens = np.full((3, draft.length), IGNORE_INDEX, np.int64)
        self.write(draft, tokens)
        return tokens

    def truncated(self, draft: Draft, max_tokens: int) -> tuple[np.ndarray, list[int]]:
        """int64 [3, max_tokens] of a longer document, and the first slot of each image: the end of a conversation or
        text is cut, or the end of a caption (the template around it stays).

        Raises SkipSample when nothing would be left to learn.
        """
        tokens, image_starts = self.written(draft), draft.image_starts
        excess = draft.length - max_tokens
        if isinstance(draft.sample, GenerationSample):
            lead, tail = self._condition_markers()
            cut_end = image_starts[0] - 1 - tail  # where the caption ends
            cut_start = cut_end - excess
            if cut_start < 1 + lead:
                raise SkipSample(
                    f"the image and the template alone exceed data.seq_len {max_tokens}", "nothing_to_learn"
                )
            return np.concatenate([tokens[:, :cut_start], tokens[:, cut_end:]], axis=1), [image_starts[0] - excess]
        if image_starts and image_starts[-1] + self.image_slots + 1 > max_tokens:
            raise SkipSample(
                f"the images and what comes before them exceed data.seq_len {max_tokens}", "nothing_to_learn"
            )
        tokens = tokens[:, :max_tokens].copy()
        tokens[1, -1] = IGNORE_INDEX  # the token that follows is lost
        if (tokens[1] == IGNORE_INDEX).all():
            raise SkipSample(
                f"truncated to data.seq_len {max_tokens} tokens, nothing of its answers is left to learn",
                "nothing_to_learn",
            )
        return tokens, image_starts

    def images(self, sample: Sample) -> int:
        """How many files `image` decodes for this sample."""
        if isinstance(sample, UnderstandingSample):
            return len(sample.images)
        return int(isinstance(sample, GenerationSample) and sample.vq_ids is None)

    def image(
        self, sample: Sample, number: int = 0, *, source: str, epoch: int, sample_index: int, held_out: bool
    ) -> np.ndarray:
        """Image `number` of a sample that has `images`, as the model takes it: uint8 [3, H, W].

        Raises SkipSample when it is undecodable.
        """
        data = self._data
        if isinstance(sample, UnderstandingSample):
            file = sample.images[number]
            return load_understanding_image(file, self.image_size, data.max_image_pixels, data.image_decode)
        assert isinstance(sample, GenerationSample)
        if sample.image_fault:
            raise SkipSample(sample.image_fault)
        assert sample.image is not None
        crop, uniform = data.crop, 0.5
        if crop is Crop.random:
            crop = Crop.centre if held_out else Crop.random
            uniform = document_uniform(self._seed, source, epoch, sample_index, "crop")
        return load_generation_image(
            sample.image, self.image_size, crop, uniform, data.max_image_pixels, data.image_decode
        )

    def encode(
        self,
        sample: Sample,
        *,
        source: str,
        epoch: int = 0,
        sample_index: int = 0,
        short_caption: bool = False,
        held_out: bool = False,
        expected_tokens: int | None = None,
        max_tokens: int | None = None,
    ) -> EncodedDocument:
        """The document of one sample; images are decoded here.

        Random choices are functions of (seed, source, epoch, sample_index); `held_out` makes none (whole caption,
        condition kept, centre crop). `max_tokens` truncates the text of a longer document, never its image.

        Raises:
            DataError: if the length is not `expected_tokens`, the index's: the index is stale.
            SkipSample: if the image is undecodable, or truncation would leave nothing to learn.
        """
        drop = (
            not held_out and isinstance(sample, GenerationSample) and self.drops_condition(source, epoch, sample_index)
        )
        draft = self.draft(sample, short_caption=short_caption and not held_out, drop_condition=drop)
        if expected_tokens is not None:
            check_length(draft, expected_tokens)
        if max_tokens is not None and draft.length > max_tokens:
            tokens, image_starts = self.truncated(draft, max_tokens)
        else:
            tokens, image_starts = self.written(draft), draft.image_starts
        draws: dict[str, Any] = {"source": source, "epoch": epoch, "sample_index": sample_index, "held_out": held_out}
        images = [self.image(sample, number, **draws) for number in range(self.images(sample))]
        slots = (np.array(image_starts, np.int64)[:, None] + np.arange(self.image_slots)).reshape(-1)
        kind, none = kind_of(sample), np.zeros(0, np.int64)
        return EncodedDocument(
            info=sample.info,
            kind=kind,
            input_ids=tokens[0],
            labels=tokens[1],
            gen_labels=tokens[2],
            und_slots=slots if kind is Kind.UNDERSTANDING else none,
            gen_slots=slots if kind is Kind.GENERATION else none,
            und_images=np.stack(images) if kind is Kind.UNDERSTANDING else None,
            gen_image=images[0] if kind is Kind.GENERATION and images else None,
            vq_ids=sample.vq_ids if isinstance(sample, GenerationSample) else None,
        )

    def generation_prompt_ids(self, caption: str, template: Template | str | None = None) -> list[int]:
        """The ids up to and including boi: what the image tokens are sampled after."""
        return self._ids(self._layouts.generation_prompt(self._layouts.condition(caption, self._template(template))))

    def unconditional_prompt_ids(self, caption: str, template: Template | str | None = None) -> list[int]:
        """The unconditional prompt of classifier-free guidance: the condition is dropped as in training."""
        layouts = self._layouts
        return self._ids(
            layouts.generation_prompt(layouts.dropped(layouts.condition(caption, self._template(template))))
        )

    def understanding_prompt_ids(
        self, question: str, template: Template | str | None = None, images: int = 1
    ) -> list[int]:
        """The ids of images and a question, ending where the answer starts (its first token carries the space).

        The S slots of each image hold the image_placeholder id. Each stands at its IMAGE_MARKER in the question; an
        only one, or all where there is no marker, before it. An empty question becomes `data.caption_question`, as for
        a captioned sample in training. Raises SkipSample for another number of markers than of images.
        """
        return self._ids(self._layouts.question_prompt(question, self._template(template), images))

    def _template(self, template: Template | str | None) -> Template:
        return self.template if template is None else Template(template)

    def _ids(self, parts: Sequence[Part]) -> list[int]:
        ids: list[int] = []
        for piece, role in parts:
            if isinstance(piece, str):
                piece_ids = self.tokenizer.encode(piece)
            elif isinstance(piece, int):
                piece_ids = [piece]
            else:
                piece_ids = (piece.ids if isinstance(piece, ImageBlock) else piece).tolist()
            ids += [self.tokenizer.special.pad] * len(piece_ids) if role == PAD else piece_ids
        return ids

    def _length(self, parts: Sequence[Part]) -> int:
        return len(self._ids(parts))

    def _condition_markers(self) -> tuple[int, int]:
        """Tokens of the template before and after a caption."""
        if self._markers is None:
            self._markers = self._length(self._layouts.condition_lead()), self._length(self._layouts.condition_tail())
        return self._markers


def check_length(draft: Draft, expected: int) -> None:
    """Raises DataError when a document is not as long as the index says."""
    if draft.length != expected:
        raise DataError(
            f"stale index: {draft.sample.info} has {draft.length} tokens, its index says {expected}; delete the "
            "shard's .jp-tokens sidecar, or run `jp-train data index` again"
        )


def kind_of(sample: Sample) -> Kind:
    """The kind that a sample's type stands for."""
    if isinstance(sample, TextSample):
        return Kind.TEXT
    return Kind.UNDERSTANDING if isinstance(sample, UnderstandingSample) else Kind.GENERATION
