"""The independent judge of digit images: a support vector classifier on 8x8 ink amounts, trained on real digits
only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image
from sklearn.svm import SVC

from examples.smoke.digits import DIGIT_PIXELS, INK_LEVELS, draw_digit, load_digit_split
from examples.smoke.seeding import generator


def ink_of(images: np.ndarray) -> np.ndarray:
    """Ink amounts float32 ``[n, 64]`` in 0..16 of uint8 images ``[n, H, W, 3]`` (dark ink on white), by area
    averaging.

    Raises:
        ValueError: if the images are not uint8 RGB.
    """
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
        raise ValueError(f"images are uint8 [n, H, W, 3], got {images.dtype} {images.shape}")
    rows = []
    for image in images:
        small = Image.fromarray(image).convert("L").resize((DIGIT_PIXELS, DIGIT_PIXELS), Image.Resampling.BOX)
        rows.append((255 - np.asarray(small, dtype=np.float32)).ravel() * (INK_LEVELS / 255))
    return np.stack(rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class DigitJudge:
    """Names digits in images.  ``held_out_accuracy`` is its share of right names on digits that nothing was trained
    on."""

    classifier: SVC
    held_out_accuracy: float

    def name(self, images: np.ndarray) -> np.ndarray:
        """Labels int64 ``[n]`` of uint8 images ``[n, H, W, 3]`` of any size."""
        return self.classifier.predict(ink_of(images)).astype(np.int64)


def drawn(ink: np.ndarray, side: int) -> np.ndarray:
    """Digits drawn straight and resized to ``side``: uint8 ``[n, side, side, 3]``."""
    return np.stack([np.asarray(draw_digit(drawing).resize((side, side), Image.Resampling.BICUBIC)) for drawing in ink])


def train_digit_judge(seed: int, *, side: int = 32) -> DigitJudge:
    """Train the judge on the training digits, straight and slightly turned, seen at the model's image side.

    Equal seeds give the split that the shards were built from, so held-out digits are new to the judge too.
    """
    train, held_out = load_digit_split(seed)
    turned = np.stack(
        [
            np.asarray(
                draw_digit(drawing, rng=generator(seed, "judge", n)).resize((side, side), Image.Resampling.BICUBIC)
            )
            for n, drawing in enumerate(train.ink)
        ]
    )
    features = np.concatenate([ink_of(drawn(train.ink, side)), ink_of(turned)])
    classifier = SVC(C=10.0, gamma="scale").fit(features, np.concatenate([train.labels, train.labels]))
    named = classifier.predict(ink_of(drawn(held_out.ink, side)))
    return DigitJudge(classifier=classifier, held_out_accuracy=float((named == held_out.labels).mean()))
