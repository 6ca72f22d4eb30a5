"""Scores of what the trained model made: pure functions of images, answers, prompts and questions.

Nothing here loads a model.  Callers pass generated images, answers, or a ``round_trip`` function (images → VQ ids
→ images) and get accuracies in 0..1 beside chance levels and ceilings.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from examples.smoke.judge import DigitJudge, drawn
from examples.smoke.scene_judge import read_scene, satisfies
from examples.smoke.scenes import CATEGORIES, Scene, draw_scene

RoundTrip = Callable[[np.ndarray], np.ndarray]
"""uint8 images ``[n, S, S, 3]`` through VQ ids and back."""
CAPTION_PX, LINE, GAP = 14, 17, 10
"""Size of the captions of a grid, their line height and the space between images, in pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Share of right ones among ``count``; ``chance`` is what answering without looking would reach."""

    accuracy: float
    chance: float
    count: int

    def as_dict(self) -> dict[str, float | int]:
        return asdict(self)


def normalized(answer: str) -> str:
    """An answer without case, outer spaces and a final full stop."""
    return " ".join(answer.lower().split()).rstrip(".")


def score_digit_images(images: np.ndarray, labels: Sequence[int], judge: DigitJudge) -> Score:
    """How many images, uint8 ``[n, H, W, 3]``, the judge names as in `labels`.

    Raises:
        ValueError: if there are not as many labels as images.
    """
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images but {len(labels)} labels")
    right = judge.name(images) == np.asarray(labels)
    return Score(accuracy=float(right.mean()), chance=0.1, count=len(labels))


def score_scene_images(images: np.ndarray, scenes: Sequence[Scene]) -> dict[str, Score]:
    """Per category: how many images show what their scene's prompt asks for, and nothing else.

    Chance is the same judgement against another prompt of the same category (every other prompt in turn), that is, a
    model that draws good scenes but ignores its prompt.

    Raises:
        ValueError: if there are not as many scenes as images.
    """
    if len(images) != len(scenes):
        raise ValueError(f"{len(images)} images but {len(scenes)} scenes")
    read = [read_scene(image) for image in images]
    scores = {}
    for category in CATEGORIES:
        rows = [n for n, scene in enumerate(scenes) if scene.category == category]
        if not rows:
            continue
        right = np.mean([satisfies(read[n], scenes[n]) for n in rows])
        others = [satisfies(read[n], scenes[m]) for n in rows for m in rows if n != m]
        scores[category] = Score(
            accuracy=float(right), chance=float(np.mean(others)) if others else 0.0, count=len(rows)
        )
    return scores


def score_answers(answers: Sequence[str], expected: Sequence[str], skills: Sequence[str]) -> dict[str, Score]:
    """Per skill: how many answers equal the expected ones (case and a final full stop do not matter).

    Chance is the share of the commonest expected answer of the skill.

    Raises:
        ValueError: if the three sequences differ in length.
    """
    if not len(answers) == len(expected) == len(skills):
        raise ValueError(f"{len(answers)} answers, {len(expected)} expected answers and {len(skills)} skills")
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for answer, truth, skill in zip(answers, expected, skills, strict=True):
        groups[skill].append((normalized(answer), normalized(truth)))
    scores = {}
    for skill, pairs in groups.items():
        truths = [w for _, w in pairs]
        commonest = max(map(truths.count, set(truths))) / len(pairs)
        accuracy = sum(a == w for a, w in pairs) / len(pairs)
        scores[skill] = Score(accuracy=accuracy, chance=commonest, count=len(pairs))
    return scores


def scene_images(scenes: Sequence[Scene], side: int) -> np.ndarray:
    """The scenes drawn and resized to the model's side: uint8 ``[n, side, side, 3]``."""
    return np.stack([np.asarray(draw_scene(s).resize((side, side), Image.Resampling.BICUBIC)) for s in scenes])


def digit_ceiling(
    ink: np.ndarray, labels: Sequence[int], judge: DigitJudge, round_trip: RoundTrip, *, side: int
) -> Score:
    """Score of true digits, ink ``[n, 8, 8]``, after the VQ round trip: no generation can be expected to do better."""
    return score_digit_images(round_trip(drawn(ink, side)), labels, judge)


def scene_ceiling(scenes: Sequence[Scene], round_trip: RoundTrip, *, side: int) -> dict[str, Score]:
    """Per category score of true scene images after the VQ round trip."""
    return score_scene_images(round_trip(scene_images(scenes, side)), scenes)


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 image stacks; infinite when they are equal."""
    error = float(np.square(first.astype(np.float64) - second.astype(np.float64)).mean())
    return float("inf") if error == 0 else 10 * float(np.log10(255.0**2 / error))


def save_grid(
    path: Path,
    images: np.ndarray,
    titles: Sequence[str],
    *,
    columns: int = 8,
    image_side: int = 96,
    marks: Sequence[bool] | None = None,
    heading: str = "",
) -> Path:
    """Write a PNG of the images, uint8 ``[n, H, W, 3]``, each with its title (prompt or answer) below it; returns
    ``path``.

    ``marks`` draws a green or a red frame around each image: right or wrong.

    Raises:
        ValueError: if there are no images, or titles or marks are not as many as the images.
    """
    if len(images) == 0 or len(titles) != len(images) or (marks is not None and len(marks) != len(images)):
        raise ValueError(
            f"a grid needs images and one title and mark each, got {len(images)} images, {len(titles)} titles"
        )
    font = ImageFont.load_default(size=CAPTION_PX)
    lines_of = [_wrapped(title, font, image_side) for title in titles]
    rows = [range(start, min(start + columns, len(images))) for start in range(0, len(images), columns)]
    heights = [image_side + GAP + LINE * max(len(lines_of[n]) for n in row) + GAP for row in rows]
    cell, top = image_side + GAP, 30 if heading else GAP
    canvas = Image.new("RGB", (columns * cell + GAP, top + sum(heights)), (250, 250, 248))
    pen = ImageDraw.Draw(canvas)
    if heading:
        pen.text((GAP, 8), heading, fill=(30, 30, 30), font=font)
    y = top
    for row, height in zip(rows, heights, strict=True):
        for column, n in enumerate(row):
            x = GAP + column * cell
            shown = Image.fromarray(images[n]).resize((image_side, image_side), Image.Resampling.BICUBIC)
            canvas.paste(shown, (x, y))
            frame, width = ((200, 200, 200), 1) if marks is None else ((40, 150, 70) if marks[n] else (205, 60, 50), 3)
            pen.rectangle((x - 1, y - 1, x + image_side, y + image_side), outline=frame, width=width)
            for k, text in enumerate(lines_of[n]):
                pen.text((x, y + image_side + 4 + k * LINE), text, fill=(50, 50, 50), font=font)
        y += height
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)
    return path


def _wrapped(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The whole text in lines of at most `width` pixels (a longer word has a line of its own); newlines are kept."""
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return lines
