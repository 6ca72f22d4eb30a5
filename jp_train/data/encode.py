"""A sample -> tokens and labels, for every layout of the specification's table (section 3). The only place that shifts labels.

    text, stages 1 and 2     BOS text EOS                                                   all text and EOS supervised
    text, stage 3            BOS <|User|>: question \\n\\n<|Assistant|>: answer EOS ...          answers and their EOS
    understanding, stage 1   BOS boi [S] eoi caption EOS                                    the text and EOS
    understanding, stage 2   BOS boi [S] eoi question " " answer EOS                        the same (mask_question: answers and EOS)
    understanding, stage 3   BOS system \\n\\n<|User|>: boi [S] eoi \\n question \\n\\n<|Assistant|>: answer EOS ...
                                                                                            answers and their EOS
    generation, stages 1, 2  BOS caption boi [S] eoi EOS                                    the S image tokens
    generation, stage 3      BOS <|User|>: caption \\n\\n<|Assistant|>: boi [S] eoi EOS         the S image tokens

Decisions where the paper is silent: an answer begins with one space (it is what the prompt `<|Assistant|>:` leads to at inference);
a caption without a question is asked `data.caption_question` from stage 2 on; further turns of a stage 1 or 2 dialogue start on a
new line; a dialogue of a text source is plain lines in stages 1 and 2; plain text in stage 3 is laid out and supervised as in
stage 2. All tokens stay in the input, the last one too, so a document is as long as the layout's row in the table.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jp_train.config.schema import Crop, ImageEnd, PadDropoutForm, RunConfig, Template
from jp_train.data.image import load_generation_image, load_understanding_image
from jp_train.data.permute import document_uniform
from jp_train.data.samples import Sample, first_sentence
from jp_train.data.tokenizer import Tokenizer
from jp_train.errors import ConfigError, DataError, SkipSample
from jp_train.types import (
    IGNORE_INDEX,
    PENDING_VQ_ID,
    EncodedDocument,
    GenerationSample,
    Kind,
    TextSample,
    Turn,
    UnderstandingSample,
)

ENCODING_VERSION = 1
"""Part of every index fingerprint: raise it when a layout changes, and old token counts become stale."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenCounts:
    """Lengths of one sample in tokens: whole; with the first-sentence caption; with the text condition dropped (whole or short).

    Without a caption to shorten or a condition to drop, all are equal.
    """

    tokens: int
    short_tokens: int
    dropped_tokens: int
    short_dropped_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layout:
    """Tokens of a document before the shift: `supervised` marks text targets; slots start at und_start or gen_start."""

    ids: list[int]
    supervised: list[bool]
    und_start: int | None = None
    gen_start: int | None = None


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
        self._data = cfg.data
        self._image_size = cfg.model.vision.image_size
        self._seed = cfg.seed

    @property
    def fingerprint(self) -> str:
        """Hex digest of all that decides a document's length besides the sample and its source's class prompt."""
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

    def token_counts(self, sample: Sample) -> TokenCounts:
        """The lengths that the index stores; pictures are not touched."""
        if not isinstance(sample, GenerationSample):
            tokens = len(self._layout(sample).ids)
            return TokenCounts(tokens=tokens, short_tokens=tokens, dropped_tokens=tokens, short_dropped_tokens=tokens)
        rest = len(self._generation([]).ids)
        lengths = []
        for caption in (sample.caption, first_sentence(sample.caption)):
            condition = self._condition(caption, self.template)
            lengths += [rest + len(condition), rest + len(self._dropped(condition))]
        return TokenCounts(tokens=lengths[0], dropped_tokens=lengths[1], short_tokens=lengths[2], short_dropped_tokens=lengths[3])

    def length(self, sample: Sample, *, short_caption: bool = False, drop_condition: bool = False) -> int:
        """Tokens of `sample` as `encode` lays it out under these two draws."""
        counts = self.token_counts(sample)
        if drop_condition:
            return counts.short_dropped_tokens if short_caption else counts.dropped_tokens
        return counts.short_tokens if short_caption else counts.tokens

    def min_tokens(self, kind: Kind) -> int:
        """The length below which no document of `kind` can be truncated: its image, and the template around it."""
        if kind is Kind.GENERATION:
            return len(self._generation([]).ids) + sum(self._condition_markers())
        if kind is Kind.UNDERSTANDING:
            layout = self._dialogue((Turn(question="", answer=""),), self.template, image=True, prompt=True)
            return layout.und_start + self.image_slots + 1
        return 0

    def drops_condition(self, source: str, epoch: int, sample_index: int) -> bool:
        """Whether this document of a generation source loses its text condition (unconditional training)."""
        return document_uniform(self._seed, source, epoch, sample_index, "pad_dropout") < self._data.pad_dropout

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
        """The document of one sample; pictures are decoded here.

        Random choices are functions of (seed, source, epoch, sample_index); `held_out` makes none (whole caption, condition kept,
        centre crop). `max_tokens` truncates the text of a longer document, never its image.

        Raises:
            DataError: if the length is not `expected_tokens`, the index's: the index is stale.
            SkipSample: if the picture is undecodable, or truncation would leave nothing to learn.
        """
        layout = self._layout(
            sample,
            short_caption=short_caption and not held_out,
            drop_condition=not held_out and isinstance(sample, GenerationSample) and self.drops_condition(source, epoch, sample_index),
        )
        if expected_tokens is not None and len(layout.ids) != expected_tokens:
            raise DataError(
                f"stale index: {sample.info} has {len(layout.ids)} tokens, its index says {expected_tokens}; delete the shard's "
                ".jp-tokens sidecar, or run `jp-train data index` again"
            )
        if max_tokens is not None and len(layout.ids) > max_tokens:
            layout = self._truncate(layout, max_tokens)
        uniform = 0.5 if held_out else document_uniform(self._seed, source, epoch, sample_index, "crop")
        return self._finish(sample, layout, Crop.centre if held_out else self._data.crop, uniform)

    def generation_prompt_ids(self, caption: str, template: Template | str | None = None) -> list[int]:
        """The ids up to and including boi: what the image tokens are sampled after."""
        return [self.tokenizer.special.bos, *self._condition(caption, self._template(template)), self.tokenizer.special.boi]

    def unconditional_prompt_ids(self, caption: str, template: Template | str | None = None) -> list[int]:
        """The prompt of guidance's other branch: the condition dropped just as training drops it."""
        condition = self._dropped(self._condition(caption, self._template(template)))
        return [self.tokenizer.special.bos, *condition, self.tokenizer.special.boi]

    def understanding_prompt_ids(self, question: str, template: Template | str | None = None) -> list[int]:
        """The ids of a picture and a question, ending where the answer starts (its first token carries the space).

        The S image slots hold the image_placeholder id. An empty question asks for a caption, as a captioned sample does.
        """
        return self._dialogue((Turn(question=question, answer=""),), self._template(template), image=True, prompt=True).ids

    def text_prompt_ids(self, question: str, template: Template | str | None = None) -> list[int]:
        """The ids of a question without a picture, ending where the answer starts."""
        return self._dialogue((Turn(question=question, answer=""),), self._template(template), image=False, prompt=True).ids

    def _template(self, template: Template | str | None) -> Template:
        return self.template if template is None else Template(template)

    def _layout(self, sample: Sample, *, short_caption: bool = False, drop_condition: bool = False) -> _Layout:
        if isinstance(sample, GenerationSample):
            condition = self._condition(first_sentence(sample.caption) if short_caption else sample.caption, self.template)
            return self._generation(self._dropped(condition) if drop_condition else condition)
        if isinstance(sample, UnderstandingSample):
            return self._dialogue(sample.turns, self.template, image=True)
        if sample.turns and self.template is Template.stage3:
            return self._dialogue(sample.turns, self.template, image=False)
        text = sample.text if sample.text is not None else _plain_dialogue(sample.turns)
        special = self.tokenizer.special
        ids = [special.bos, *self.tokenizer.encode(text), special.eos]
        return _Layout(ids=ids, supervised=[False] + [True] * (len(ids) - 1))

    def _pieces(self, pieces: Sequence[int | str]) -> list[int]:
        """Ids of text and special ids; neighbouring texts are joined before encoding, as one string would be."""
        ids: list[int] = []
        text = ""
        for piece in pieces:
            if isinstance(piece, str):
                text += piece
                continue
            ids += self.tokenizer.encode(text)
            text = ""
            ids.append(piece)
        return ids + self.tokenizer.encode(text)

    def _dialogue(self, turns: Sequence[Turn], template: Template, *, image: bool, prompt: bool = False) -> _Layout:
        """Question-answer documents; with `prompt` it stops where the last answer would start."""
        tokenizer, data = self.tokenizer, self._data
        special = tokenizer.special
        user, assistant = tokenizer.role(tokenizer.user), tokenizer.role(tokenizer.assistant)
        picture = [special.boi, *[special.image_placeholder] * self.image_slots, special.eoi] if image else []
        chat = template is Template.stage3
        ids: list[int] = []
        supervised: list[bool] = []

        def add(pieces: Sequence[int | str], learn: bool) -> None:
            new = self._pieces(pieces)
            ids.extend(new)
            supervised.extend([learn] * len(new))

        if not chat:
            add([special.bos, *picture], False)
        for number, turn in enumerate(turns):
            last = number == len(turns) - 1
            question = turn.question
            if not question and number == 0 and image and template is not Template.stage1:
                question = data.caption_question
            if chat:
                lead: list[int | str] = []
                if number == 0:
                    lead = [special.bos, f"{data.system_prompt}\n\n"] if image and data.system_prompt else [special.bos]
                middle = [*picture, "\n"] if number == 0 and image else []
                add([*lead, user, ": ", *middle, question, "\n\n", assistant, ":"], False)
                gap = " "
            else:
                add([("\n" if number else "") + question], not data.mask_question)
                gap = " " if question or number else ""
            if prompt and last:
                break
            add([gap + turn.answer], True)
            if chat or last:
                add([special.eos], True)
        und_start = ids.index(special.boi) + 1 if image else None
        return _Layout(ids=ids, supervised=supervised, und_start=und_start)

    def _condition(self, caption: str, template: Template) -> list[int]:
        """The tokens between BOS and boi."""
        if template is not Template.stage3:
            return self.tokenizer.encode(caption)
        return self._pieces([self.tokenizer.role(self.tokenizer.user), ": ", caption, *self._condition_tail()])

    def _condition_markers(self) -> tuple[int, int]:
        """Tokens of the template before and after a caption."""
        if self.template is not Template.stage3:
            return 0, 0
        return len(self._pieces([self.tokenizer.role(self.tokenizer.user), ": "])), len(self._pieces(self._condition_tail()))

    def _condition_tail(self) -> list[int | str]:
        return ["\n\n", self.tokenizer.role(self.tokenizer.assistant), ": " if self._data.space_before_boi else ":"]

    def _dropped(self, condition: list[int]) -> list[int]:
        form, pad = self._data.pad_dropout_form, self.tokenizer.special.pad
        return [pad] * {PadDropoutForm.every_token: len(condition), PadDropoutForm.single_pad: 1, PadDropoutForm.empty: 0}[form]

    def _generation(self, condition: list[int]) -> _Layout:
        special, data = self.tokenizer.special, self._data
        end = {ImageEnd.eoi_eos: [special.eoi, special.eos], ImageEnd.eoi: [special.eoi], ImageEnd.none: []}[data.image_end]
        head = [special.bos, *condition, special.boi]
        ids = [*head, *[special.image_placeholder] * self.image_slots, *end]
        supervised = [False] * (len(head) + self.image_slots) + [data.supervise_eoi] * len(end)
        return _Layout(ids=ids, supervised=supervised, gen_start=len(head))

    def _truncate(self, layout: _Layout, max_tokens: int) -> _Layout:
        """Cut text until `max_tokens` remain: the end of a dialogue or text, or the end of a caption (the template around it
        stays)."""
        excess = len(layout.ids) - max_tokens
        if layout.gen_start is not None:
            lead, tail = self._condition_markers()
            cut_end = layout.gen_start - 1 - tail  # where the caption ends
            cut_start = cut_end - excess
            if cut_start < 1 + lead:
                raise SkipSample(f"the image and the template alone exceed data.seq_len {max_tokens}")
            return _Layout(
                ids=layout.ids[:cut_start] + layout.ids[cut_end:],
                supervised=layout.supervised[:cut_start] + layout.supervised[cut_end:],
                gen_start=layout.gen_start - excess,
            )
        if layout.und_start is not None and layout.und_start + self.image_slots + 1 > max_tokens:
            raise SkipSample(f"the image and what comes before it exceed data.seq_len {max_tokens}")
        if not any(layout.supervised[:max_tokens]):
            raise SkipSample(f"truncated to data.seq_len {max_tokens} tokens, nothing of its answers is left to learn")
        return _Layout(ids=layout.ids[:max_tokens], supervised=layout.supervised[:max_tokens], und_start=layout.und_start)

    def _finish(self, sample: Sample, layout: _Layout, crop: Crop, uniform: float) -> EncodedDocument:
        ids = np.array(layout.ids, np.int64)
        labels = np.full(len(ids), IGNORE_INDEX, np.int64)
        labels[:-1] = np.where(np.array(layout.supervised[1:], bool), ids[1:], IGNORE_INDEX)
        gen_labels = np.full(len(ids), IGNORE_INDEX, np.int64)
        none = np.zeros(0, np.int64)
        und_slots, gen_slots = none, none
        und_image = gen_image = vq_ids = None
        if isinstance(sample, UnderstandingSample):
            und_slots = np.arange(layout.und_start, layout.und_start + self.image_slots)
            und_image = load_understanding_image(sample.image, self._image_size, self._data.max_image_pixels)
        elif isinstance(sample, GenerationSample):
            gen_slots = np.arange(layout.gen_start, layout.gen_start + self.image_slots)
            if sample.vq_ids is not None:
                vq_ids = sample.vq_ids
                gen_labels[gen_slots - 1] = vq_ids  # boi predicts the first id, slot i predicts id i + 1
            else:
                gen_labels[gen_slots - 1] = PENDING_VQ_ID
                gen_image = load_generation_image(sample.image, self._image_size, crop, uniform, self._data.max_image_pixels)
        return EncodedDocument(
            info=sample.info,
            kind=kind_of(sample),
            input_ids=ids,
            labels=labels,
            gen_labels=gen_labels,
            und_slots=und_slots,
            gen_slots=gen_slots,
            und_image=und_image,
            gen_image=gen_image,
            vq_ids=vq_ids,
        )


def kind_of(sample: Sample) -> Kind:
    """The kind that a sample's type stands for."""
    if isinstance(sample, TextSample):
        return Kind.TEXT
    return Kind.UNDERSTANDING if isinstance(sample, UnderstandingSample) else Kind.GENERATION


def cut_text(document: EncodedDocument, start: int, length: int) -> EncodedDocument:
    """Tokens [start, start + length) of a text document; the label at the cut still names the token after it, so none is lost."""
    span = slice(start, start + length)
    return EncodedDocument(
        info=document.info,
        kind=document.kind,
        input_ids=document.input_ids[span],
        labels=document.labels[span],
        gen_labels=document.gen_labels[span],
        und_slots=document.und_slots,
        gen_slots=document.gen_slots,
    )


def _plain_dialogue(turns: Sequence[Turn]) -> str:
    return "\n".join(part for turn in turns for part in (turn.question, turn.answer))
