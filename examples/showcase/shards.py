"""Write the showcase's WebDataset shards: emoji in three styles for both directions, WordNet's glosses as text.

Per style ``emoji-{style}-gen`` (captions) and ``emoji-{style}-und`` (questions about name, kind and style, and
descriptions); ``text`` (a gloss a document) and ``text-dialogues`` (what a word means). Two things are kept from
training:

- *names*: no drawing of them in any style, no caption with them; ``emoji-{style}-gen-val`` and
  ``emoji-{style}-und-val`` hold them;
- *drawings*: one style of some trained names; ``drawings-gen-val`` and ``drawings-und-val`` hold them.

Text is WordNet's and may mention any word; held-out text is other synsets. Equal seed, counts and downloads give equal
bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from examples.showcase.sources import STYLES, Emoji, Synset, first_senses, open_drawing, read_emoji, read_wordnet
from examples.smoke.seeding import generator
from examples.smoke.shards import DETAIL_QUESTION, BuiltShards, conversation, png_bytes, write_source
from jp_train.errors import ConfigError

IMAGE_SIDE = 64
CAPTIONS = ("{a}, drawn in the {style} style", "an emoji of {a}, {style} style", "{style} drawing of {a}")
NAME_QUESTIONS = ("What is this?", "What does the picture show?", "Name this emoji.")
KIND_QUESTION = "What kind of thing is it?"
STYLE_QUESTION = "Whose drawing style is this?"
MEANING_QUESTIONS = ('What does "{}" mean?', 'Define "{}".', "What is meant by {}?")
SHARED_SOURCES = ("drawings-gen-val", "drawings-und-val")
SAMPLES_PER_SHARD = 2000
MAX_GLOSS_CHARACTERS = 240
SHRINK, SHIFT = 0.12, 0.06
"""Trained drawings for questions are shrunk and moved by up to this share of the side: three drawings a name are
few."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShowcaseCounts:
    """How much of everything is used."""

    names: int = 300
    """Names whose drawings are trained."""
    held_out_names: int = 30
    held_out_drawings: int = 60
    """Trained names one of whose three drawings is kept back."""
    documents: int = 20_000
    conversations: int = 6_000
    held_out_texts: int = 400

    def __post_init__(self) -> None:
        if (
            min(
                self.names,
                self.held_out_names,
                self.held_out_drawings,
                self.documents,
                self.conversations,
                self.held_out_texts,
            )
            < 1
        ):
            raise ConfigError(f"every count of the showcase must be at least 1, got {self}")
        if self.held_out_drawings > self.names:
            raise ConfigError(f"held_out_drawings={self.held_out_drawings} is more than names={self.names}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Which drawings, as (emoji, style), are trained and which are kept back."""

    trained: tuple[tuple[Emoji, str], ...]
    drawings: tuple[tuple[Emoji, str], ...]
    names: tuple[tuple[Emoji, str], ...]


def split_emoji(emoji: Sequence[Emoji], seed: int, counts: ShowcaseCounts) -> Split:
    """Choose names and what is kept back, by the seed only.

    Raises:
        ConfigError: if there are fewer emoji than asked for.
    """
    needed = counts.names + counts.held_out_names
    if len(emoji) < needed:
        raise ConfigError(f"{needed} names were asked for, but there are {len(emoji)} emoji")
    order = generator(seed, "showcase", "names").permutation(len(emoji))[:needed]
    held_out, chosen = (
        [emoji[n] for n in order[: counts.held_out_names]],
        [emoji[n] for n in order[counts.held_out_names :]],
    )
    kept_back = [(item, STYLES[number % len(STYLES)]) for number, item in enumerate(chosen[: counts.held_out_drawings])]
    return Split(
        trained=tuple((item, style) for item in chosen for style in STYLES if (item, style) not in kept_back),
        drawings=tuple(kept_back),
        names=tuple((item, style) for item in held_out for style in STYLES),
    )


def with_article(name: str) -> str:
    """ "a grinning face", "an eagle"; plurals stay bare."""
    last = name.split()[-1]
    if last.endswith("s") and not last.endswith(("ss", "us", "is")):
        return name
    return f"{'an' if name[0] in 'aeiou' and not name.startswith(('uni', 'one', 'eu')) else 'a'} {name}"


def caption(item: Emoji, style: str, wording: int = 0) -> str:
    """The prompt of an image; evaluation uses wording 0."""
    return CAPTIONS[wording % len(CAPTIONS)].format(a=with_article(item.name), style=style)


def questions(item: Emoji, style: str) -> list[tuple[str, str, str]]:
    """(what is asked: name, kind or style; question; answer), the name's first wording first."""
    named = [("name", question, with_article(item.name)) for question in NAME_QUESTIONS]
    return [*named, ("kind", KIND_QUESTION, item.kind), ("style", STYLE_QUESTION, style)]


def detail(item: Emoji, style: str) -> str:
    """The answer to `DETAIL_QUESTION`: the caption, with the gloss where WordNet has one."""
    return (
        f"{caption(item, style)}: {item.gloss}" if 0 < len(item.gloss) <= MAX_GLOSS_CHARACTERS else caption(item, style)
    )


def _sample(image: Image.Image, note: dict[str, Any], item: Emoji, style: str) -> dict[str, bytes]:
    about = {"name": item.name, "kind": item.kind, "style": style}
    return {"png": png_bytes(image), "json": json.dumps({**note, **about}, ensure_ascii=False, sort_keys=True).encode()}


def _generation(drawings: Sequence[tuple[Emoji, str]], *, wordings: int) -> Iterator[dict[str, bytes]]:
    for wording in range(wordings):
        for item, style in drawings:
            yield _sample(
                open_drawing(item.images[style], IMAGE_SIDE), {"caption": caption(item, style, wording)}, item, style
            )


def _understanding(
    seed: int, source: str, drawings: Sequence[tuple[Emoji, str]], *, trained: bool
) -> Iterator[dict[str, bytes]]:
    """Every question about every drawing, in a mixed order; trained ones moved a little, and described as well."""
    dealt = []
    for item, style in drawings:
        pairs = [(question, answer) for _, question, answer in questions(item, style)]
        if trained:
            pairs.append((DETAIL_QUESTION, detail(item, style)))
        else:
            pairs = [pairs[0], *pairs[-2:]]
        dealt += [(item, style, question, answer) for question, answer in pairs]
    for number, row in enumerate(generator(seed, source, "order").permutation(len(dealt))):
        item, style, question, answer = dealt[row]
        image = open_drawing(item.images[style], IMAGE_SIDE)
        if trained:
            image = moved(image, generator(seed, source, number))
        yield _sample(image, conversation(question, answer, image=True), item, style)


def moved(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The image a little smaller and off centre, on white."""
    side = round(image.width * (1 - SHRINK * rng.random()))
    room = image.width - side
    most = round(SHIFT * image.width)
    x, y = (int(np.clip(room // 2 + rng.integers(-most, most + 1), 0, room)) for _ in range(2))
    paper = Image.new("RGB", image.size, (255, 255, 255))
    paper.paste(image.resize((side, side), Image.Resampling.LANCZOS), (x, y))
    return paper


def split_text(synsets: Sequence[Synset], seed: int, counts: ShowcaseCounts) -> tuple[list[Synset], list[Synset]]:
    """Training and held-out synsets, mixed, glosses of moderate length only."""
    usable = [
        synset
        for synset in synsets
        if synset.words and 0 < len(synset.gloss) <= MAX_GLOSS_CHARACTERS and synset.gloss.isascii()
    ]
    order = generator(seed, "showcase", "text").permutation(len(usable))
    held_out = min(counts.held_out_texts, max(len(usable) // 5, 1))
    return [usable[n] for n in order[held_out:]], [usable[n] for n in order[:held_out]]


def _documents(synsets: Sequence[Synset], limit: int) -> Iterator[dict[str, bytes]]:
    for synset in synsets[:limit]:
        yield {"txt": f"{', '.join(synset.words)}: {synset.gloss}".encode()}


def _conversations(seed: int, source: str, synsets: Sequence[Synset], limit: int) -> Iterator[dict[str, bytes]]:
    nouns = [synset for synset in synsets if synset.key.startswith("n") and synset.definition]
    for number, synset in enumerate(nouns[:limit]):
        wording = int(generator(seed, source, number).integers(len(MEANING_QUESTIONS)))
        note = conversation(MEANING_QUESTIONS[wording].format(synset.words[0]), synset.definition, image=False)
        yield {"json": json.dumps(note, sort_keys=True).encode()}


def read_split(cache: Path, seed: int, counts: ShowcaseCounts) -> tuple[Split, list[Synset]]:
    """What the cache holds: the emoji, divided, and WordNet."""
    synsets = read_wordnet(cache)
    return split_emoji(read_emoji(cache, first_senses(cache, synsets)), seed, counts), synsets


def build_showcase_shards(out_dir: Path, cache: Path, seed: int, counts: ShowcaseCounts | None = None) -> BuiltShards:
    """Write every source under `out_dir`, one folder a source.

    Raises:
        ConfigError: if a source's folder already holds shards, or there are too few emoji.
        DataError: if the cache holds something else than was downloaded.
    """
    counts = counts or ShowcaseCounts()
    split, synsets = read_split(Path(cache), seed, counts)
    text, text_val = split_text(synsets, seed, counts)
    sources: dict[str, Iterator[dict[str, bytes]]] = {}
    for style in STYLES:
        trained = [pair for pair in split.trained if pair[1] == style]
        unseen = [pair for pair in split.names if pair[1] == style]
        und = f"emoji-{style}-und"
        sources[f"emoji-{style}-gen"] = _generation(trained, wordings=len(CAPTIONS))
        sources[und] = _understanding(seed, und, trained, trained=True)
        sources[f"emoji-{style}-gen-val"] = _generation(unseen, wordings=1)
        sources[f"{und}-val"] = _understanding(seed, f"{und}-val", unseen, trained=False)
    sources["drawings-gen-val"] = _generation(split.drawings, wordings=1)
    sources["drawings-und-val"] = _understanding(seed, "drawings-und-val", split.drawings, trained=False)
    sources["text"] = _documents(text, counts.documents)
    sources["text-val"] = _documents(text_val, counts.held_out_texts)
    sources["text-dialogues"] = _conversations(seed, "text-dialogues", text, counts.conversations)
    sources["text-dialogues-val"] = _conversations(seed, "text-dialogues-val", text_val, counts.held_out_texts)
    written = {
        name: write_source(Path(out_dir) / name, name, samples, SAMPLES_PER_SHARD) for name, samples in sources.items()
    }
    return BuiltShards(root=Path(out_dir), samples=written)


def link_pretraining_sources(data_dir: Path, folder: Path) -> Path:
    """Show the trained shards to `examples.smoke.pretrain` under the source names it reads; returns `folder`.

    It reads two folders of either kind of image, the smoke run's; here they hold links to this run's shards: google's
    and fluent's drawings under the first name, twitter's under the second.
    """
    from examples.smoke.shards import GENERATION_SOURCES, UNDERSTANDING_SOURCES

    for names, kind in ((GENERATION_SOURCES, "gen"), (UNDERSTANDING_SOURCES, "und")):
        for number, style in enumerate(STYLES):
            _link(data_dir / f"emoji-{style}-{kind}", folder / names[number % len(names)])
    _link(data_dir / "text", folder / "text")
    return folder


def _link(source: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for shard in sorted(source.glob("*.tar")):
        (folder / f"{source.name}-{shard.name}").symlink_to(shard.resolve())
