"""Images, texts and shards of the smoke run."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from examples.smoke import digits, scene_text, scenes, text
from examples.smoke.reading import image_of, note_of, read_source, texts_of
from examples.smoke.scene_judge import read_scene, satisfies
from examples.smoke.seeding import generator
from examples.smoke.shards import (
    DETAIL_QUESTION,
    GENERATION_SOURCES,
    PAIR_SOURCES,
    TEXT_SOURCES,
    UNDERSTANDING_SOURCES,
    ShardSizes,
    build_shards,
    source_counts,
    source_samples,
)
from jp_train.errors import ConfigError, DataError

ALL_PAIRS = tuple((s, c) for s in scenes.SHAPES for c in scenes.COLOURS)
SIZES = ShardSizes(digits_gen=30, scenes_gen=50, digits_und=30, scenes_und=50, val_each=12, samples_per_shard=25)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_shards(tmp_path_factory.mktemp("shards"), 3, SIZES).root


def folder_digest(root: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.tar")):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


@pytest.mark.parametrize("side", [32, 72])
@pytest.mark.parametrize("category", scenes.CATEGORIES)
def test_the_scene_judge_reads_true_images_without_error_at_every_side(category: str, side: int) -> None:
    for number in range(15):
        scene = scenes.sample_scene(generator(5, category, number), category, pairs=ALL_PAIRS)
        image = scenes.draw_scene(scene).resize((side, side), Image.Resampling.BICUBIC)
        read = read_scene(np.asarray(image))
        assert satisfies(read, scene)
        assert sorted(f.pair for f in read) == sorted(o.pair for o in scene.objects)


@pytest.mark.parametrize(
    ("change", "category"),
    [
        ({"shape": "circle"}, "single"),
        ({"colour": "red"}, "colours"),
        ({"colour": "red"}, "attribution"),
        ({"y": 0.75, "x": 0.75}, "position"),
    ],
)
def test_the_scene_judge_refuses_a_image_that_differs_in_what_the_category_asks(change: dict, category: str) -> None:
    blue_cross = scenes.SceneObject(shape="cross", colour="blue", cell="top left", x=0.25, y=0.25)
    green_square = scenes.SceneObject(shape="square", colour="green", cell="bottom left", x=0.25, y=0.75)
    objects = (blue_cross,) if category in ("single", "colours") else (blue_cross, green_square)
    expected = scenes.Scene(category=category, objects=objects)
    fields = {"shape": "cross", "colour": "blue", "cell": "top left", "x": 0.25, "y": 0.25} | change
    shown = scenes.Scene(category=category, objects=(scenes.SceneObject(**fields), *objects[1:]))
    assert satisfies(read_scene(np.asarray(scenes.draw_scene(expected))), expected)
    assert not satisfies(read_scene(np.asarray(scenes.draw_scene(shown))), expected)


def test_an_empty_and_a_noisy_image_show_nothing_of_the_scene() -> None:
    scene = scenes.sample_scene(generator(0, "x"), "single", pairs=ALL_PAIRS)
    noise = generator(0, "noise").integers(0, 256, size=(32, 32, 3)).astype(np.uint8)
    assert not satisfies(read_scene(np.full((32, 32, 3), 255, np.uint8)), scene)
    assert not satisfies(read_scene(noise), scene)


def test_held_out_pairs_never_occur_in_a_training_scene_or_its_words() -> None:
    held_out_words = re.compile("|".join(rf"\b{c} {s}(es|s)?\b" for s, c in scenes.HELD_OUT_PAIRS))
    for source in ("scenes-gen", "scenes-und"):
        for sample in source_samples(1, source, 300):
            assert not held_out_words.search(" ".join(texts_of({"__key__": "k", **sample})))
    for number in range(600):
        category = scenes.CATEGORIES[number % 6]
        scene = scenes.sample_scene(generator(2, number), category, pairs=scenes.training_pairs())
        assert not scene.pairs & scenes.HELD_OUT_PAIRS


def test_the_pairs_sources_show_only_held_out_pairs() -> None:
    for sample in source_samples(1, "pairs-gen-val", 24):
        read = read_scene(image_of(sample, 72))
        assert read and {f.pair for f in read} <= scenes.HELD_OUT_PAIRS


def test_captions_and_answers_are_true_of_the_image_as_the_judge_reads_it() -> None:
    for number in range(60):
        category = scenes.CATEGORIES[number % 6]
        scene = scenes.sample_scene(generator(4, number), category, pairs=ALL_PAIRS)
        read = read_scene(np.asarray(scenes.draw_scene(scene)))
        description = scene_text.scene_detail(scene)
        assert all(f.shape in description and f.colour in description for f in read)
        for question in scene_text.scene_questions(scene):
            if question.skill == "counting":
                assert question.answer == scenes.COUNTS[len(read)]
            if question.skill in ("colours", "attribution"):
                shape = next(s for s in scenes.SHAPES if s in question.text)
                assert {f.colour for f in read if f.shape == shape} == {question.answer}


def test_training_and_held_out_digits_share_no_original_and_cover_every_label() -> None:
    train, held_out = digits.load_digit_split(0)
    assert len(train) + len(held_out) == 1797
    assert set(train.labels) == set(held_out.labels) == set(range(10))
    rows = {bytes(ink) for ink in train.ink}
    assert sum(bytes(ink) in rows for ink in held_out.ink) == 0


def test_text_splits_are_disjoint_and_lose_no_words() -> None:
    train, held_out = text.split_documents(0)
    assert train and held_out and not set(train) & set(held_out)
    words = {word for topic in text.load_topics() for paragraph in topic.paragraphs for word in paragraph.split()}
    assert {word for d in train + held_out for word in d.split()} == words
    trained, kept_back = text.split_conversations(0)
    assert trained and kept_back and not {d.answer for d in trained} & {d.answer for d in kept_back}


def test_equal_seeds_give_equal_bytes_and_other_seeds_do_not(built: Path, tmp_path: Path) -> None:
    again = build_shards(tmp_path / "again", 3, SIZES).root
    other = build_shards(tmp_path / "other", 4, SIZES).root
    assert folder_digest(built) == folder_digest(again) != folder_digest(other)


def test_asking_for_more_samples_leaves_the_earlier_ones_as_they_were() -> None:
    few, more = (list(source_samples(0, "scenes-gen", count)) for count in (5, 9))
    assert more[:5] == few


def test_every_source_is_written_and_readable_by_webdataset_in_its_layout(built: Path) -> None:
    assert {p.name for p in built.iterdir()} == set(source_counts(SIZES))
    for source in source_counts(SIZES):
        urls = [str(p) for p in sorted((built / source).glob("*.tar"))]
        samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
        assert len({s["__key__"] for s in samples}) == len(samples) > 0
        base = source.removesuffix("-val").replace("pairs", "scenes")
        for sample in samples:
            if base in GENERATION_SOURCES:
                assert json.loads(sample["json"])["caption"] and sample["png"]
            elif base in UNDERSTANDING_SOURCES:
                human, gpt = json.loads(sample["json"])["conversations"]
                assert (
                    human["from"] == "human"
                    and human["value"].startswith("<image>\n")
                    and gpt["from"] == "gpt"
                    and sample["png"]
                )
            elif base == "text":
                assert sample["txt"].decode().strip()
            else:
                assert "<image>" not in json.loads(sample["json"])["conversations"][0]["value"]


def test_our_reader_sees_what_webdataset_sees(built: Path) -> None:
    urls = [str(p) for p in sorted((built / "scenes-und").glob("*.tar"))]
    theirs = [(s["__key__"], s["json"]) for s in webdataset.WebDataset(urls, shardshuffle=False)]
    assert [(s["__key__"], s["json"]) for s in read_source(built / "scenes-und")] == theirs


def test_understanding_sources_hold_both_descriptions_and_questions(built: Path) -> None:
    for source in UNDERSTANDING_SOURCES:
        first_texts = {texts_of(s)[0] for s in read_source(built / source)}
        assert DETAIL_QUESTION in first_texts and len(first_texts) > 1


def test_held_out_scenes_take_the_categories_in_turn(built: Path) -> None:
    for source in ("scenes-gen-val", *PAIR_SOURCES):
        assert [note_of(s)["category"] for s in read_source(built / source)] == [*scenes.CATEGORIES] * 2


def test_building_over_old_shards_and_reading_a_missing_source_are_refused(built: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="already holds shards"):
        build_shards(built, 3, SIZES)
    with pytest.raises(DataError, match="no .tar shards"):
        next(read_source(tmp_path))
    with pytest.raises(ConfigError, match="val_each"):
        ShardSizes(val_each=0)


def test_text_sources_are_named_once() -> None:
    assert set(TEXT_SOURCES) == {"text", "text-dialogues"}
