"""Counts against the tables of docs/model.md, FLOPs against torch's own counter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from jp_train.config.schema import LanguageConfig, ModelConfig
from jp_train.model.flops import BatchStatistics, step_flops, vq_flops
from jp_train.model.freeze import set_trainable
from jp_train.model.parameters import parameter_counts
from jp_train.model.vq import VQTokenizer
from jp_train.types import Kind
from tests.model.janus_tiny import SIDE, pack, random_docs, tiny_config, tiny_model

STAGE1 = ["aligner", "gen_embed", "gen_aligner", "gen_head"]
STAGE2 = [*STAGE1, "language_model"]
STAGE3 = [*STAGE2, "vision_model"]
MODELS = {"1B": ModelConfig(), "7B": ModelConfig(language=LanguageConfig(4096, 11008, 30, 32))}

# docs/model.md; counted on the released models
TABLE = {
    "1B": {
        "vision_model": 303_688_704,
        "aligner": 6_295_552,
        "gen_vision_model": 71_883_403,
        "gen_embed": 131_072,
        "gen_aligner": 4_214_784,
        "gen_head": 37_767_168,
        "language_model": 1_652_656_128,
    },
    "7B": {
        "vision_model": 303_688_704,
        "aligner": 20_979_712,
        "gen_vision_model": 71_883_403,
        "gen_embed": 131_072,
        "gen_aligner": 16_818_176,
        "gen_head": 83_906_560,
        "language_model": 6_910_365_696,
    },
}
TOTAL = {"1B": 2_076_636_811, "7B": 7_407_773_323}
TRAINABLE = {"1B": (48_408_576, 1_701_064_704, 2_004_753_408), "7B": (121_835_520, 7_032_201_216, 7_335_889_920)}


@pytest.mark.parametrize("size", MODELS)
def test_parameter_counts_equal_those_of_the_released_models(size: str) -> None:
    counts = parameter_counts(MODELS[size])
    assert counts == TABLE[size]
    assert sum(counts.values()) == TOTAL[size]
    assert tuple(sum(counts[name] for name in stage) for stage in (STAGE1, STAGE2, STAGE3)) == TRAINABLE[size]


def test_picture_costs_equal_those_of_the_released_models() -> None:
    item = BatchStatistics(tokens=0, squared_lengths=0, und_images=1, gen_images=0, text_positions=0, image_positions=0)
    aligner = 576 * 2 * (1024 * 2048 + 2048 * 2048)
    assert (step_flops(MODELS["1B"], item, []).forward - aligner) / 1e12 == pytest.approx(0.381, abs=5e-4)
    encode, decode = vq_flops(MODELS["1B"])
    assert encode / 1e12 == pytest.approx(0.313, abs=5e-4)
    assert decode / 1e12 == pytest.approx(0.570, abs=5e-4)


def test_vq_arithmetic_equals_torchs_counter() -> None:
    cfg = tiny_config()
    with torch.device("meta"), torch.no_grad():
        vq = VQTokenizer(cfg.vq, SIDE).vqmodel
        with FlopCounterMode(display=False) as encoder:
            vq.quant_conv(vq.encoder(torch.empty(1, 3, SIDE, SIDE)))
        with FlopCounterMode(display=False) as decoder:
            vq.decoder(vq.post_quant_conv(torch.empty(1, cfg.vq.embed_dim, 2, 2)))
    codes = 2 * 2 * 2 * cfg.vq.embed_dim * cfg.vq.codebook_size
    assert vq_flops(cfg) == (encoder.get_total_flops() + codes, decoder.get_total_flops())


def written_out_attention(query, key, value, *_, is_causal=False, scale=None, **__):
    """Matrix products that torch's counter sees (it does not know the CPU's fused attention)."""
    scores = query @ key.transpose(-1, -2) * (scale or query.shape[-1] ** -0.5)
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
    return scores.softmax(-1) @ value


@pytest.mark.parametrize(
    "stage", [STAGE1, STAGE2, STAGE3, ["gen_head"], ["vision_model"]], ids=lambda names: f"{len(names)} modules"
)
@pytest.mark.parametrize("kind", list(Kind))
def test_forward_and_backward_equal_torchs_counter(
    stage: list[str], kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", written_out_attention)
    cfg, model = tiny_config(), tiny_model()
    set_trainable(model, stage)
    batch = pack(random_docs(1, [kind, Kind.GENERATION]))
    # the counter also sees the dummy picture and the stand-in position of the text head
    statistics = replace(
        BatchStatistics.of(batch),
        und_images=max(1, len(batch.und_images)),
        text_positions=max(1, batch.supervised_text_tokens),
    )
    with FlopCounterMode(display=False) as forward:
        terms = model(batch)
    with FlopCounterMode(display=False) as backward:
        (terms.text_sum + terms.image_sum).backward()
    expected = step_flops(cfg, statistics, stage)
    # the heads make their gradients in the forward pass: nothing is computed twice, nothing left out
    assert forward.get_total_flops() + backward.get_total_flops() == expected.forward + expected.backward


def test_a_frozen_module_has_no_weight_gradient_but_the_llm_still_passes_gradients_in_stage_1() -> None:
    s = BatchStatistics(
        tokens=4096, squared_lengths=4096 * 700, und_images=0, gen_images=0, text_positions=0, image_positions=0
    )
    stage1, stage2 = (step_flops(MODELS["7B"], s, stage) for stage in (STAGE1, STAGE2))
    weights = 4096 * 2.0 * 30 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    assert stage2.forward == stage1.forward
    assert stage2.backward - stage1.backward == weights
    assert stage2.backward == 2 * stage2.forward
    assert step_flops(MODELS["7B"], s, ["gen_head"]).backward == 0


def test_statistics_of_a_batch_are_its_counts_and_add_up() -> None:
    docs = random_docs(3, list(Kind))
    batch = pack(docs)
    result = BatchStatistics.of(batch)
    lengths = [len(doc.ids) for doc in docs]
    assert (result.tokens, result.squared_lengths) == (sum(lengths), sum(n * n for n in lengths))
    assert (result.und_images, result.gen_images, result.encoded_images) == (1, 1, 0)
    assert (result.text_positions, result.image_positions) == (
        batch.supervised_text_tokens,
        batch.supervised_image_tokens,
    )
    pending = replace(batch, gen_pending=torch.tensor([0]), gen_images=torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8))
    assert (result + BatchStatistics.of(pending)).encoded_images == 1
