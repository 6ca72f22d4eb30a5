"""Step times against published ones. Four rows of mosaicml/llm-foundry, scripts/train/benchmarking/README.md at 061f2c7
(A100-40GB, FSDP over all GPUs, bf16): another framework, but the same arithmetic, sharding and links."""

from __future__ import annotations

import pytest

from jp_train.config import RunConfig, batch_plan
from jp_train.config.choices import BatchUnit
from jp_train.config.schema import LanguageConfig, MixtureConfig, VisionConfig, VQConfig
from jp_train.model.flops import BatchStatistics
from jp_train.tools.forecast.candidates import setting_of
from jp_train.tools.forecast.communication import communication
from jp_train.tools.forecast.hardware import PRESETS
from jp_train.tools.forecast.host import host_time
from jp_train.tools.forecast.memory import forecast_memory
from jp_train.tools.forecast.shapes import MicroBatch, shapes_of
from jp_train.tools.forecast.timing import StepTime, arithmetic, step_time

SHAPES = {"1b": (2048, 24, 16), "7b": (4096, 32, 32)}
"""Width, layers and heads of MPT; its MLP is 4 widths without a gate, here 8/3 with one: the same products."""
PUBLISHED = {
    ("1b", 4096, 8): (4, 8, 55.85, 16_856),
    ("1b", 2048, 128): (10, 1, 54.41, 18_647),
    ("7b", 4096, 8): (6, 4, 50.11, 3_366),
    ("7b", 2048, 128): (18, 1, 50.14, 3_623),
}
"""Rows of a micro-batch, micro-batches, MFU in per cent, tokens a second and GPU. The 7B computes every layer again."""


def text_model(model: str, length: int, ranks: int) -> tuple[RunConfig, BatchStatistics]:
    """A run on full rows of one text each, with next to no vision."""
    width, layers, heads = SHAPES[model]
    rows, micro_batches, _, _ = PUBLISHED[model, length, ranks]
    cfg = RunConfig()
    cfg.model.vision = VisionConfig(hidden_size=32, layers=1, heads=2, image_size=32, patch_size=16)
    cfg.model.vq = VQConfig(codebook_size=64, embed_dim=8, base_channels=32, latent_channels=32)
    cfg.model.language = LanguageConfig(
        hidden_size=width, intermediate_size=round(8 * width / 3), layers=layers, heads=heads, vocab_size=50_368
    )
    cfg.stage.trainable, cfg.stage.mixture = ["language_model"], MixtureConfig(understanding=0, text=1, generation=0)
    cfg.stage.batch_unit, cfg.stage.batch_size = BatchUnit.packed, rows * micro_batches * ranks
    cfg.data.seq_len, cfg.engine.micro_batch_rows = length, rows
    cfg.engine.activation_checkpointing = model == "7b"
    texts = cfg.stage.batch_size
    return cfg, BatchStatistics(
        tokens=texts * length,
        squared_lengths=texts * length**2,
        und_images=0,
        gen_images=0,
        text_positions=texts * length,
        image_positions=0,
    )


def forecast(model: str, length: int, ranks: int) -> StepTime:
    cfg, step = text_model(model, length, ranks)
    shapes, plan, hardware = shapes_of(cfg), batch_plan(cfg, ranks), PRESETS["a100-40gb"]
    setting, nodes, rows = setting_of(cfg, plan), ranks // 8, cfg.engine.micro_batch_rows
    micro_batch = MicroBatch(
        tokens=rows * length, und_images=0, gen_images=0, text_positions=rows * length, image_positions=0
    )
    memory = forecast_memory(shapes, micro_batch, setting)
    micro_batches = plan.gradient_accumulation_steps
    return step_time(
        arithmetic(cfg, shapes, step, checkpointing=setting.checkpointing),
        communication(shapes, memory.replay, setting, nodes=nodes, micro_batches=micro_batches),
        host_time(shapes, memory.visits, memory.replay, setting, micro_batches=micro_batches, speed=1.0),
        shapes,
        setting,
        hardware,
        nodes=nodes,
        tokens=float(step.tokens),
    )


@pytest.mark.parametrize(("model", "length", "ranks"), PUBLISHED)
def test_a_step_takes_the_published_time_within_a_fifth(model, length, ranks):
    _, _, mfu, tokens_per_second = PUBLISHED[model, length, ranks]
    time = forecast(model, length, ranks)
    print(
        f"{model}, {length} tokens, {ranks} GPUs: MFU {100 * time.mfu:.1f} % of {mfu} published; "
        f"{time.tokens_per_second:,.0f} tokens/s of {tokens_per_second:,}; bound by {time.bound}"
    )
    assert 100 * time.mfu == pytest.approx(mfu, rel=0.2)
    assert time.tokens_per_second == pytest.approx(tokens_per_second, rel=0.2)


def test_a_longer_host_pass_is_the_step_and_waiting_is_counted_once():
    cfg, step = text_model("1b", 4096, 8)
    shapes, plan = shapes_of(cfg), batch_plan(cfg, 8)
    setting = setting_of(cfg, plan)
    memory = forecast_memory(
        shapes, MicroBatch(tokens=16384, und_images=0, gen_images=0, text_positions=16384, image_positions=0), setting
    )
    sent = communication(shapes, memory.replay, setting, nodes=1, micro_batches=8)
    work = arithmetic(cfg, shapes, step, checkpointing=0)

    def taken(host_speed: float) -> StepTime:
        host = host_time(shapes, memory.visits, memory.replay, setting, micro_batches=8, speed=host_speed)
        return step_time(work, sent, host, shapes, setting, PRESETS["a100-40gb"], nodes=1, tokens=float(step.tokens))

    fast, slow = taken(1000.0), taken(0.01)
    host = host_time(shapes, memory.visits, memory.replay, setting, micro_batches=8, speed=0.01)
    assert fast.bound == "compute" and slow.bound == "host"
    assert slow.overlapped == pytest.approx(8 * (host.forward + host.backward) + fast.parts["update"])
    assert fast.parts["host"] == 0 and sum(slow.parts.values()) == pytest.approx(slow.serial)
