"""The pretrained parts and the folder that stage 1 starts from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import JanusForConditionalGeneration

from examples.smoke.pretrain import pretrain_all, special_ids
from examples.smoke.pretrain_llm import TextTraining, train_llm
from examples.smoke.pretrain_vision import sigmoid_loss
from examples.smoke.pretrain_vq import (
    PAPER,
    UnitCodebook,
    decode_images,
    encode_ids,
    scale_weights,
    shows_something,
    to_model_range,
    train_vq,
)
from examples.smoke.shards import build_shards
from examples.smoke.sizes import ModelSizes, SmokeSizes, janus_config
from examples.smoke.tokenizer import train_tokenizer
from jp_train.errors import ConfigError

SMALL = ModelSizes(vq_channel_multiplier=(1, 1, 1, 1), vq_codes=64, llm_layers=2, vision_layers=1)
SIZES = replace(SmokeSizes.minute(), model=SMALL)
IDS = {"bos": 1, "eos": 2, "pad": 3, "image": 4}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pretrain")
    build_shards(root / "data", 0, SIZES.shards)
    train_tokenizer(root / "data", root / "tokenizer")
    return pretrain_all(root / "init", root / "data", root / "tokenizer", SIZES, 0)


@pytest.fixture(scope="module")
def model(made: Path) -> JanusForConditionalGeneration:
    return JanusForConditionalGeneration.from_pretrained(made)


def random_images(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_the_folder_loads_with_no_missing_and_no_unexpected_key_and_untied(made: Path) -> None:
    model, info = JanusForConditionalGeneration.from_pretrained(made, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.tie_word_embeddings is False and model.config.text_config.tie_word_embeddings is False
    assert not torch.equal(model.lm_head.weight, model.model.language_model.embed_tokens.weight)


def test_generation_embeddings_are_the_codebook_and_its_rows_have_unit_length(
    model: JanusForConditionalGeneration,
) -> None:
    rows = model.model.vqmodel.quantize.embedding.weight
    assert torch.allclose(rows.norm(dim=-1), torch.ones(len(rows)), atol=1e-6)
    assert torch.equal(model.model.generation_embeddings.weight, rows)


def test_vq_ids_are_the_nearest_unit_rows_in_transformers_too(model: JanusForConditionalGeneration) -> None:
    vq = model.model.vqmodel.eval()
    pixels = to_model_range(random_images(6))
    ours = encode_ids(vq, pixels)
    with torch.no_grad():
        latent = vq.quant_conv(vq.encoder(pixels)).permute(0, 2, 3, 1).reshape(-1, 8)
        theirs = vq.encode(pixels).image_tokens
    distances = torch.cdist(F.normalize(latent, dim=-1).double(), vq.quantize.embedding.weight.double())
    assert torch.equal(ours.flatten(), distances.argmin(-1))
    assert torch.equal(ours.flatten(), theirs.flatten())
    assert decode_images(vq, ours).shape == (6, 3, 32, 32)


def test_adaptors_and_image_head_start_at_the_scale_of_their_inputs_and_without_bias(
    model: JanusForConditionalGeneration,
) -> None:
    for part in (model.model.aligner, model.model.generation_aligner, model.model.generation_head):
        for name, weight in part.named_parameters():
            if name.endswith("bias"):
                assert not weight.any()
            else:
                assert weight.std().item() == pytest.approx(weight.shape[1] ** -0.5, rel=0.15)


def test_both_image_kinds_take_the_same_number_of_slots(model: JanusForConditionalGeneration) -> None:
    config = model.config
    assert config.vision_config.num_image_tokens == config.vq_config.num_patches**2 == ModelSizes().image_tokens
    features = model.model.vision_model(to_model_range(random_images(1))).last_hidden_state
    assert features.shape[1] == encode_ids(model.model.vqmodel, to_model_range(random_images(1))).shape[1]


def test_a_patch_that_differs_from_the_vq_stride_is_refused() -> None:
    with pytest.raises(ConfigError, match="patch and stride must be equal"):
        ModelSizes(patch_size=4)


def test_equal_seeds_train_equal_vq_weights() -> None:
    config = janus_config(SMALL, vocab_size=16, special_ids=IDS).vq_config
    first, second = (
        train_vq(config, random_images(12), replace(SIZES.vq, batch_images=4), seed=1).state_dict() for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_images_of_the_wrong_side_are_refused_with_the_right_side() -> None:
    config = janus_config(SMALL, vocab_size=16, special_ids=IDS).vq_config
    with pytest.raises(ValueError, match="use images of 32 px"):
        train_vq(config, torch.zeros(2, 3, 48, 48, dtype=torch.uint8), SIZES.vq, seed=0)


def test_kmeans_and_restarts_leave_unit_rows_and_no_dead_row() -> None:
    generator = torch.Generator().manual_seed(0)
    unit = F.normalize(torch.randn(400, 8, generator=generator), dim=-1)
    codebook = UnitCodebook(torch.zeros(32, 8), 0.9, generator)
    codebook.kmeans(unit)
    assert len(codebook.nearest(unit).unique()) == 32
    codebook.counts[:5] = 0.0
    assert codebook.restart(unit, below=0.05) == 4, "the paper row never moves"
    assert codebook.weight[PAPER].tolist() == [1.0] + [0.0] * 7
    codebook.update(unit, codebook.nearest(unit))
    assert torch.allclose(codebook.weight.norm(dim=-1), torch.ones(32), atol=1e-5)


def test_plain_patches_take_the_paper_code_and_only_they_are_taught_to() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.full((64, 3, 32, 32), 255, dtype=torch.uint8)
    images[:, :, 8:16, 8:16] = torch.randint(0, 200, (64, 3, 8, 8), generator=generator, dtype=torch.uint8)
    config = janus_config(SMALL, vocab_size=16, special_ids=IDS).vq_config
    training = replace(SIZES.vq, steps=60, continuous_steps=20, freeze_codebook_last=10, batch_images=16)
    ids = encode_ids(train_vq(config, images, training, seed=0), to_model_range(images))
    shows = shows_something(to_model_range(images), 8).view_as(ids)
    assert (ids[~shows] == PAPER).float().mean() > 0.9
    assert (ids[shows] == PAPER).float().mean() < 0.1


def test_only_patches_that_show_something_ask_for_codes() -> None:
    images = torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    images[0, 0, 9, 18] = 40  # one bluish pixel in the patch of row 1, column 2
    assert torch.nonzero(shows_something(to_model_range(images), 8)).flatten().tolist() == [6]


def test_scaled_weights_keep_the_signal_where_the_default_start_loses_it() -> None:
    config = janus_config(SMALL, vocab_size=16, special_ids=IDS).vq_config
    layer = torch.nn.Conv2d(3, 64, 3)
    scale_weights(layer, torch.Generator().manual_seed(0))
    assert layer.weight.std().item() == pytest.approx(27**-0.5, rel=0.1)
    assert config.initializer_range == 0.02 < layer.weight.std().item()


def test_the_sigmoid_loss_is_lower_for_matching_pairs_and_counts_equal_texts_as_matching() -> None:
    unit, scale, bias = torch.eye(4), torch.tensor(10.0), torch.tensor(-5.0)
    same = torch.eye(4, dtype=torch.bool)
    assert sigmoid_loss(unit, unit, scale, bias, same) < sigmoid_loss(unit, unit.flip(0), scale, bias, same)
    twins = unit[[0, 0, 2, 3]]
    marked = same.clone()
    marked[0, 1] = marked[1, 0] = True
    assert sigmoid_loss(twins, twins, scale, bias, marked) < sigmoid_loss(twins, twins, scale, bias, same)


def test_a_tokenizer_without_the_special_tokens_is_named_as_the_fault() -> None:
    class Plain:
        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

    with pytest.raises(ConfigError, match="begin_of_image"):
        special_ids(Plain())


def test_text_that_fills_no_row_is_refused() -> None:
    config = janus_config(replace(SMALL, llm_layers=1), vocab_size=16, special_ids=IDS).text_config
    with pytest.raises(ValueError, match="do not fill one row"):
        train_llm(config, [[1, 5, 2]], TextTraining(steps=1, batch_rows=1, row_tokens=8, learning_rate=1e-3), seed=0)
