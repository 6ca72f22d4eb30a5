"""Judge the showcase's model: emoji drawn from prompts and named from images, trained ones beside what was kept back.

A generated image counts as right if, of all drawings of its style (trained, kept-back and of held-out names), the one
asked for is nearest by pixels; so chance is one in as many drawings, and the ceiling is the same figure for true
drawings after the VQ round trip. The guidance scale is swept on a few trained prompts with another seed. Writes
`stage3/evaluation.json` and `stage3/samples/*.png`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from examples.showcase.shards import KIND_QUESTION, NAME_QUESTIONS, STYLE_QUESTION, with_article
from examples.showcase.sources import STYLES
from examples.smoke import evaluate
from examples.smoke.judgement import TEMPERATURE
from examples.smoke.reading import image_of, note_of, read_source
from examples.smoke.seeding import generator
from jp_train.model.sampling import Sampling, write_sampling
from jp_train.tools.inference import InferenceModel, answer_questions, generate_images, load_for_inference

CFG_SCALES = (1.0, 1.5, 2.0, 3.0)
DRAWINGS_EACH = 120
"""Drawings of each group that are generated from prompts and asked about."""
SWEPT = 40
GRID_COLUMNS, GRID_ROWS = 10, 4
GROUPS = ("trained", "held-out drawings", "held-out names")


@dataclass(frozen=True)
class Drawings:
    """One group's drawings: images uint8 [n, S, S, 3], prompts and what is on them."""

    images: np.ndarray
    prompts: list[str]
    names: list[str]
    kinds: list[str]
    styles: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def take(self, rows: Sequence[int]) -> Drawings:
        return Drawings(
            self.images[list(rows)],
            *([values[n] for n in rows] for values in (self.prompts, self.names, self.kinds, self.styles)),
        )


def read_drawings(data: Path, sources: Sequence[str], side: int) -> Drawings:
    """Every drawing of generation sources once, with its first caption."""
    drawings: dict[tuple[str, str], tuple[np.ndarray, dict[str, Any]]] = {}
    for source in sources:
        for sample in read_source(data / source):
            note = note_of(sample)
            drawings.setdefault((note["name"], note["style"]), (image_of(sample, side), note))
    images, notes = zip(*drawings.values())
    return Drawings(np.stack(images), *([note[key] for note in notes] for key in ("caption", "name", "kind", "style")))


def read_groups(data: Path, side: int) -> dict[str, Drawings]:
    """The drawings of each of `GROUPS`."""
    sources = ([f"emoji-{s}-gen" for s in STYLES], ["drawings-gen-val"], [f"emoji-{s}-gen-val" for s in STYLES])
    return {group: read_drawings(data, names, side) for group, names in zip(GROUPS, sources)}


class NearestDrawing:
    """Finds the true drawing that is nearest to an image, by squared pixel difference, among those of one style."""

    def __init__(self, groups: dict[str, Drawings]) -> None:
        self.images = (
            np.concatenate([g.images for g in groups.values()])
            .reshape(sum(map(len, groups.values())), -1)
            .astype(np.float32)
        )
        self.names = np.array([name for g in groups.values() for name in g.names])
        self.styles = np.array([style for g in groups.values() for style in g.styles])

    def names_of(self, images: np.ndarray, styles: Sequence[str]) -> list[str]:
        """The name of the drawing of `styles[n]` nearest to image n."""
        return [self._nearest(image, np.flatnonzero(self.styles == style)) for image, style in zip(images, styles)]

    def _nearest(self, image: np.ndarray, rows: np.ndarray) -> str:
        distance = np.square(self.images[rows] - image.reshape(1, -1).astype(np.float32)).sum(1)
        return str(self.names[rows[int(distance.argmin())]])

    def chance(self, styles: Sequence[str]) -> float:
        """The share right of a guess among the drawings of the style, on average over `styles`."""
        return float(np.mean([1 / np.count_nonzero(self.styles == style) for style in styles]))


def judge_showcase(out: Path, *, seed: int = 0, tiny: bool = False) -> list[dict[str, Any]]:
    """Judge `out/stage3/export`; returns the rows of evaluation.json. `tiny` asks a handful of everything."""
    run = out / "stage3"
    model = load_for_inference(run / "export")
    side = model.encoder.image_size
    groups = read_groups(out / "data", side)
    nearest = NearestDrawing(groups)
    each = 4 if tiny else DRAWINGS_EACH
    chosen = {
        name: group.take(sorted(generator(seed, "asked", name).permutation(len(group))[:each].tolist()))
        for name, group in groups.items()
    }
    samples = run / "samples"
    samples.mkdir(parents=True, exist_ok=True)
    scale, note = _sweep(model, nearest, chosen["trained"], seed, 2 if tiny else SWEPT)
    write_sampling(run / "export", Sampling(cfg_scale=scale, temperature=TEMPERATURE))
    rows = []
    for number, (name, group) in enumerate(chosen.items(), start=1):
        rows += _drawn(
            model, nearest, name, group, scale, seed + 2, samples / f"{number}_drawn", note if number == 1 else ""
        )
    for number, (name, group) in enumerate(chosen.items(), start=4):
        rows += _named(model, name, group, len(set(groups["trained"].names)), samples / f"{number}_named")
    (run / "evaluation.json").write_text(json.dumps(rows, indent=1))
    return rows


def _sweep(model: InferenceModel, nearest: NearestDrawing, group: Drawings, seed: int, count: int) -> tuple[float, str]:
    few = group.take(range(0, len(group), max(len(group) // count, 1)))
    swept = {}
    for scale in CFG_SCALES:
        images = generate_images(
            model, few.prompts, cfg_scale=scale, temperature=TEMPERATURE, seed=seed + 1, batch_size=64
        )
        swept[scale] = float(np.mean(_right(nearest, images, few)))
    best = max(swept, key=swept.__getitem__)
    return best, "; sweep " + ", ".join(f"{scale:g}: {value:.2f}" for scale, value in swept.items())


def _right(nearest: NearestDrawing, images: np.ndarray, group: Drawings) -> list[bool]:
    return [nearest_name == name for nearest_name, name in zip(nearest.names_of(images, group.styles), group.names)]


def _drawn(
    model: InferenceModel,
    nearest: NearestDrawing,
    title: str,
    group: Drawings,
    scale: float,
    seed: int,
    path: Path,
    note: str,
) -> list[dict[str, Any]]:
    images = generate_images(model, group.prompts, cfg_scale=scale, temperature=TEMPERATURE, seed=seed, batch_size=64)
    ids = model.vq.encode(torch.from_numpy(group.images).permute(0, 3, 1, 2).contiguous())
    ceiling = float(np.mean(_right(nearest, model.vq.decode(ids).permute(0, 2, 3, 1).numpy(), group)))
    right = _right(nearest, images, group)
    _grid(
        path,
        images,
        group.prompts,
        right,
        f"Generated, {title}, CFG {scale:g}: {np.mean(right):.1%} nearest to the drawing asked for",
    )
    about = (
        f"{len(group)} prompts at CFG {scale:g}, temperature {TEMPERATURE:g}; nearest of the style's drawings; "
        f"ceiling: VQ round trip{note}"
    )
    return [_row(f"emoji drawn, {title}", float(np.mean(right)), nearest.chance(group.styles), about, ceiling=ceiling)]


def _named(model: InferenceModel, title: str, group: Drawings, names: int, path: Path) -> list[dict[str, Any]]:
    """Name, kind and style of the drawings; exact answers."""
    questions = {
        "name": (
            NAME_QUESTIONS[0],
            [with_article(name) for name in group.names],
            1 / names,
            f"chance: one of {names} trained names",
        ),
        "kind": (KIND_QUESTION, group.kinds, _commonest(group.kinds), "chance: the commonest kind"),
        "style": (STYLE_QUESTION, group.styles, _commonest(group.styles), "chance: the commonest style"),
    }
    drawn = [Image.fromarray(image) for image in group.images]
    rows = []
    for what, (question, expected, chance, about) in questions.items():
        answers = answer_questions(model, drawn, [question] * len(group), max_new_tokens=16, batch_size=64)
        right = [evaluate.normalized(answer) == evaluate.normalized(truth) for answer, truth in zip(answers, expected)]
        rows.append(
            _row(
                f"{what} of emoji, {title}",
                float(np.mean(right)),
                chance,
                f"{len(group)} images, exact answer; {about}",
            )
        )
        if what == "name":
            _grid(
                path,
                group.images,
                answers,
                right,
                f"{title.capitalize()}, and the model's answer to “{question}”: {np.mean(right):.1%} right",
            )
    return rows


def _commonest(values: Sequence[str]) -> float:
    return max(Counter(values).values()) / len(values)


def _row(name: str, value: float, chance: float, note: str, *, ceiling: float | None = None) -> dict[str, Any]:
    ceiling = None if ceiling is None else round(float(ceiling), 4)
    return {
        "name": name,
        "value": round(float(value), 4),
        "chance": round(float(chance), 4),
        "ceiling": ceiling,
        "target": None,
        "note": note,
    }


def _grid(path: Path, images: np.ndarray, titles: Sequence[str], right: Sequence[bool], title: str) -> None:
    shown = GRID_COLUMNS * GRID_ROWS
    evaluate.save_grid(
        path.with_suffix(".png"),
        images[:shown],
        titles[:shown],
        columns=GRID_COLUMNS,
        image_side=96,
        marks=right[:shown],
    )
    path.with_suffix(".json").write_text(json.dumps({"title": title, "text": "green frame: right, red: wrong"}))


def contact_sheet(data: Path, path: Path, *, side: int = 64) -> Path:
    """Some drawings of each group with their captions, one PNG; returns `path`."""
    groups = read_groups(data, side)
    rows = [
        group.take(generator(0, "contact sheet").permutation(len(group))[: 2 * GRID_COLUMNS].tolist())
        for group in groups.values()
    ]
    images = np.concatenate([group.images for group in rows])
    titles = [prompt for group in rows for prompt in group.prompts]
    return evaluate.save_grid(path, images, titles, columns=GRID_COLUMNS, heading=f"{', '.join(GROUPS)}: two rows each")
