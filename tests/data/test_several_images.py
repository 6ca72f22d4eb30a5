"""Samples of several images from end to end: order, index, plan, bad ones; rows are in test_rows.py."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from jp_train.config.batch import batch_plan
from jp_train.config.choices import BatchUnit, OverLong
from jp_train.config.schema import MixtureConfig, SourceConfig, SourceKind
from jp_train.data import sidecar
from jp_train.data.index import index_sources
from jp_train.data.loader import StepLoader, build_plan
from jp_train.tools.index import index_command
from jp_train.tools.verify.verify import VerifyOptions, verify_sources
from tests.data.data_samples import (
    SLOTS,
    conversation,
    json_bytes,
    png,
    several_samples,
    understanding_samples,
    write_shard,
)

TURNS = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


@pytest.fixture
def several(cfg, tmp_path):
    """A config with one source, the samples in `several.tar`."""

    def make(samples, **fields):
        write_shard(tmp_path / "several.tar", samples)
        cfg.data.root = str(tmp_path)
        source = SourceConfig(kind=SourceKind.understanding, shards="several.tar", **fields)
        cfg.data.sources = {"several": source}
        cfg.stage.mixture = MixtureConfig(understanding=1, text=0, generation=0)
        cfg.stage.batch_unit, cfg.stage.batch_size = BatchUnit.packed, 4
        return cfg

    return make


def batches(cfg, tokenizer, steps: int = 5):
    indexes, batch = index_sources(cfg, tokenizer), batch_plan(cfg, 1)
    plan = build_plan(cfg, indexes, batch, tokenizer)
    with StepLoader(cfg, plan, indexes, tokenizer, dp_rank=0, dp_world_size=1, batch_plan=batch) as loader:
        return [micro for _ in range(steps) for micro in next(loader).micro_batches]


def test_the_index_counts_the_images_and_what_must_stand_before_the_last(several, tokenizer):
    cfg = several(several_samples(30))
    (index,) = index_sources(cfg, tokenizer)
    assert index.images.tolist() == [n % 5 + 1 for n in range(30)] and index.image_count == 90
    block = SLOTS + 2
    assert (index.min_tokens >= 1 + block * index.images).all() and (index.min_tokens < index.tokens).all()
    # without a word where, all images come first
    assert index.min_tokens[[1, 4]].tolist() == [1 + 2 * block, 1 + 5 * block]
    assert dict(index.notes) == {"image put first, as no <image> says where": 10}
    assert index_sources(cfg, tokenizer)[0].min_tokens.tolist() == index.min_tokens.tolist(), "from the sidecar"


def test_a_source_with_one_image_a_sample_has_the_index_that_it_always_had(several, tokenizer):
    cfg = several(understanding_samples(9))
    (index,) = index_sources(cfg, tokenizer)
    assert index.images is None and index.min_tokens is None and index.image_count == 9
    with np.load(f"{index.shards[0].path}.jp-tokens-{index.locator.fingerprint[:12]}.npz") as file:
        assert "images" not in file.files


@pytest.mark.parametrize(
    ("note", "fields", "kept"),
    [
        ({"caption": "c"}, {}, True),
        ({"conversations": TURNS}, {}, False),
        ({"chat": TURNS}, {"conversations": "json:chat"}, False),
    ],
)
def test_an_index_of_older_rules_is_kept_unless_it_may_have_counted_conversations(
    several, tokenizer, monkeypatch, tmp_path, note, fields, kept
):
    cfg = several([("a", {"png": png(1), "json": json_bytes(note)})], **({"fields": fields} if fields else {}))
    monkeypatch.setattr(sidecar, "RULES", 2)
    index_sources(cfg, tokenizer)
    (file,) = tmp_path.glob("*.jp-tokens-*")
    before = file.stat().st_mtime_ns
    monkeypatch.undo()
    index_sources(cfg, tokenizer)
    assert (file.stat().st_mtime_ns == before) == kept


def test_numbered_images_are_in_the_order_of_their_numbers_and_named_ones_in_that_of_the_recipe(several, tokenizer):
    shades = [np.full((8, 8, 3), 20 * n, np.uint8) for n in range(12)]
    files = {f"{n}.png": solid_png(shades[n]) for n in (10, 2, 11, 0, 1, 3, 4, 5, 6, 7, 8, 9)}
    cfg = several([("a", {**files, "json": conversation("q", "a")})])
    (micro, *_) = batches(cfg, tokenizer, 1)
    middle = micro.und_images[:12, 0, 16, 16].tolist()
    assert middle == [20 * n for n in range(12)]
    named = {"right.png": solid_png(shades[9]), "left.png": solid_png(shades[4]), "json": conversation("q", "a")}
    cfg = several(
        [("a", named)], fields={"image": "left.jpg;left.png, right.png", "conversations": "json:conversations"}
    )
    (micro, *_) = batches(cfg, tokenizer, 1)
    assert micro.und_images[:2, 0, 16, 16].tolist() == [80, 180]


def test_a_sample_with_more_images_than_a_row_holds_is_bad_by_name_and_never_drawn(several, tokenizer):
    # 14 images of 18 tokens are 252 of a row's 256
    fits = {f"{n}.png": png(n) for n in range(14)}
    crowd = {f"{n}.png": png(n) for n in range(15)}
    answer = conversation("q", "a")
    cfg = several([("crowd", {**crowd, "json": answer}), ("fits", {**fits, "json": answer})])
    (index,) = index_sources(cfg, tokenizer)
    (bad,) = index.bad
    assert bad.info.key == "crowd" and "its 15 images and the text before the last take 271 tokens" in bad.reason
    assert "a row has 256 (data.seq_len)" in bad.reason
    for over_long in (OverLong.truncate, OverLong.drop):
        cfg.data.over_long = over_long
        seen = {document.key for micro in batches(cfg, tokenizer) for row in micro.provenance for document in row}
        assert seen <= {"fits"}
        report = verify_sources(cfg, tokenizer, VerifyOptions())
        assert [(fault.key, fault.fault) for fault in report.findings if not fault.warning] == [
            ("crowd", "too_many_images")
        ]
    assert "crowd" in table_of(cfg)


def test_an_over_long_sample_keeps_its_images_and_loses_the_end_of_its_answer(several, tokenizer):
    files = {f"{n}.png": png(n) for n in range(13)}
    cfg = several([("long", {**files, "json": conversation("q", "and so on " * 40)})])
    (micro, *_) = batches(cfg, tokenizer, 1)
    assert micro.document_lengths.tolist()[0] == 256 and len(micro.und_images) % 13 == 0
    assert micro.truncated_tokens


def test_one_image_that_cannot_be_decoded_costs_its_sample_and_no_other(several, tokenizer):
    samples = several_samples(12)
    samples[3][1]["2.png"] = b"\x89PNG nothing"
    cfg = several(samples)
    made = batches(cfg, tokenizer, 6)
    assert {skip.info.key for micro in made for skip in micro.skipped} == {"s0003"}
    whole = batches(several(several_samples(12)), tokenizer, 6)
    pictures = [image.numpy().tobytes() for micro in whole for image in micro.und_images]
    lost = set(pictures) - {i.numpy().tobytes() for m in made for i in m.und_images}
    assert len(lost) == 4, "the four images of s0003"


def test_a_sidecar_that_contradicts_itself_about_images_is_built_again(several, tokenizer):
    cfg = several(several_samples(10))
    (index,) = index_sources(cfg, tokenizer)
    shard, fingerprint = index.shards[0], index.locator.fingerprint
    tokens = sidecar.load_tokens(shard, fingerprint)
    damaged = dataclasses.replace(tokens, min_tokens=tokens.tokens + np.int32(1), ids_bytes=None)
    sidecar.store_tokens(shard, fingerprint, damaged)
    assert sidecar.load_tokens(shard, fingerprint) is None
    assert index_sources(cfg, tokenizer)[0].min_tokens.tolist() == index.min_tokens.tolist()


def test_a_system_text_of_a_sample_counts_among_what_stands_before_its_image(several, tokenizer):
    note = {"system": "You look very closely at every picture.", "conversations": TURNS}
    cfg = several([("a", {"png": png(1), "json": json_bytes(note)})])
    cfg.stage.template = type(cfg.stage.template).stage3
    (index,) = index_sources(cfg, tokenizer)
    (micro, *_) = batches(cfg, tokenizer, 1)
    lead = tokenizer.encode("You look very closely at every picture.\n\n")
    assert micro.input_ids.tolist()[1 : 1 + len(lead)] == lead
    assert index.images.tolist() == [1] and index.min_tokens[0] == micro.und_slots[SLOTS - 1] + 2


def table_of(cfg) -> str:
    out = io.StringIO()
    index_command(cfg, 1, table=out, progress=io.StringIO())
    return out.getvalue()


def solid_png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()
