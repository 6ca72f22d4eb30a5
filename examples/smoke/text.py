"""The text of the smoke run: the English reference of the Python language, which ships inside Python as
``pydoc_data.topics``."""

from __future__ import annotations

import pydoc_data.topics
import re
import textwrap
from dataclasses import dataclass

from examples.smoke.seeding import generator

DOCUMENT_CHARACTERS = 80
"""Documents are runs of whole sentences of about this many characters, so that they are of a length with the other
kinds."""
MAX_SENTENCE_CHARACTERS = 160
"""A longer sentence is cut between words: grammars and tables of thousands of characters would fill whole steps with
text."""
MAX_ANSWER_CHARACTERS = 80
CONVERSATION_QUESTIONS = ('What does Python say about "{}"?', 'Explain "{}" in Python.', 'Tell me about "{}".')

_WRAPPER = textwrap.TextWrapper(MAX_SENTENCE_CHARACTERS, break_long_words=False, break_on_hyphens=False)
_RULE = re.compile(r"^[*=~\-^\"]{4,}$", re.MULTILINE)
_SENTENCE_END = re.compile(r"(?<=[.:;!?]) ")
_SPACES = re.compile(r"[ \t]*\n[ \t]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Topic:
    """One topic: its key, and its paragraphs (each a single line without markup rules)."""

    key: str
    title: str
    paragraphs: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """One question about Python and its answer."""

    question: str
    answer: str


def load_topics() -> tuple[Topic, ...]:
    """All topics of the running Python's reference in alphabetical order."""
    topics = []
    for key in sorted(pydoc_data.topics.topics):
        blocks = [
            _SPACES.sub(" ", block).strip() for block in _RULE.sub("", pydoc_data.topics.topics[key]).split("\n\n")
        ]
        paragraphs = tuple(block for block in blocks if block)
        if len(paragraphs) > 1:
            topics.append(Topic(key=key, title=paragraphs[0].replace(chr(34), ""), paragraphs=paragraphs[1:]))
    return tuple(topics)


def split_documents(seed: int, *, held_out_share: float = 0.1) -> tuple[list[str], list[str]]:
    """Return training and held-out documents of about 80 characters, cut at sentence ends.

    Which documents are held out depends on the seed and their position only.

    Raises:
        ValueError: if ``held_out_share`` is not between 0 and 1.
    """
    if not 0 < held_out_share < 1:
        raise ValueError(f"held_out_share must be between 0 and 1, got {held_out_share}")
    documents: list[str] = []
    for topic in load_topics():
        pending = ""
        for paragraph in topic.paragraphs:
            sentences = (part for sentence in _SENTENCE_END.split(paragraph) for part in _WRAPPER.wrap(sentence))
            for sentence in sentences:
                if pending and len(pending) + len(sentence) > DOCUMENT_CHARACTERS:
                    documents.append(pending)
                    pending = ""
                pending += (" " if pending and not pending.endswith("\n") else "") + sentence
            pending += "\n"
        if pending.strip():
            documents.append(pending)
    documents = list(dict.fromkeys(d.strip() for d in documents))  # some topics repeat sections of others
    held_out = generator(seed, "text", "held-out").random(len(documents)) < held_out_share
    train = [d for d, out in zip(documents, held_out, strict=True) if not out]
    return train, [d for d, out in zip(documents, held_out, strict=True) if out]


def _first_sentences(paragraph: str) -> str:
    """Whole sentences of the paragraph up to the answer limit; at least the first, cut if it alone is too long."""
    sentences = _SENTENCE_END.split(paragraph)
    answer = sentences[0]
    for sentence in sentences[1:]:
        if len(answer) + 1 + len(sentence) > MAX_ANSWER_CHARACTERS:
            break
        answer += " " + sentence
    return answer[:MAX_ANSWER_CHARACTERS]


def split_conversations(seed: int, *, held_out_share: float = 0.1) -> tuple[list[Conversation], list[Conversation]]:
    """Return training and held-out conversations: every paragraph of a topic answers one question about the topic.

    No two conversations have the same answer, so none is on both sides of the split. There is one conversation a
    paragraph, and not many a topic: with few distinct answers a run of minutes memorises them, and its held-out
    loss rises.
    """
    sides: tuple[list[Conversation], list[Conversation]] = ([], [])
    seen: set[str] = set()
    for topic in load_topics():
        for paragraph in topic.paragraphs:
            answer = _first_sentences(paragraph)
            if answer in seen:
                continue
            seen.add(answer)
            rng = generator(seed, "dialogue", answer)
            held_out = rng.random() < held_out_share
            wording = CONVERSATION_QUESTIONS[int(rng.integers(len(CONVERSATION_QUESTIONS)))]
            sides[held_out].append(Conversation(question=wording.format(topic.title), answer=answer))
    return sides
