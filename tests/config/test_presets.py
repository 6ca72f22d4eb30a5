"""Presets against the paper's tables, typed in here by hand (arXiv 2501.17811 tables 1 and 2; arXiv 2410.13848 table
1)."""

import pytest

from jp_train.config import load_config

STAGE1 = {"aligner", "gen_embed", "gen_aligner", "gen_head"}
STAGE2 = STAGE1 | {"language_model"}
STAGE3 = STAGE2 | {"vision_model"}

#  preset: lr, schedule, decay, warm-up, steps, stop, batch, unit, ratio, trainable, template
TABLE = {
    "janus_pro_1b/stage1": (1e-3, "constant", 0, 600, 20_000, None, 256, "samples", (1, 0, 3), STAGE1),
    "janus_pro_1b/stage2": (1e-4, "constant", 0, 5000, 360_000, 270_000, 512, "packed", (2, 3, 5), STAGE2),
    "janus_pro_1b/stage3": (4e-5, "constant", 0, 0, 80_000, None, 128, "packed", (5, 1, 4), STAGE3),
    "janus_pro_7b/stage1": (1e-3, "constant", 0, 600, 20_000, None, 256, "samples", (1, 0, 3), STAGE1),
    "janus_pro_7b/stage2": (1e-4, "constant", 0, 5000, 360_000, 270_000, 512, "packed", (2, 3, 5), STAGE2),
    "janus_pro_7b/stage3": (4e-5, "constant", 0, 0, 40_000, None, 128, "packed", (5, 1, 4), STAGE3),
    "janus_1b/stage1": (1e-3, "cosine", 0, 300, 10_000, None, 256, "samples", (1, 0, 1), STAGE1),
    "janus_1b/stage2": (1e-4, "constant", 0, 5000, 180_000, None, 512, "packed", (2, 3, 5), STAGE2),
    "janus_1b/stage3": (2e-5, "constant", 0.1, 0, 24_000, None, 256, "packed", (7, 3, 10), STAGE3),
}

#  hidden, FFN, layers, heads, vocabulary
LANGUAGE = {
    "janus_pro_1b": (2048, 5632, 24, 16, 102_400),
    "janus_pro_7b": (4096, 11_008, 30, 32, 102_400),
    "janus_1b": (2048, 5632, 24, 16, 102_400),
}


def load(name, tmp_path):
    file = tmp_path / "preset.yaml"
    file.write_text(f"preset: {name}\n")
    return load_config(file)


@pytest.mark.parametrize("name", TABLE)
def test_stage_presets_equal_table_2(name, tmp_path):
    config = load(name, tmp_path)
    stage, optimizer = config.stage, config.optimizer
    ratio = (stage.mixture.understanding, stage.mixture.text, stage.mixture.generation)
    assert TABLE[name] == (
        optimizer.lr,
        optimizer.schedule.value,
        optimizer.weight_decay,
        optimizer.warmup_steps,
        stage.training_steps,
        stage.early_stop.at_step,
        stage.batch_size,
        stage.batch_unit.value,
        ratio,
        set(stage.trainable),
    )
    assert (optimizer.beta1, optimizer.beta2, optimizer.clip, optimizer.eps) == (0.9, 0.95, 1.0, 1e-8)
    assert config.data.seq_len == 4096 and config.data.pad_dropout == 0.1
    assert config.data.first_sentence == (0.25 if name.endswith("stage2") else 0.0)
    assert stage.template.value == name.rsplit("/")[-1]
    assert config.precision.value == "bf16"


@pytest.mark.parametrize("name", TABLE)
def test_model_presets_equal_table_1(name, tmp_path):
    model = load(name, tmp_path).model
    language = model.language
    shape = (language.hidden_size, language.intermediate_size, language.layers, language.heads, language.vocab_size)
    assert shape == LANGUAGE[name.split("/")[0]]
    assert (language.rms_norm_eps, language.rope_theta, language.max_position_embeddings) == (1e-6, 10_000.0, 16_384)
    vision = model.vision
    assert (vision.hidden_size, vision.layers, vision.heads, vision.mlp_ratio) == (1024, 24, 16, 4.0)
    assert (vision.image_size, vision.patch_size) == (384, 16)
    vq = model.vq
    assert (vq.codebook_size, vq.embed_dim, vq.base_channels, vq.res_blocks, vq.latent_channels) == (
        16_384,
        8,
        128,
        2,
        256,
    )
    assert list(vq.channel_multiplier) == [1, 1, 2, 2, 4]


def test_every_preset_of_the_paper_is_in_the_table():
    from jp_train.config import preset_names

    assert {name for name in preset_names() if not name.startswith("tiny/")} == set(TABLE)
