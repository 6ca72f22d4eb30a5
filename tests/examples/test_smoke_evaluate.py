"""Judges and scores of the smoke run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.smoke import scenes
from examples.smoke.digits import load_digit_split
from examples.smoke.evaluate import (
    digit_ceiling,
    psnr,
    save_grid,
    scene_ceiling,
    scene_images,
    score_answers,
    score_digit_images,
    score_scene_images,
)
from examples.smoke.judge import DigitJudge, drawn, train_digit_judge
from examples.smoke.shards import held_out_scene

SCENES = [held_out_scene(0, "scenes-gen-val", number) for number in range(60)]


@pytest.fixture(scope="module")
def judge() -> DigitJudge:
    return train_digit_judge(0)


def test_the_digit_judge_names_held_out_digits_at_every_image_side(judge: DigitJudge) -> None:
    _, held_out = load_digit_split(0)
    assert judge.held_out_accuracy > 0.97
    for side in (32, 64):
        assert score_digit_images(drawn(held_out.ink, side), held_out.labels, judge).accuracy > 0.97


def test_the_digit_judge_gives_chance_to_images_with_shuffled_labels(judge: DigitJudge) -> None:
    _, held_out = load_digit_split(0)
    shuffled = np.random.default_rng(0).permutation(held_out.labels)
    assert score_digit_images(drawn(held_out.ink, 32), shuffled, judge).accuracy < 0.2


def test_true_scenes_score_1_in_every_category_and_far_above_chance() -> None:
    scores = score_scene_images(scene_images(SCENES, 32), SCENES)
    assert set(scores) == set(scenes.CATEGORIES)
    assert all(score.accuracy == 1.0 and score.chance < 0.6 and score.count == 10 for score in scores.values())


def test_images_of_other_prompts_score_about_chance() -> None:
    turned = scene_images(SCENES, 32)[np.roll(np.arange(60), 6)]
    for score in score_scene_images(turned, SCENES).values():
        assert score.accuracy < 0.75


def test_ceilings_are_the_scores_of_the_round_trip(judge: DigitJudge) -> None:
    _, held_out = load_digit_split(0)
    assert digit_ceiling(held_out.ink, held_out.labels, judge, lambda p: p, side=32).accuracy == judge.held_out_accuracy
    blank = scene_ceiling(SCENES, lambda p: np.full_like(p, 255), side=32)
    assert all(score.accuracy == 0.0 for score in blank.values())


def test_answers_are_compared_without_case_and_final_stop_and_chance_is_the_commonest_answer() -> None:
    scores = score_answers(["Red", "blue.", "two "], ["red", "red", "two"], ["colours", "colours", "counting"])
    assert scores["colours"].accuracy == 0.5 and scores["colours"].chance == 1.0
    assert scores["counting"].accuracy == 1.0 and scores["counting"].count == 1


def test_unequal_lengths_are_refused(judge: DigitJudge) -> None:
    image = np.zeros((1, 32, 32, 3), np.uint8)
    with pytest.raises(ValueError, match="1 images but 2 labels"):
        score_digit_images(image, [1, 2], judge)
    with pytest.raises(ValueError, match="1 images but 60 scenes"):
        score_scene_images(image, SCENES)
    with pytest.raises(ValueError, match="2 answers"):
        score_answers(["a", "b"], ["a"], ["x"])


def test_psnr_is_infinite_for_equal_images_and_20_db_for_errors_of_a_tenth() -> None:
    black = np.zeros((1, 4, 4, 3), np.uint8)
    assert psnr(black, black) == float("inf")
    assert psnr(black, black + 25) == pytest.approx(20.17, abs=0.01)


def test_a_grid_shows_every_image_and_grows_with_the_rows(tmp_path: Path) -> None:
    images = scene_images(SCENES[:5], 32)
    titles = ["a rather long prompt that needs several lines to be shown at all, and then some more words"] * 5
    single = Image.open(save_grid(tmp_path / "one.png", images, titles, columns=5, marks=[True] * 5, heading="scenes"))
    two = Image.open(save_grid(tmp_path / "two.png", images, titles, columns=3))
    assert single.width > two.width and two.height > single.height
    with pytest.raises(ValueError, match="one title"):
        save_grid(tmp_path / "bad.png", images, titles[:2])


def test_every_word_of_a_caption_is_drawn_whatever_its_length(tmp_path: Path) -> None:
    images = scene_images(SCENES[:1], 32)
    short, long = "a word", "a word\nanswer: " + "and a word " * 30
    heights = [
        Image.open(save_grid(tmp_path / f"{n}.png", images, [title], columns=1)).height
        for n, title in enumerate((short, long))
    ]
    assert heights[1] - heights[0] > 15 * 17
