"""The formulas of activations against torch's own accounting: a forward and backward pass of the true shapes on fake
tensors."""

from dataclasses import replace

import pytest

from bench.forecast import fake_passes, predicted_passes, synthetic_batch, true_shape
from jp_train.tools.forecast.activations import Numerics, language_block, text_head, vision_block, vq_encoding
from jp_train.tools.forecast.shapes import MicroBatch, shapes_of
from jp_train.types import LOGITS_BLOCK

BF16 = Numerics(size=2, fused=True, chunk=1024)
BATCH = MicroBatch(tokens=4096, und_images=3, gen_images=2, text_positions=500, image_positions=1152)


def test_a_trained_decoder_layer_keeps_16_bytes_a_token_and_channel_and_8_a_hidden_value():
    shapes = shapes_of(true_shape("1b", 2))
    expected = 16 * 4096 * 2048 + 8 * 4096 * 5632 + 4 * 4096 * 16
    assert language_block(shapes, BATCH, BF16).saved == expected
    frozen = language_block(shapes_of(true_shape("1b", 1)), BATCH, BF16)
    assert frozen.saved == expected, "the norm's kernel keeps its input whether or not its weight learns"
    cpu = replace(BF16, fused=False)
    kept, frozen = (language_block(shapes_of(true_shape("1b", stage)), BATCH, cpu).saved for stage in (2, 1))
    assert kept - frozen == 2 * 4 * 4096 * 2048, "without the kernel a trained norm keeps its normalised value"


def test_a_frozen_vision_tower_keeps_nothing_and_a_trained_one_32_bytes_a_token_and_channel():
    assert vision_block(shapes_of(true_shape("1b", 2)), BATCH, BF16).saved == 0
    tokens = 3 * 576
    expected = 32 * tokens * 1024 + 4 * tokens * 16
    assert vision_block(shapes_of(true_shape("1b", 3)), BATCH, BF16).saved == expected


def test_logits_take_a_chunk_at_a_time_however_many_positions_there_are():
    shapes = shapes_of(true_shape("1b", 2))
    few, many = (
        text_head(shapes, MicroBatch(**{**vars_of(BATCH), "text_positions": positions}), BF16)
        for positions in (2048, 200_000)
    )
    block = 4 * LOGITS_BLOCK * shapes.vocabulary
    for head, positions in ((few, 2048), (many, 200_000)):
        assert head.forward - 2 * positions * 2048 == 2 * 1024 * shapes.vocabulary + 2 * block
        assert head.saved == 2 * positions * 2048 + 4 * shapes.vocabulary * 2048, "the weight's gradient waits in fp32"


def test_encoding_on_the_fly_takes_at_most_eight_images_at_once():
    shapes = shapes_of(true_shape("1b", 2))
    one, many = (vq_encoding(shapes, MicroBatch(**{**vars_of(BATCH), "encoded_images": n})) for n in (1, 100))
    assert many == 8 * one == 8 * 4 * 4 * 128 * 384**2


def vars_of(batch: MicroBatch) -> dict[str, int]:
    return {name: getattr(batch, name) for name in batch.__slots__}


@pytest.mark.parametrize(
    ("model", "stage", "checkpointing", "documents"),
    [
        ("1b", 2, False, "ugt"),
        ("1b", 3, True, "u"),
        ("7b", 2, True, "ugt"),
        ("7b", 1, False, "ug"),
        ("7b", 2, 6, "ugt"),
    ],
)
def test_a_pass_of_the_true_model_takes_what_the_formulas_say(model, stage, checkpointing, documents):
    cfg = true_shape(model, stage)
    batch = synthetic_batch(cfg, 1, documents=documents)
    measured = fake_passes(cfg, batch, checkpointing=checkpointing)
    predicted = predicted_passes(cfg, batch, checkpointing=checkpointing)
    assert measured["backward"] >= measured["saved"] > 0
    # the log-sum-exp's own copy of the logits lies inside a kernel, which fake tensors do not see: only the backward
    # pass is compared to the letter
    assert predicted["backward"] == pytest.approx(measured["backward"], rel=0.10)
    assert (
        0.95 * measured["forward"]
        < predicted["forward"]
        < measured["forward"] + 8 * LOGITS_BLOCK * cfg.model.language.vocab_size
    )
