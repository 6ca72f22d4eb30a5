"""The list of parameters against the modules, and the sizes that do not fit each other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from jp_train.config.schema import LossConfig, ModelConfig, VQConfig
from jp_train.errors import ConfigError
from jp_train.model.janus_pro import JanusPro
from jp_train.model.parameters import parameter_counts, parameter_shapes, vq_shapes
from jp_train.model.vq import VQTokenizer
from tests.model.janus_tiny import tiny_config

MODELS = {
    "tiny": tiny_config(),
    "1B": ModelConfig(),
    "two residual blocks, three levels": replace(
        tiny_config(), vq=VQConfig(base_channels=32, channel_multiplier=[1, 2, 4, 4], res_blocks=3, latent_channels=16)
    ),
}


@pytest.mark.parametrize("size", MODELS)
def test_names_shapes_and_order_are_those_of_the_modules(size: str) -> None:
    cfg = MODELS[size]
    with torch.device("meta"):
        model, vq = JanusPro(cfg, LossConfig(), 1, False, 0), VQTokenizer(cfg.vq, cfg.vision.image_size)
    built = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    assert list(parameter_shapes(cfg).items()) == built
    built = [(f"model.{name}", tuple(parameter.shape)) for name, parameter in vq.named_parameters()]
    assert list(vq_shapes(cfg).items()) == built


def test_counts_are_those_of_the_modules() -> None:
    cfg = tiny_config()
    model = JanusPro(cfg, LossConfig(), 1, False, 0)
    assert sum(parameter_counts(cfg).values()) == sum(
        parameter.numel() for part in (model, VQTokenizer(cfg.vq, 16)) for parameter in part.parameters()
    )


def test_channels_that_the_groups_of_a_norm_do_not_divide_are_an_error_of_the_configuration() -> None:
    cfg = tiny_config()
    cfg.vq.base_channels = 48
    with pytest.raises(ConfigError, match=r"base_channels=48 .* divisible by 32"):
        parameter_shapes(cfg)
