"""The histogram as a file: one row per source that has documents, in its kind's colour."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from jp_train.tools.verify.plot import plot_lengths
from jp_train.tools.verify.shard import EDGES

KINDS = {"u": "understanding", "t": "text", "g": "generation", "empty": "text"}
COLOURS = {"understanding": (0, 114, 178), "text": (138, 138, 138), "generation": (213, 94, 0)}
"""Okabe and Ito's blue and vermilion, and a grey."""


def lengths(*names):
    counts = {name: np.zeros(len(EDGES), np.int64) for name in KINDS}
    for name in names:
        counts[name][[40, 41, 50]] = [5, 9, 2]
    return counts


@pytest.mark.parametrize("names", [(), ("u",), ("t", "g"), ("u", "t", "g")])
def test_sources_with_documents_have_a_row_each_in_the_colour_of_their_kind(tmp_path, names):
    plot_lengths(lengths(*names), KINDS, EDGES, 4096, tmp_path / "lengths.png")
    with Image.open(tmp_path / "lengths.png") as file:
        assert file.size == (int(9.5 * 130), int((1.5 + 0.95 * max(1, len(names))) * 130))
        pixels = np.asarray(file.convert("RGB")).reshape(-1, 3)
    drawn = {kind for kind, colour in COLOURS.items() if (pixels == colour).all(1).sum() > 200}
    assert drawn == {KINDS[name] for name in names}
