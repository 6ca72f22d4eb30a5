"""A sample -> the parts of its document, for every layout of the table in docs/model.md, before
tokenisation.

    text, stages 1 and 2     BOS text EOS                                                   all text and EOS supervised
    text, stage 3            BOS <|User|>: question \\n\\n<|Assistant|>: answer EOS ...          answers and their EOS
    understanding, stage 1   BOS boi [S] eoi caption EOS                                    the text and EOS
    understanding, stage 2   BOS boi [S] eoi question " " answer EOS                        the same (mask_question:
        answers and EOS)
    understanding, stage 3   BOS system \\n\\n<|User|>: boi [S] eoi \\n question \\n\\n<|Assistant|>: answer EOS ...
                                                                                            answers and their EOS
    generation, stages 1, 2  BOS caption boi [S] eoi EOS                                    the S image tokens
    generation, stage 3      BOS <|User|>: caption \\n\\n<|Assistant|>: boi [S] eoi EOS         the S image tokens

Decisions where the paper is silent: an answer begins with one space (it is what the prompt `<|Assistant|>:` leads to at
inference); a caption without a question is asked `data.caption_question` from stage 2 on; further turns of a stage 1
or 2 conversation start on a new line; a conversation of a text source is plain lines in stages 1 and 2; plain text in
stage 3 is laid out and supervised as in stage 2. All tokens stay in the input, the last one too, so a document is as
long as the layout's row in the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jp_train.config.choices import ImageEnd, PadDropoutForm, Template
from jp_train.config.schema import RunConfig
from jp_train.data.dialogue import Dialogue, with_our_markers
from jp_train.data.samples import Sample, first_sentence
from jp_train.data.tokenizer import Tokenizer
from jp_train.types import IMAGE_MARKER, GenerationSample, SpecialTokens, TextSample, Turn, UnderstandingSample

READ, LEARN, ASK, PAD = 0, 1, 2, 3
"""What a part is: input only; supervised by the text head; a question, which is either; input of which only the
number of tokens is kept, as pads."""


@dataclass(frozen=True, slots=True)
class ImageBlock:
    """boi, the slots of an image, and (understanding) eoi, as one part of a document: `ids` int32; the first slot
    is its second."""

    ids: np.ndarray


Part = tuple[str | int | ImageBlock | np.ndarray, int]
"""A text, a special id, an image block or stored ids, and the role. Each text is tokenised by itself; none is empty."""


class Layouts:
    """Lays out the samples of one stage, and the prompts of inference."""

    def __init__(self, cfg: RunConfig, tokenizer: Tokenizer, image_slots: int) -> None:
        self.template = cfg.stage.template
        self._data = cfg.data
        self._special: SpecialTokens = tokenizer.special
        self._user, self._assistant = tokenizer.role(tokenizer.user), tokenizer.role(tokenizer.assistant)
        special = tokenizer.special
        slots = [special.image_placeholder] * image_slots
        self.understanding_block = ImageBlock(np.array([special.boi, *slots, special.eoi], np.int32))
        self._generation_block = ImageBlock(np.array([special.boi, *slots], np.int32))
        end = {ImageEnd.eoi_eos: [special.eoi, special.eos], ImageEnd.eoi: [special.eoi], ImageEnd.none: []}[
            cfg.data.image_end
        ]
        after = LEARN if cfg.data.supervise_eoi else READ
        self._image_end: list[Part] = [(token, after) for token in end]

    def parts(self, sample: Sample, *, short_caption: bool = False, drop_condition: bool = False) -> list[Part]:
        """The parts of a training document."""
        if isinstance(sample, GenerationSample):
            caption = first_sentence(sample.caption) if short_caption else sample.caption
            return self.generation(self.dropped(self.condition(caption)) if drop_condition else self.condition(caption))
        if isinstance(sample, UnderstandingSample):
            if sample.text is not None:
                pieces = self._in_place(sample.text, LEARN)
                return [(self._special.bos, READ), *pieces, (self._special.eos, LEARN)]
            system = sample.system or self._data.system_prompt
            return self._conversation(sample.turns, self.template, images=len(sample.images), system=system)
        if sample.turns and self.template is Template.stage3:
            return self._conversation(sample.turns, self.template, images=0, system=sample.system)
        text = sample.text if sample.text is not None else _plain_conversation(sample)
        return [(self._special.bos, READ), *_texts([text], LEARN), (self._special.eos, LEARN)]

    def condition(self, caption: str, template: Template | None = None) -> list[Part]:
        """The parts between BOS and boi."""
        if (template or self.template) is not Template.stage3:
            return _texts([caption], READ)
        return _texts([self._user, ": ", caption, *self._condition_tail()], READ)

    def condition_lead(self) -> list[Part]:
        """The template before a caption."""
        return _texts([self._user, ": "], READ) if self.template is Template.stage3 else []

    def condition_tail(self) -> list[Part]:
        """The template between a caption and boi."""
        return _texts(self._condition_tail(), READ) if self.template is Template.stage3 else []

    def dropped(self, condition: list[Part]) -> list[Part]:
        """What stands for a condition that is dropped."""
        form = self._data.pad_dropout_form
        if form is PadDropoutForm.every_token:
            return [(piece, PAD) for piece, _ in condition]
        return [(self._special.pad, READ)] if form is PadDropoutForm.single_pad else []

    def generation(self, condition: list[Part]) -> list[Part]:
        """A generation document with this condition."""
        return [(self._special.bos, READ), *condition, (self._generation_block, READ), *self._image_end]

    def generation_prompt(self, condition: list[Part]) -> list[Part]:
        """What the image tokens are sampled after."""
        return [(self._special.bos, READ), *condition, (self._special.boi, READ)]

    def question_prompt(self, question: str, template: Template, images: int = 1) -> list[Part]:
        """An understanding document up to where its answer starts; the images stand where they do in training
        (`Dialogue.with_images`). Raises SkipSample for another number of IMAGE_MARKERs than of images."""
        placed = Dialogue(with_our_markers([question]), ("",)).with_images(images)
        return self._conversation(placed.turns(), template, images=images, system=self._data.system_prompt, prompt=True)

    def _condition_tail(self) -> list[str | int]:
        return ["\n\n", self._assistant, ": " if self._data.space_before_boi else ":"]

    def _conversation(
        self, turns: Sequence[Turn], template: Template, *, images: int, system: str, prompt: bool = False
    ) -> list[Part]:
        """Question-answer documents; with `prompt` it stops where the last answer would start. The images stand where
        the questions say, else before the first."""
        special, data = self._special, self._data
        chat = template is Template.stage3
        first = 0 if any(IMAGE_MARKER in turn.question for turn in turns) else images
        blocks: list[str | int | ImageBlock] = [self.understanding_block] * first
        parts: list[Part] = [] if chat else _texts([special.bos, *blocks], READ)
        for number, turn in enumerate(turns):
            last = number == len(turns) - 1
            question = turn.question
            if not question and number == 0 and images and template is not Template.stage1:
                question = data.caption_question
            if chat:
                lead: list[str | int] = []
                if number == 0:
                    lead = [special.bos, f"{system}\n\n"] if system else [special.bos]
                middle = [*blocks, "\n"] if number == 0 and first else []
                asked = self._placed(question)
                parts += _texts([*lead, self._user, ": ", *middle, *asked, "\n\n", self._assistant, ":"], READ)
                gap = " "
            else:
                parts += self._in_place(("\n" if number else "") + question, ASK)
                gap = " " if question or number else ""
            if prompt and last:
                break
            parts += _texts([gap + turn.answer], LEARN)
            if chat or last:
                parts.append((special.eos, LEARN))
        return parts

    def _placed(self, text: str) -> list[str | int | ImageBlock]:
        """A text and the images that stand in it."""
        before, *rest = text.split(IMAGE_MARKER)
        return [before, *(piece for part in rest for piece in (self.understanding_block, part))]

    def _in_place(self, text: str, role: int) -> list[Part]:
        """The parts of a text of this role, and of the images that stand in it."""
        parts = _texts(self._placed(text), role)
        return [(piece, READ if isinstance(piece, ImageBlock) else role) for piece, role in parts]


def _texts(pieces: Sequence[str | int | ImageBlock], role: int) -> list[Part]:
    """Parts of one role; neighbouring texts are joined, so that they are tokenised as one string would be."""
    parts: list[Part] = []
    text = ""
    for piece in pieces:
        if isinstance(piece, str):
            text += piece
            continue
        if text:
            parts.append((text, role))
            text = ""
        parts.append((piece, role))
    if text:
        parts.append((text, role))
    return parts


def _plain_conversation(sample: TextSample) -> str:
    return "\n".join(part for turn in sample.turns for part in (turn.question, turn.answer))
