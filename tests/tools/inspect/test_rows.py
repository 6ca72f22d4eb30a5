"""`data inspect` with a real VQ tokenizer: the page of the smoke run's rows shows what the model sees and what the
VQ makes of it."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jp_train.cli.main import main
from jp_train.config import load_config
from jp_train.errors import CheckpointError, ConfigError
from jp_train.model.pretrained import load_vq
from jp_train.tools.explain.replay import Replay
from jp_train.tools.explain.step import open_replay
from jp_train.tools.inspect.rows import inspect_rows

CONFIG = Path(__file__).resolve().parents[3] / "examples" / "smoke" / "stage3.yaml"
FIGURE = re.compile(r'<figure><img[^>]* src="data:image/png;base64,([^"]+)"[^>]*><figcaption>([^<]*)</figcaption>')


def figures(page: str) -> list[tuple[str, np.ndarray]]:
    """Caption and uint8 [3, H, W] pixels of every image, in order."""
    return [
        (caption, np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).transpose(2, 0, 1))
        for data, caption in FIGURE.findall(page)
    ]


@pytest.fixture(scope="module")
def replay(small_world):
    with Replay(load_config(CONFIG, small_world.overrides)) as opened:
        yield opened


def test_the_page_shows_the_pictures_as_the_model_sees_them_and_through_the_vq(replay, small_world, tmp_path):
    summary = inspect_rows(replay, 3, rows=2, out=tmp_path / "deep" / "page.html")
    page = (tmp_path / "deep" / "page.html").read_text(encoding="utf-8")
    vq = load_vq(replay.cfg.model, seed=0)
    expected = []
    ids = []
    for micro in replay.micro_batches(3, range(2)):
        for row in micro.rows:
            for document in row.documents:
                if document.und_images is not None:
                    expected.append(("as the vision encoder sees it", document.und_images[0]))
                if document.gen_image is not None:
                    ids.append(vq.encode(torch.from_numpy(document.gen_image[None])))
                    expected.append(("the image to generate", document.gen_image))
                    expected.append(("through the VQ and back: what its ids can hold", vq.decode(ids[-1])[0].numpy()))
    shown = figures(page)
    assert [caption for caption, _ in shown] == [caption for caption, _ in expected]
    assert all(np.array_equal(mine, theirs) for (_, mine), (_, theirs) in zip(shown, expected, strict=True))
    assert len({caption for caption, _ in shown}) == 3, "both uses of images occur"
    assert (summary.rows, summary.pictures, summary.bytes, summary.vq) == (
        2,
        len(expected),
        len(page.encode()),
        str(small_world.root / "init"),
    )
    listed = [" ".join(map(str, grid[0].tolist())) for grid in ids]
    plain = [
        re.sub(r"(\d+) x(\d+)", lambda m: " ".join([m[1]] * int(m[2])), text)
        for text in re.findall(r"targets: ([^<]*)</pre>", page)
    ]
    assert plain == listed


def test_without_weights_the_page_says_why_ids_are_not_decoded(replay, tmp_path):
    replay.cfg.model.init_from, kept = None, replay.cfg.model.init_from
    try:
        assert inspect_rows(replay, 1, rows=1, out=tmp_path / "a.html").vq is None
        replay.cfg.model.init_from = str(tmp_path / "nowhere")
        assert inspect_rows(replay, 1, rows=1, out=tmp_path / "b.html").vq is None
        assert "the configuration names no weights" in (tmp_path / "a.html").read_text()
        assert "does not exist" in (tmp_path / "b.html").read_text()
        assert {caption for caption, _ in figures((tmp_path / "b.html").read_text())} == {
            "as the vision encoder sees it",
            "the image to generate",
        }
        with pytest.raises(CheckpointError, match="does not exist"):
            inspect_rows(replay, 1, rows=1, out=tmp_path / "c.html", model=tmp_path / "nowhere")
        assert inspect_rows(replay, 1, rows=1, out=tmp_path / "d.html", model=Path(kept)).vq == kept
    finally:
        replay.cfg.model.init_from = kept


def test_wrong_arguments_are_refused(replay, tmp_path):
    with pytest.raises(ConfigError, match="ends with .html"):
        inspect_rows(replay, 1, rows=1, out=tmp_path / "page.pdf")
    with pytest.raises(ConfigError, match="at least one row"):
        inspect_rows(replay, 1, rows=0, out=tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_one_page_and_prints_one_object(small_world, tmp_path, capsys):
    out = tmp_path / "rows.html"
    assert (
        main(["data", "inspect", str(CONFIG), *small_world.overrides, "--rows", "99", "--out", str(out), "--json"]) == 0
    )
    summary = json.loads(capsys.readouterr().out)
    assert summary["path"] == str(out) and summary["bytes"] == out.stat().st_size and summary["rows"] == 2
    assert "<h1>Rows of step 1</h1>" in out.read_text()


def test_pictures_that_training_takes_as_stored_ids_are_shown_beside_what_the_ids_decode_to(
    small_world, tmp_path, capsys
):
    data = tmp_path / "data"
    shutil.copytree(small_world.root / "data", data, ignore=shutil.ignore_patterns("*.jp-vq-*"))
    overrides = [*small_world.overrides, f"data.root={data}"]
    cfg = load_config(CONFIG, overrides)
    with Replay(cfg) as replay:
        (before,) = (row for micro in replay.micro_batches(3, range(1)) for row in micro.rows)
    assert main(["data", "encode-images", str(CONFIG), *overrides]) == 0
    capsys.readouterr()
    with open_replay(CONFIG, overrides, None) as replay:
        (after,) = (row for micro in replay.micro_batches(3, range(1)) for row in micro.rows)
        inspect_rows(replay, 3, rows=1, out=tmp_path / "page.html")
    assert not len(after.gen_images) and len(before.gen_images)
    vq = load_vq(cfg.model, seed=0)
    shown = figures((tmp_path / "page.html").read_text(encoding="utf-8"))
    read = [pixels for caption, pixels in shown if caption == "the image to generate; training takes its stored VQ ids"]
    decoded = [pixels for caption, pixels in shown if caption == "decoded from the stored VQ ids"]
    assert np.array_equal(np.stack(read), before.gen_images.numpy())
    stored = [document.vq_ids for document in after.documents if document.vq_ids is not None]
    assert len(stored) == len(decoded) == len(before.gen_images)
    assert all(
        np.array_equal(vq.decode(torch.tensor(ids, dtype=torch.int64)[None])[0], pixels)
        for ids, pixels in zip(stored, decoded, strict=True)
    )
