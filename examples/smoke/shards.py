"""Write the smoke run's WebDataset shards: one folder a source, ``00000.tar`` and so on inside.

Training sources: ``digits-gen``, ``scenes-gen`` (``{key}.png`` + ``{key}.json`` with ``caption``), ``digits-und``,
``scenes-und`` (``{key}.png`` + ``{key}.json`` with LLaVA ``conversations``), ``text`` (``{key}.txt``) and
``text-dialogues`` (``{key}.json`` with ``conversations``, no image).  Each has a held-out twin named ``…-val``; two
more, ``pairs-gen-val`` and ``pairs-und-val``, hold scenes of the colour-shape pairs that training never sees.

Equal seed and sizes give equal bytes: images come from ``generator(seed, source, n)``, and tar headers carry no time.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image

from examples.smoke import digits, scenes, text
from examples.smoke.console import PROGRESS_S
from examples.smoke.scene_text import scene_caption, scene_detail, scene_prompt, scene_question
from examples.smoke.seeding import generator
from jp_train.errors import ConfigError
from jp_train.terminal import ProgressLine

DETAIL_QUESTION = "Describe the image in detail."
DETAIL_SHARE = 0.3
"""Share of understanding samples that ask for the full description (the rest ask one short question)."""
CATEGORY_WEIGHTS = {"single": 0.2, "colours": 0.25, "two": 0.15, "counting": 0.15, "position": 0.1, "attribution": 0.15}
"""How often each scene category occurs in training; held-out scenes take the categories in turn."""
GENERATION_SOURCES = ("digits-gen", "scenes-gen")
UNDERSTANDING_SOURCES = ("digits-und", "scenes-und")
TEXT_SOURCES = ("text", "text-dialogues")
PAIR_SOURCES = ("pairs-gen-val", "pairs-und-val")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSizes:
    """Number of samples of each source; text sources hold what Python's reference yields."""

    digits_gen: int = 3000
    scenes_gen: int = 5000
    digits_und: int = 2500
    scenes_und: int = 5000
    val_each: int = 180
    """Samples of each held-out image source (at most the 360 held-out digits)."""
    samples_per_shard: int = 2000

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise ConfigError(f"ShardSizes.{field.name} must be at least 1, got {getattr(self, field.name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltShards:
    """Where the shards are and how many samples each source holds."""

    root: Path
    samples: dict[str, int]


def png_bytes(image: Image.Image) -> bytes:
    """The image as PNG, fast compression."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _json_bytes(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, sort_keys=True).encode()


def conversation(question: str, answer: str, *, image: bool) -> dict[str, Any]:
    """One question and its answer in the LLaVA layout; ``image`` puts ``<image>`` before the question."""
    turn = f"<image>\n{question}" if image else question
    return {"conversations": [{"from": "human", "value": turn}, {"from": "gpt", "value": answer}]}


def _training_scene(seed: int, source: str, number: int) -> tuple[scenes.Scene, np.random.Generator]:
    rng = generator(seed, source, number)
    names, weights = list(CATEGORY_WEIGHTS), list(CATEGORY_WEIGHTS.values())
    category = names[int(rng.choice(len(names), p=weights))]
    return scenes.sample_scene(rng, category, pairs=scenes.training_pairs()), rng


def held_out_scene(seed: int, source: str, number: int) -> scenes.Scene:
    """Scene ``number`` of a held-out source: categories in turn; ``pairs-…`` sources use only held-out pairs."""
    rng = generator(seed, source, number)
    pairs = tuple(sorted(scenes.HELD_OUT_PAIRS)) if source.startswith("pairs") else scenes.training_pairs()
    return scenes.sample_scene(rng, scenes.CATEGORIES[number % len(scenes.CATEGORIES)], pairs=pairs)


def _digits(seed: int, source: str, count: int) -> Iterator[dict[str, bytes]]:
    held_out = source.endswith("-val")
    chosen = digits.load_digit_split(seed)[1 if held_out else 0]
    order = generator(seed, source, "order").permutation(len(chosen))
    for number in range(count):
        rng = generator(seed, source, number)
        row = int(order[number % len(order)])
        label = int(chosen.labels[row])
        image = digits.draw_digit(chosen.ink[row], rng=None if held_out else rng)
        if "-gen" in source:
            note = {"caption": digits.digit_prompt(label) if held_out else digits.digit_caption(label, rng)}
        elif not held_out and rng.random() < DETAIL_SHARE:
            note = conversation(DETAIL_QUESTION, digits.digit_detail(label), image=True)
        else:
            note = conversation(*digits.digit_question(label, rng), image=True)
        yield {"png": png_bytes(image), "json": _json_bytes({**note, "label": label})}


def _scenes(seed: int, source: str, count: int) -> Iterator[dict[str, bytes]]:
    held_out = source.endswith("-val")
    for number in range(count):
        if held_out:
            scene, rng = held_out_scene(seed, source, number), generator(seed, source, number, "text")
        else:
            scene, rng = _training_scene(seed, source, number)
        if "-gen" in source:
            note = {"caption": scene_prompt(scene) if held_out else scene_caption(scene, rng)}
        elif rng.random() < DETAIL_SHARE:
            note = conversation(DETAIL_QUESTION, scene_detail(scene), image=True)
        else:
            question = scene_question(scene, rng)
            note = conversation(question.text, question.answer, image=True)
        yield {"png": png_bytes(scenes.draw_scene(scene)), "json": _json_bytes({**note, "category": scene.category})}


def _texts(seed: int, source: str) -> Iterator[dict[str, bytes]]:
    held_out = int(source.endswith("-val"))
    if source.startswith("text-dialogues"):
        for pair in text.split_conversations(seed)[held_out]:
            yield {"json": _json_bytes(conversation(pair.question, pair.answer, image=False))}
    else:
        for document in text.split_documents(seed)[held_out]:
            yield {"txt": document.encode()}


def source_samples(seed: int, source: str, count: int) -> Iterator[dict[str, bytes]]:
    """The samples of a source without their keys: extension to bytes.  ``count`` is ignored by the text sources.

    Raises:
        ConfigError: if the source is unknown.
    """
    name = source.removesuffix("-val")
    if name in TEXT_SOURCES:
        return _texts(seed, source)
    if name.startswith("digits-"):
        return _digits(seed, source, count)
    if name in ("scenes-gen", "scenes-und") or source in PAIR_SOURCES:
        return _scenes(seed, source, count)
    raise ConfigError(f"unknown smoke source {source!r}")


def source_counts(sizes: ShardSizes) -> dict[str, int]:
    """Every source with its number of samples (0 for text: as many as there are)."""
    trained = {name: getattr(sizes, name.replace("-", "_")) for name in (*GENERATION_SOURCES, *UNDERSTANDING_SOURCES)}
    held_out = {f"{name}-val": sizes.val_each for name in trained} | dict.fromkeys(PAIR_SOURCES, sizes.val_each)
    texts = {name: 0 for base in TEXT_SOURCES for name in (base, f"{base}-val")}
    return trained | held_out | texts


def write_source(folder: Path, source: str, samples: Iterator[dict[str, bytes]], samples_per_shard: int) -> int:
    """Write samples into ``folder/00000.tar``, ``00001.tar``, …; returns how many samples were written.

    Raises:
        ConfigError: if the folder already holds shards (an old build would mix with the new one).
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.tar")):
        raise ConfigError(f"{folder} already holds shards: remove it first or build elsewhere")
    writer = None
    number = 0
    try:
        for number, sample in enumerate(samples, start=1):
            if (number - 1) % samples_per_shard == 0:
                if writer is not None:
                    writer.close()
                writer = webdataset.TarWriter(str(folder / f"{(number - 1) // samples_per_shard:05d}.tar"), mtime=0)
            assert writer is not None  # made for the first sample
            writer.write({"__key__": f"{source}-{number - 1:06d}", **sample})
    finally:
        if writer is not None:
            writer.close()
    return number


def build_shards(out_dir: Path, seed: int, sizes: ShardSizes | None = None) -> BuiltShards:
    """Write every source of the smoke run under ``out_dir`` (one folder a source).

    Raises:
        ConfigError: if a source's folder already holds shards.
    """
    sizes = sizes or ShardSizes()
    counts = source_counts(sizes)
    progress = ProgressLine("shards", sys.stderr, every_s=PROGRESS_S)
    written = {}
    for step, (source, count) in enumerate(counts.items()):
        samples = source_samples(seed, source, count)
        written[source] = write_source(Path(out_dir) / source, source, samples, sizes.samples_per_shard)
        progress.show(step + 1, len(counts), f"{sum(written.values()):,} samples")
    return BuiltShards(root=Path(out_dir), samples=written)
