"""Tar members -> a typed sample, with strict checks: a field that is missing, doubled or malformed is a SkipSample.

What a sample is made of ({key}.* are its members; where the texts lie, says field_map.py; other members are not read):

    understanding   an image, and a dialogue [{"from": "human", "value": "<image>\\nquestion"},
                    {"from": "gpt", "value": "answer"}, ...], a question and an answer, or a caption
    text            a text, or a dialogue without <image>
    generation      an image and/or {key}.vq.npy (uint16 [S]), and a caption
"""

from __future__ import annotations

import io
import re
from functools import lru_cache

import numpy as np

from jp_train.config.choices import ClassPrompt
from jp_train.config.fields import ALL
from jp_train.data.dialogue import Dialogue, checked_text, parse_dialogue
from jp_train.data.field_map import IMAGE_EXTENSIONS, VQ_EXTENSION, FieldMap, Fields
from jp_train.errors import DataError, SkipSample
from jp_train.types import IMAGE_MARKER, GenerationSample, Kind, RawSample, TextSample, Turn, UnderstandingSample

Sample = UnderstandingSample | TextSample | GenerationSample

MAX_IMAGE_BYTES = 256 << 20
MAX_TEXT_BYTES = 16 << 20
"""Larger members are rejected before they are read: a row needs a few of them in memory at a time."""

_SENTENCE = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s|$)|[。！？]+[”’」』）]*")


def check_field_size(extension: str, size: int) -> None:
    """Raises SkipSample for a member too large to be what its extension says."""
    limit = MAX_IMAGE_BYTES if extension.rpartition(".")[2] in IMAGE_EXTENSIONS else MAX_TEXT_BYTES
    if size > limit:
        raise SkipSample(
            f".{extension} has {size} bytes, above the limit of {limit}: rejected before reading", "field_too_large"
        )


def parse_sample(raw: RawSample, fields: FieldMap, *, image_slots: int, codebook_size: int, variant: int = 0) -> Sample:
    """The typed sample of `raw`, with the caption of number `variant`; arguments and errors as for `parse_variants`. A
    stored record (`raw.token_ids`) replaces the texts, which were checked when it was made."""
    if raw.token_ids is None:
        return parse_variants(Fields(raw, fields), image_slots=image_slots, codebook_size=codebook_size)[variant]
    if fields.kind is Kind.TEXT:
        return TextSample(info=raw.info, token_ids=raw.token_ids)
    if fields.kind is Kind.UNDERSTANDING:
        return UnderstandingSample(info=raw.info, images=_images(raw, fields), token_ids=raw.token_ids)
    image, ids = _image_and_ids(raw, fields, image_slots, codebook_size)
    return GenerationSample(
        info=raw.info, caption="", image=image, vq_ids=ids, image_fault=raw.image_fault, token_ids=raw.token_ids
    )


def parse_variants(texts: Fields, *, image_slots: int, codebook_size: int) -> list[Sample]:
    """The typed samples that the files of a sample can be: one for each caption, of which every epoch draws one.

    Images stay undecoded, a class prompt of the source is applied to captions.

    Raises:
        SkipSample: with a reason a person can act on.
        DataError: for stored VQ ids (`texts.raw.vq_ids`) that no image of this model can have.
    """
    raw, fields = texts.raw, texts.map
    if fields.kind is Kind.TEXT:
        return [_text(texts)]
    if fields.kind is Kind.UNDERSTANDING:
        return _understanding(texts, _images(raw, fields, texts))
    image, ids = _image_and_ids(raw, fields, image_slots, codebook_size, texts)
    return [
        GenerationSample(
            info=raw.info,
            caption=apply_class_prompt(text, fields),
            image=image,
            vq_ids=ids,
            image_fault=raw.image_fault,
        )
        for text in _captions(texts)
    ]


def _images(raw: RawSample, fields: FieldMap, texts: Fields | None = None) -> tuple[bytes, ...]:
    """Of an understanding sample, one at least; `texts` where they have been looked for."""
    images = tuple([raw.fields[extension] for extension in fields.images(raw.fields)])
    if not images:
        names = [name for names in fields.image for name in names] or IMAGE_EXTENSIONS
        raise SkipSample(
            f"no image: expected one of {', '.join('.' + name for name in names)}, found "
            f"{(texts or Fields(raw, fields)).present()}",
            "missing_field",
        )
    return images


def _image_and_ids(
    raw: RawSample, fields: FieldMap, image_slots: int, codebook_size: int, texts: Fields | None = None
) -> tuple[bytes | None, np.ndarray | None]:
    """Of a generation sample; the image only where there are no ids. `texts` as in `_images`."""
    names = fields.images(raw.fields)
    ids = raw.vq_ids
    if ids is None:
        ids = _vq_ids(raw, image_slots, codebook_size)
    elif len(ids) != image_slots or ids.max() >= codebook_size:
        raise DataError(
            f"the stored VQ ids of shard {raw.info.shard}, key {raw.info.key!r}, are {len(ids)} ids up to "
            f"{ids.max()}, this model has {image_slots} slots an image and {codebook_size} codes: their manifest is "
            "wrong; delete the shard's .jp-vq-* files and run `jp-train data encode-images` again"
        )
    if not names and ids is None and not raw.image_fault:
        found = (texts or Fields(raw, fields)).present()
        raise SkipSample(f"neither an image nor .{VQ_EXTENSION}: found {found}", "missing_field")
    return (raw.fields[names[0]] if names and ids is None else None), ids


def apply_class_prompt(caption: str, fields: FieldMap) -> str:
    """ImageNet-style class names as prompts [12]: `tench, Tinca tinca` -> `tench`, or the template filled with it."""
    if fields.class_prompt is ClassPrompt.as_is:
        return caption
    lemma = caption.split(",", 1)[0].strip()
    if not lemma:
        raise SkipSample(
            f"the caption {caption[:60]!r} has no text before its first comma (class_prompt: "
            f"{fields.class_prompt.value})",
            "empty_text",
        )
    return lemma if fields.class_prompt is ClassPrompt.first_lemma else fields.class_template.replace("{}", lemma)


def first_sentence(caption: str) -> str:
    """The caption up to the end of its first sentence, or all of it: `.`, `!`, `?` before a space or the end, or their
    full-width forms."""
    caption = caption.strip()
    end = _SENTENCE.search(caption)
    return caption[: end.end()] if end else caption


def _captions(texts: Fields) -> list[str]:
    """All captions of a sample, stripped: usually one."""
    found = texts.first("caption")
    if found is None:
        raise texts.absent("caption")
    place, value = found
    if isinstance(value, list) and ALL in (place.path or ()):
        return [checked_text(text, f"entry {number} of {place}").strip() for number, text in enumerate(value)]
    return [checked_text(value, str(place)).strip()]


def _understanding(texts: Fields, images: tuple[bytes, ...]) -> list[Sample]:
    """The samples of these images and their texts, one for each caption."""
    info = texts.raw.info
    found = texts.first("conversations")
    if found is not None:
        dialogue = parse_dialogue(found[1]).with_images(len(images))
        texts.notes += dialogue.notes
        system = dialogue.system or _system(texts)
        return [UnderstandingSample(info=info, images=images, turns=dialogue.turns(), system=system)]
    if (pair := _question(texts)) is not None:
        dialogue = Dialogue((pair.question,), (pair.answer,)).with_images(len(images))
        return [UnderstandingSample(info=info, images=images, turns=dialogue.turns(), system=_system(texts))]
    if texts.first("caption") is not None:
        captions = _captions(texts)
        return [UnderstandingSample(info=info, images=images, turns=(Turn(question="", answer=c),)) for c in captions]
    text = texts.first("text")
    if text is None:
        raise texts.absent("conversations", "caption", "text")
    written = checked_text(text[1], str(text[0]))
    if written.count(IMAGE_MARKER) != len(images):
        raise SkipSample(
            f"{text[0]} has {written.count(IMAGE_MARKER)} {IMAGE_MARKER} for {len(images)} images; give one for each",
            "bad_dialogue",
        )
    return [UnderstandingSample(info=info, images=images, text=written)]


def _system(texts: Fields) -> str:
    found = texts.first("system")
    return "" if found is None else checked_text(found[1], str(found[0]), allow_empty=True).strip()


def _question(texts: Fields) -> Turn | None:
    """The question and answer of a sample that has them apart; None when the source names no such fields."""
    question, answer = texts.first("question"), texts.first("answer")
    if question is None and answer is None:
        return None
    if question is None or answer is None:
        raise texts.absent("question" if question is None else "answer")
    return Turn(
        question=checked_text(question[1], str(question[0])).strip(),
        answer=checked_text(answer[1], str(answer[0])).strip(),
    )


def _text(texts: Fields) -> TextSample:
    raw = texts.raw
    present = [extension for extension in raw.fields if extension in IMAGE_EXTENSIONS]
    if present:
        raise SkipSample(
            f"a text sample has an image (.{present[0]}); give the source kind understanding, or take the image out",
            "extra_field",
        )
    text, dialogue, pair = texts.first("text"), texts.first("conversations"), _question(texts)
    if sum(part is not None for part in (text, dialogue, pair)) > 1 or (
        {"txt", "json"} <= set(raw.fields) and not texts.map.configured
    ):
        raise SkipSample(f"a text sample has one text or dialogue, found {texts.present()}", "extra_field")
    if text is not None:
        return TextSample(info=raw.info, text=checked_text(text[1], str(text[0])))
    if pair is not None:
        Dialogue((pair.question,), (pair.answer,)).refuse_media()
        return TextSample(info=raw.info, turns=(pair,), system=_system(texts))
    if dialogue is None:
        raise texts.absent("text", "conversations")
    read = parse_dialogue(dialogue[1])
    read.refuse_media()
    if not all(read.questions):
        raise SkipSample("a question of a text conversation is empty", "empty_text")
    texts.notes += read.notes
    return TextSample(info=raw.info, turns=read.turns(), system=read.system or _system(texts))


@lru_cache(maxsize=8)
def _npy_header(count: int) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<u2", "fortran_order": False, "shape": (count,)})
    return file.getvalue()


def _vq_ids(raw: RawSample, image_slots: int, codebook_size: int) -> np.ndarray | None:
    if VQ_EXTENSION not in raw.fields:
        return None
    data = raw.fields[VQ_EXTENSION]
    header = _npy_header(image_slots)
    if data.startswith(header) and len(data) == len(header) + 2 * image_slots:  # as numpy writes it: no header to parse
        ids = np.frombuffer(data, "<u2", offset=len(header))
        if ids.max() < codebook_size:
            return ids
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)  # checked before an array of the declared size is allocated
        if shape != (image_slots,) or dtype != np.uint16:
            raise SkipSample(
                f".{VQ_EXTENSION} is {dtype} {list(shape)}, expected uint16 [{image_slots}]; encode the images again",
                "bad_vq_ids",
            )
        file.seek(0)
        ids = np.load(file, allow_pickle=False)
    except SkipSample:
        raise
    except Exception as error:
        # numpy parses the header as Python source: broken bytes raise SyntaxError, TokenError, ValueError, ...
        raise SkipSample(f".{VQ_EXTENSION} cannot be read: {str(error)[:200]}", "bad_vq_ids") from None
    if int(ids.max()) >= codebook_size:
        raise SkipSample(
            f".{VQ_EXTENSION} holds id {int(ids.max())}, but the codebook has {codebook_size}; it belongs to another "
            "VQ model",
            "bad_vq_ids",
        )
    return ids
