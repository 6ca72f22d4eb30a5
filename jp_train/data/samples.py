"""Tar members -> a typed sample, with strict checks: a field that is missing, doubled or malformed is a SkipSample.

Layouts ({key}.* are the members of one sample; members that no layout names are not read):

    understanding   {key}.png|jpg|jpeg|webp + {key}.json {"conversations": [{"from": "human", "value":
                    "<image>\\nquestion"},
                                                                             {"from": "gpt", "value": "answer"}, ...]}
                                             or {"caption": "..."}
    text            {key}.txt, or {key}.json {"text": "..."} or {"conversations": [...]} without <image>
    generation      {key}.png|jpg|jpeg|webp and/or {key}.vq.npy (uint16 [S]) + {key}.json {"caption": "..."}
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Collection
from functools import lru_cache
from typing import Any

import numpy as np

from jp_train.config.choices import ClassPrompt, Crop
from jp_train.config.schema import SourceConfig
from jp_train.errors import DataError, SkipSample
from jp_train.types import GenerationSample, Kind, RawSample, TextSample, Turn, UnderstandingSample

Sample = UnderstandingSample | TextSample | GenerationSample

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
TEXT_EXTENSIONS = ("json", "txt")
VQ_EXTENSION = "vq.npy"
IMAGE_MARKER = "<image>"

MAX_IMAGE_BYTES = 256 << 20
MAX_TEXT_BYTES = 16 << 20
"""Larger members are rejected before they are read: a row needs a few of them in memory at a time."""

_HUMAN, _MODEL = ("human", "user"), ("gpt", "assistant")
_SENTENCE = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s|$)|[。！？]+[”’」』）]*")


def needed_fields(kind: Kind, extensions: Collection[str], crop: Crop = Crop.centre) -> list[str]:
    """Which of a sample's fields must be read to make it.

    Stored VQ ids replace the image, except with a random crop: the ids are those of the centre crop.
    """
    images = [extension for extension in extensions if extension in IMAGE_EXTENSIONS]
    others = [
        extension for extension in extensions if extension == "json" or (extension == "txt" and kind is Kind.TEXT)
    ]
    if kind is Kind.GENERATION and VQ_EXTENSION in extensions:
        return [*others, *images] if images and crop is not Crop.centre else [*others, VQ_EXTENSION]
    return others + images


def check_field_size(extension: str, size: int) -> None:
    """Raises SkipSample for a member too large to be what its extension says."""
    limit = MAX_IMAGE_BYTES if extension in IMAGE_EXTENSIONS else MAX_TEXT_BYTES
    if size > limit:
        raise SkipSample(
            f".{extension} has {size} bytes, above the limit of {limit}: rejected before reading", "field_too_large"
        )


def parse_sample(raw: RawSample, kind: Kind, source: SourceConfig, *, image_slots: int, codebook_size: int) -> Sample:
    """The typed sample of `raw`; images stay undecoded, a class prompt of the source is applied to the caption. A
    stored record replaces the texts, which were checked when the record was made.

    Raises:
        SkipSample: with a reason a person can act on.
        DataError: for stored VQ ids (`raw.vq_ids`) that no image of this model can have.
    """
    if kind is Kind.TEXT:
        return _text(raw) if raw.token_ids is None else TextSample(info=raw.info, token_ids=raw.token_ids)
    image = _image(raw)
    if kind is Kind.UNDERSTANDING:
        if image is None:
            raise SkipSample(
                f"no image: expected one of {', '.join('.' + e for e in IMAGE_EXTENSIONS)}, found "
                f"{_extensions_of(raw)}",
                "missing_field",
            )
        turns = _understanding_turns(_json(raw)) if raw.token_ids is None else ()
        return UnderstandingSample(info=raw.info, image=image, turns=turns, token_ids=raw.token_ids)
    ids = raw.vq_ids
    if ids is None:
        ids = _vq_ids(raw, image_slots, codebook_size)
    elif len(ids) != image_slots or ids.max() >= codebook_size:
        raise DataError(
            f"the stored VQ ids of shard {raw.info.shard}, key {raw.info.key!r}, are {len(ids)} ids up to "
            f"{ids.max()}, this model has {image_slots} slots an image and {codebook_size} codes: their manifest is "
            "wrong; delete the shard's .jp-vq-* files and run `jp-train data encode-images` again"
        )
    if image is None and ids is None and not raw.image_fault:
        raise SkipSample(f"neither an image nor .{VQ_EXTENSION}: found {_extensions_of(raw)}", "missing_field")
    caption = apply_class_prompt(_string(_json(raw), "caption"), source) if raw.token_ids is None else ""
    return GenerationSample(
        info=raw.info,
        caption=caption,
        image=image if ids is None else None,
        vq_ids=ids,
        image_fault=raw.image_fault,
        token_ids=raw.token_ids,
    )


def apply_class_prompt(caption: str, source: SourceConfig) -> str:
    """ImageNet-style class names as prompts [12]: `tench, Tinca tinca` -> `tench`, or the template filled with it."""
    if source.class_prompt is ClassPrompt.as_is:
        return caption
    lemma = caption.split(",", 1)[0].strip()
    if not lemma:
        raise SkipSample(
            f"the caption {caption[:60]!r} has no text before its first comma (class_prompt: "
            f"{source.class_prompt.value})",
            "empty_text",
        )
    return lemma if source.class_prompt is ClassPrompt.first_lemma else source.class_template.replace("{}", lemma)


def first_sentence(caption: str) -> str:
    """The caption up to the end of its first sentence, or all of it: `.`, `!`, `?` before a space or the end, or their
    full-width forms."""
    caption = caption.strip()
    end = _SENTENCE.search(caption)
    return caption[: end.end()] if end else caption


def _extensions_of(raw: RawSample) -> str:
    return ", ".join(f".{extension}" for extension in raw.fields) or "no usable field"


def _image(raw: RawSample) -> bytes | None:
    present = [extension for extension in raw.fields if extension in IMAGE_EXTENSIONS]
    if len(present) > 1:
        raise SkipSample(
            f"several images in one sample: {', '.join('.' + extension for extension in present)}; one is expected",
            "extra_field",
        )
    return raw.fields[present[0]] if present else None


def _json(raw: RawSample) -> dict[str, Any]:
    if "json" not in raw.fields:
        raise SkipSample(f"no .json: found {_extensions_of(raw)}", "missing_field")
    try:
        value = json.loads(raw.fields["json"].decode("utf-8"))
    except UnicodeDecodeError as error:
        raise SkipSample(f"malformed .json: it is not UTF-8: {error}", "not_utf8") from None
    except (ValueError, RecursionError) as error:  # ValueError also stands for a number of more than 4300 digits
        raise SkipSample(f"malformed .json: {error}", "bad_json") from None
    if not isinstance(value, dict):
        raise SkipSample(f".json holds a {type(value).__name__}, expected an object", "bad_type")
    return value


def _checked(text: object, what: str, *, allow_empty: bool = False) -> str:
    if not isinstance(text, str):
        raise SkipSample(f"{what} is a {type(text).__name__}, expected text", "bad_type")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise SkipSample(f"{what} holds a lone surrogate: it is not valid Unicode text", "lone_surrogate") from None
    if not allow_empty and not text.strip():
        raise SkipSample(f"{what} is empty", "empty_text")
    return text


def _string(value: dict[str, Any], name: str) -> str:
    if name not in value:
        raise SkipSample(f'.json lacks "{name}"; it has {_keys(value)}', "missing_field")
    return _checked(value[name], f'"{name}"').strip()


def _keys(value: dict[str, Any]) -> str:
    return ", ".join(f'"{key}"' for key in list(value)[:8]) or "no keys"


def _understanding_turns(value: dict[str, Any]) -> tuple[Turn, ...]:
    if "conversations" not in value:
        if "caption" not in value:
            raise SkipSample(f'.json has neither "conversations" nor "caption"; it has {_keys(value)}', "missing_field")
        return (Turn(question="", answer=_string(value, "caption")),)
    questions, answers = _messages(value["conversations"])
    markers = [question.count(IMAGE_MARKER) for question in questions]
    if markers[0] != 1 or sum(markers) != 1:
        raise SkipSample(
            f"{IMAGE_MARKER} must occur once, in the first question; found {sum(markers)} ({markers[0]} in the first)",
            "bad_dialogue",
        )
    questions[0] = questions[0].replace(IMAGE_MARKER, "")
    return tuple(
        Turn(question=question.strip(), answer=answer) for question, answer in zip(questions, answers, strict=True)
    )


def _messages(messages: object) -> tuple[list[str], list[str]]:
    if not isinstance(messages, list) or not messages or len(messages) % 2:
        raise SkipSample(
            '"conversations" must be a list of alternating human and gpt messages that ends with an answer',
            "bad_dialogue",
        )
    questions: list[str] = []
    answers: list[str] = []
    for number, message in enumerate(messages):
        speakers, sink = ((_HUMAN, questions), (_MODEL, answers))[number % 2]
        if not isinstance(message, dict) or message.get("from") not in speakers:
            speaker = message.get("from") if isinstance(message, dict) else message
            raise SkipSample(
                f'message {number + 1} of "conversations" is from {str(speaker)[:40]!r}, expected {speakers[0]!r}',
                "bad_dialogue",
            )
        # A question may be empty: a conversation that only shows the image is a caption.
        sink.append(_checked(message.get("value"), f"message {number + 1}", allow_empty=number % 2 == 0).strip())
    return questions, answers


def _text(raw: RawSample) -> TextSample:
    present = [extension for extension in raw.fields if extension in IMAGE_EXTENSIONS]
    if present:
        raise SkipSample(
            f"a text sample has an image (.{present[0]}); give the source kind understanding, or take the image out",
            "extra_field",
        )
    if ("txt" in raw.fields) == ("json" in raw.fields):
        fault = "extra_field" if "txt" in raw.fields else "missing_field"
        raise SkipSample(f"a text sample needs either .txt or .json, found {_extensions_of(raw)}", fault)
    if "txt" in raw.fields:
        try:
            return TextSample(info=raw.info, text=_checked(raw.fields["txt"].decode("utf-8"), ".txt"))
        except UnicodeDecodeError as error:
            raise SkipSample(f".txt is not UTF-8: {error}", "not_utf8") from None
    value = _json(raw)
    if ("text" in value) == ("conversations" in value):
        fault = "extra_field" if "text" in value else "missing_field"
        raise SkipSample(f'.json needs either "text" or "conversations"; it has {_keys(value)}', fault)
    if "text" in value:
        return TextSample(info=raw.info, text=_checked(value["text"], '"text"'))
    questions, answers = _messages(value["conversations"])
    if any(IMAGE_MARKER in question for question in questions):
        raise SkipSample(f"a conversation of a text source refers to an image ({IMAGE_MARKER})", "bad_dialogue")
    if not all(questions):
        raise SkipSample("a question of a text conversation is empty", "empty_text")
    return TextSample(
        info=raw.info, turns=tuple(Turn(question=q, answer=a) for q, a in zip(questions, answers, strict=True))
    )


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
