"""Fixtures of the data tests: a tiny SentencePiece tokenizer trained here, tiny tar shards written with webdataset,
a tiny run config."""

from __future__ import annotations

import io
import pydoc_data.topics
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from jp_train.config.schema import MixtureConfig, RunConfig, SourceConfig, SourceKind, Template, TokenizerConfig
from jp_train.data.shards import ShardReader
from jp_train.data.tokenizer import Tokenizer, load_tokenizer
from tests.data.data_samples import (
    IMAGE_SIZE,
    PATCH,
    generation_samples,
    stored_samples,
    text_samples,
    understanding_samples,
    write_shard,
)


@pytest.fixture(scope="session")
def tokenizer_config(tmp_path_factory) -> TokenizerConfig:
    """A SentencePiece model of 500 pieces with all special tokens of Janus-Pro."""
    import sentencepiece

    cfg = TokenizerConfig()
    model = io.BytesIO()
    text = "".join(sorted(pydoc_data.topics.topics.values(), key=len)[:40])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.split("\n")),
        model_writer=model,
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        bos_id=0,
        eos_id=1,
        pad_id=2,
        unk_id=3,
        bos_piece=cfg.bos,
        eos_piece=cfg.eos,
        pad_piece=cfg.pad,
        control_symbols=[cfg.boi, cfg.eoi, cfg.image_placeholder, cfg.user, cfg.assistant],
        num_threads=1,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tiny.model"
    path.write_bytes(model.getvalue())
    return TokenizerConfig(path=str(path))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_config) -> Tokenizer:
    return load_tokenizer(tokenizer_config)


@pytest.fixture
def cfg(tokenizer_config) -> RunConfig:
    """A run config with images of 32 pixels in 16 slots, rows of 256 tokens, no sources and no random choices."""
    config = RunConfig(tokenizer=tokenizer_config, seed=7)
    config.model.vision.image_size, config.model.vision.patch_size = IMAGE_SIZE, PATCH
    config.model.vq.channel_multiplier = [1, 1, 1, 1]
    config.model.vq.codebook_size = 64
    config.model.language.vocab_size = 512
    config.data.seq_len = 256
    config.data.workers = 0
    config.data.pad_dropout = 0.0
    config.data.system_prompt = "Be helpful."
    config.stage.template = Template.stage2
    return config


@pytest.fixture
def mixed(cfg, tmp_path) -> Callable[..., RunConfig]:
    """Writes four small sources of all kinds and sets them in `cfg`: 8 rows a step, 2:3:5, pad dropout and first
    sentences on."""

    def make(broken: frozenset[str] = frozenset()) -> RunConfig:
        def damage(samples):
            return [
                (key, {**fields, "png": fields["png"][:60]} if key in broken else fields) for key, fields in samples
            ]

        write_shard(tmp_path / "real-0.tar", damage(generation_samples(13)))
        write_shard(tmp_path / "real-1.tar", damage(generation_samples(12, 13)))
        write_shard(tmp_path / "stored.tar", stored_samples(9))
        write_shard(tmp_path / "und.tar", damage(understanding_samples(17)))
        write_shard(tmp_path / "text.tar", text_samples(21))
        cfg.data.root = str(tmp_path)
        cfg.data.sources = {
            "real": SourceConfig(kind=SourceKind.generation, shards="real-{0..1}.tar"),
            "stored": SourceConfig(kind=SourceKind.generation, shards="stored.tar"),
            "und": SourceConfig(kind=SourceKind.understanding, shards="und.tar"),
            "text": SourceConfig(kind=SourceKind.text, shards="text.tar"),
        }
        cfg.stage.mixture = MixtureConfig(understanding=2, text=3, generation=5)
        cfg.stage.batch_unit = type(cfg.stage.batch_unit).packed
        cfg.stage.batch_size = 8
        cfg.data.pad_dropout, cfg.data.first_sentence = 0.2, 0.4
        return cfg

    return make


@pytest.fixture(scope="session")
def noise() -> bytes:
    """What is in a shard where only the bytes matter."""
    return bytes(np.random.default_rng(0).integers(0, 256, 300_000, np.uint8))


@pytest.fixture
def waits() -> list[float]:
    """Seconds that `reader` would have waited between its tries."""
    return []


@pytest.fixture
def reader(waits: list[float]) -> Iterator[ShardReader]:
    """Of four tries, without waiting."""
    made = ShardReader(retries=4, sleep=waits.append)
    yield made
    made.close()
