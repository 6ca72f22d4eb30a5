"""The "real" images of the smoke run: scikit-learn's 1,797 handwritten digits, drawn as dark ink on white paper.

The 8x8 originals are split once, by writer-independent stratified sampling, into training and held-out digits.
Training images may be drawn several times with a small rotation and shift; a held-out digit is never used for
training anything, the judge included.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_PIXELS = 8
"""Side of an original digit in pixels."""
INK_LEVELS = 16
"""Originals hold ink amounts 0 (paper) to 16 (full ink)."""

CAPTIONS = ("a handwritten {}", "the digit {}", "a handwritten digit {}. It is dark ink on white paper.")
QUESTIONS = ("Which digit is this?", "What number is written here?")
DETAIL = "the handwritten digit {} in dark ink on white paper."

IMAGE_SIDE = 64
MAX_ROTATION_DEGREES = 8.0
MAX_SHIFT = 0.03
"""Largest shift of a training image, as a share of its side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DigitSet:
    """Original digits: ``ink`` float32 ``[n, 8, 8]`` in 0..16 and ``labels`` int64 ``[n]`` in 0..9."""

    ink: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


def load_digit_split(seed: int, *, held_out_share: float = 0.2) -> tuple[DigitSet, DigitSet]:
    """Return the training and the held-out digits, stratified by label.

    Raises:
        ValueError: (from scikit-learn) if ``held_out_share`` is not between 0 and 1.
    """
    ink, labels = load_digits(return_X_y=True)
    train, held_out = train_test_split(
        np.arange(len(labels)), test_size=held_out_share, random_state=seed, stratify=labels
    )

    def digits(rows: np.ndarray) -> DigitSet:
        images = ink[sorted(rows)].reshape(-1, DIGIT_PIXELS, DIGIT_PIXELS).astype(np.float32)
        return DigitSet(ink=images, labels=labels[sorted(rows)].astype(np.int64))

    return digits(train), digits(held_out)


def draw_digit(ink: np.ndarray, *, side: int = IMAGE_SIDE, rng: np.random.Generator | None = None) -> Image.Image:
    """Draw one 8x8 digit as an RGB image of ``side`` x ``side`` pixels, dark ink on white.

    With ``rng`` the digit is turned by up to 8 degrees and shifted by up to 3% of the side; without, it is
    drawn straight, as the held-out digits are.

    Raises:
        ValueError: if ``ink`` is not 8x8.
    """
    if ink.shape != (DIGIT_PIXELS, DIGIT_PIXELS):
        raise ValueError(f"a digit is 8x8 ink levels, got shape {ink.shape}")
    paper = 255 - np.clip(ink * (255 / INK_LEVELS), 0, 255)
    image = Image.fromarray(paper.astype(np.uint8), mode="L").resize((side, side), Image.Resampling.BICUBIC)
    if rng is not None:
        angle = rng.uniform(-MAX_ROTATION_DEGREES, MAX_ROTATION_DEGREES)
        shift = rng.uniform(-MAX_SHIFT, MAX_SHIFT, size=2) * side
        image = image.rotate(
            angle, resample=Image.Resampling.BILINEAR, translate=(round(shift[0]), round(shift[1])), fillcolor=255
        )
    return image.convert("RGB")


def digit_caption(label: int, rng: np.random.Generator) -> str:
    """A caption that names the digit, in one of three wordings; one of them has a second sentence."""
    return CAPTIONS[int(rng.integers(len(CAPTIONS)))].format(DIGIT_NAMES[label])


def digit_prompt(label: int) -> str:
    """The wording used to ask for a digit at evaluation; it is one of the training wordings."""
    return CAPTIONS[0].format(DIGIT_NAMES[label])


def digit_detail(label: int) -> str:
    """The answer to "Describe the image in detail."."""
    return DETAIL.format(DIGIT_NAMES[label])


def digit_question(label: int, rng: np.random.Generator) -> tuple[str, str]:
    """A question about the image and its one-word answer."""
    return QUESTIONS[int(rng.integers(len(QUESTIONS)))], DIGIT_NAMES[label]
