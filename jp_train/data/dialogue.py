"""Conversations as public sets write them -> questions and answers, and where their images stand.

Messages have `from` or `role`, and `value`, `content` or `text`; roles in any case; content may be a list of parts as
OpenAI's interface has them; `{"user": ..., "assistant": ...}` pairs are two messages. A first message of the system is
kept apart, a last question without an answer is dropped. Everything else that is no alternation of questions and
answers is a SkipSample that says which message is at fault.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jp_train.errors import SkipSample
from jp_train.types import IMAGE_MARKER, Turn

_ROLES = {
    **dict.fromkeys(("human", "user", "<|user|>"), "human"),
    **dict.fromkeys(("gpt", "assistant", "model", "<|assistant|>"), "gpt"),
    "system": "system",
}
_MARKERS = re.compile(r"<image>|<image_placeholder>|<\|image\|>", re.IGNORECASE)
"""Other words for IMAGE_MARKER, in a conversation that has none."""
MEDIA_MARKER = re.compile(r"<(image|img|video|audio|img_context)>", re.IGNORECASE)
"""What stands in questions for an image, a video or sound."""
IMAGE_PARTS = ("image", "image_url", "input_image")
DROPPED_QUESTION, IMAGE_FIRST = "last question without an answer dropped", "image put first, as no <image> says where"


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Questions and answers in order, stripped; `system` is the first message where it is the system's; `notes` say
    what was changed to read it."""

    questions: tuple[str, ...]
    answers: tuple[str, ...]
    system: str = ""
    notes: tuple[str, ...] = ()

    def turns(self) -> tuple[Turn, ...]:
        """Each question with its answer."""
        return tuple(Turn(question=q, answer=a) for q, a in zip(self.questions, self.answers, strict=True))

    def with_images(self, images: int) -> Dialogue:
        """The same with each image in its place: at its IMAGE_MARKER in a question, or before the first question,
        which then has none.

        That is where an only image of the first question is put as well, wherever its marker stands. Raises SkipSample
        for another number of markers than of images.
        """
        counts = [question.count(IMAGE_MARKER) for question in self.questions]
        if sum(counts) not in (0, images):
            where = ", ".join(f"{count} in question {number}" for number, count in enumerate(counts, 1) if count)
            raise SkipSample(
                f"{sum(counts)} {IMAGE_MARKER} for {images} image{'s' * (images > 1)} ({where}); give one for each, or "
                "none at all",
                "bad_dialogue",
            )
        if not sum(counts):
            self.refuse_media()
        if images == 1 and counts[0] == 1:
            first = self.questions[0].replace(IMAGE_MARKER, "").strip()
            return Dialogue((first, *self.questions[1:]), self.answers, self.system, self.notes)
        notes = self.notes if sum(counts) else (*self.notes, IMAGE_FIRST)
        return Dialogue(self.questions, self.answers, self.system, notes)

    def refuse_media(self) -> None:
        """Raises SkipSample for a question with the place of an image, a video or sound."""
        for question in self.questions:
            if marker := MEDIA_MARKER.search(question):
                raise SkipSample(f"a question has {marker[0]}, and there is nothing that it stands for", "bad_dialogue")


def parse_dialogue(value: object) -> Dialogue:
    """The questions and answers of a conversation. Raises SkipSample with the message at fault."""
    messages = _messages(value)
    system = ""
    notes: tuple[str, ...] = ()
    if messages and messages[0][0] == "system":
        system = checked_text(messages.pop(0)[1], "the system's message", allow_empty=True).strip()
    if len(messages) % 2 and messages[-1][0] == "human" and len(messages) > 1:
        messages.pop()
        notes = (DROPPED_QUESTION,)
    if not messages or len(messages) % 2:
        raise SkipSample(
            f"a conversation must be a list of alternating human and gpt messages that ends with an answer; this one "
            f"has {' '.join(role for role, _ in messages) or 'none'}",
            "bad_dialogue",
        )
    texts: dict[str, list[str]] = {"human": [], "gpt": []}
    for number, (role, text) in enumerate(messages):
        expected = ("human", "gpt")[number % 2]
        if role != expected:
            raise SkipSample(
                f"message {number + 1} of the conversation is from {role!r}, expected {expected!r}", "bad_dialogue"
            )
        # A question may be empty: a conversation that only shows the image is a caption.
        text = checked_text(text, f"message {number + 1}", allow_empty=role == "human").strip()
        texts[role].append(text)
    return Dialogue(with_our_markers(texts["human"]), tuple(texts["gpt"]), system, notes)


def checked_text(text: object, what: str, *, allow_empty: bool = False) -> str:
    """`text` if it is valid Unicode that is not blank. Raises SkipSample, which names it as `what`."""
    if not isinstance(text, str):
        raise SkipSample(f"{what} is a {type(text).__name__}, expected text", "bad_type")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise SkipSample(f"{what} holds a lone surrogate: it is not valid Unicode text", "lone_surrogate") from None
    if not allow_empty and not text.strip():
        raise SkipSample(f"{what} is empty", "empty_text")
    return text


def _messages(value: object) -> list[tuple[str, Any]]:
    """(role, text) of each message."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise SkipSample(f"the conversation is text that is no JSON: {error}", "bad_dialogue") from None
    if not isinstance(value, list):
        raise SkipSample(f"the conversation is a {type(value).__name__}, expected a list of messages", "bad_dialogue")
    messages: list[tuple[str, Any]] = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, Mapping):
            raise SkipSample(
                f"message {number} of the conversation is a {type(message).__name__}, expected an object with "
                '"from" and "value", or "role" and "content"',
                "bad_dialogue",
            )
        if "user" in message and "assistant" in message:
            messages += [("human", message["user"]), ("gpt", message["assistant"])]
            continue
        messages.append((_role(message, number), content_of(message, number)))
    return messages


def _role(message: Mapping[str, Any], number: int) -> str:
    speaker = message.get("from", message.get("role"))
    role = _ROLES.get(speaker.strip().lower()) if isinstance(speaker, str) else None
    if role is None:
        raise SkipSample(
            f"message {number} of the conversation is from {str(speaker)[:40]!r}, expected 'human' or 'gpt' (user, "
            "assistant, system)",
            "bad_dialogue",
        )
    return role


def content_of(message: Mapping[str, Any], number: int) -> Any:
    """What message `number` says; parts of content as one text, with IMAGE_MARKER for images. Raises SkipSample for a
    part that is neither, and for an image that is not in a question."""
    content = next((message[key] for key in ("value", "content", "text") if message.get(key) is not None), None)
    if not isinstance(content, list):
        return content
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in IMAGE_PARTS:
            if (role := _role(message, number)) != "human":
                raise SkipSample(
                    f"message {number} is from {role!r} and has an image; only questions have", "bad_dialogue"
                )
            parts.append(IMAGE_MARKER)
        elif kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            parts.append(part["text"])
        else:
            raise SkipSample(
                f"message {number} has a part of type {str(kind)[:40]!r}; text and images are read", "bad_dialogue"
            )
    return "\n".join(parts)


def with_our_markers(questions: Sequence[str]) -> tuple[str, ...]:
    """The questions with IMAGE_MARKER for other words that stand for an image; unchanged where one has ours."""
    if any(IMAGE_MARKER in question for question in questions):
        return tuple(questions)
    return tuple(_MARKERS.sub(IMAGE_MARKER, question) for question in questions)
