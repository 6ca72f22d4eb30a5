"""A training run of a few thousand parameters on a few dozen documents: shards, tokenizer and configuration.

Used by the tests and by the worker processes they start (which have no pytest); everything is a function of numbers, so
two processes that call it agree.
"""

from __future__ import annotations

import io
import pydoc_data.topics
from pathlib import Path

from jp_train.config import RunConfig, validate
from jp_train.config.choices import Init
from jp_train.config.schema import (
    BatchUnit,
    LanguageConfig,
    MixtureConfig,
    Precision,
    SourceConfig,
    SourceKind,
    Template,
    TokenizerConfig,
    VisionConfig,
    VQConfig,
    WandbMode,
)
from tests.data.data_samples import (
    IMAGE_SIZE,
    PATCH,
    generation_samples,
    several_samples,
    text_samples,
    understanding_samples,
    write_shard,
)

STAGE1 = ["aligner", "gen_embed", "gen_aligner", "gen_head"]
STAGE2 = ["aligner", "language_model", "gen_embed", "gen_aligner", "gen_head"]
STAGE3 = ["vision_model", *STAGE2]
TRAINABLE = {1: STAGE1, 2: STAGE2, 3: STAGE3}


def write_tokenizer(path: Path) -> None:
    """A SentencePiece model of 500 pieces with all special tokens."""
    import sentencepiece

    cfg = TokenizerConfig()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("".join(sorted(pydoc_data.topics.topics.values(), key=len)[:40]).split("\n")),
        model_writer=model,
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
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
    path.write_bytes(model.getvalue())


def write_data(folder: Path) -> Path:
    """Shards of the three kinds, a held-out shard each, and the tokenizer; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_shard(folder / "gen.tar", generation_samples(25))
    broken = [
        (key, {**fields, "png": fields["png"][:60]} if n in (3, 8) else fields)
        for n, (key, fields) in enumerate(generation_samples(12))
    ]
    write_shard(folder / "gen-broken.tar", broken)
    write_shard(folder / "und.tar", understanding_samples(17))
    write_shard(folder / "several.tar", several_samples(20))
    write_shard(folder / "text.tar", text_samples(21))
    write_shard(folder / "held-gen.tar", generation_samples(3, first=100))
    write_shard(folder / "held-und.tar", understanding_samples(3))
    write_tokenizer(folder / "tiny.model")
    return folder


def tiny_run(
    data: Path, run_dir: Path, *, stage: int = 2, steps: int = 6, rows: int = 4, init_from: Path | None = None
) -> RunConfig:
    """A valid configuration: fp32, persistence threshold 0 (a tiny model would hide gather mistakes otherwise), no
    workers, no wandb."""
    cfg = RunConfig(
        run_dir=str(run_dir), seed=7, precision=Precision.fp32, tokenizer=TokenizerConfig(path=str(data / "tiny.model"))
    )
    cfg.model.vision = VisionConfig(
        hidden_size=24, layers=2, heads=2, mlp_ratio=2.0, image_size=IMAGE_SIZE, patch_size=PATCH
    )
    cfg.model.vq = VQConfig(
        codebook_size=64,
        embed_dim=8,
        base_channels=32,
        channel_multiplier=[1, 1, 1, 1],
        res_blocks=1,
        latent_channels=32,
    )
    cfg.model.language = LanguageConfig(
        hidden_size=32, intermediate_size=48, layers=2, heads=2, vocab_size=512, max_position_embeddings=512
    )
    cfg.model.init_from = None if init_from is None else str(init_from)
    cfg.model.init = Init.random
    cfg.stage.name = f"stage{stage}"
    cfg.stage.trainable = list(TRAINABLE[stage])
    cfg.stage.training_steps = steps
    cfg.stage.batch_unit = BatchUnit.packed
    cfg.stage.batch_size = rows
    cfg.stage.template = Template(f"stage{stage}")
    cfg.stage.mixture = MixtureConfig(understanding=2, text=3 if stage > 1 else 0, generation=5)
    cfg.data.root = str(data)
    cfg.data.sources = {
        "gen": SourceConfig(kind=SourceKind.generation, shards="gen.tar"),
        "und": SourceConfig(kind=SourceKind.understanding, shards="und.tar"),
        "text": SourceConfig(kind=SourceKind.text, shards="text.tar"),
    }
    cfg.data.seq_len = 192
    cfg.data.workers = 0
    cfg.data.system_prompt = "Be helpful."
    cfg.optimizer.lr = 3e-3
    cfg.optimizer.weight_decay = 0.1
    cfg.engine.persistence_threshold = 0
    # a loaded machine may take its time; a lost rank closes its connections at once
    cfg.engine.collective_timeout_s = 240.0
    cfg.loss.chunk_tokens = 64
    cfg.checkpoint.every_steps = 1000
    cfg.logging.wandb.mode = WandbMode.disabled
    cfg.logging.every_steps = 1
    validate(cfg)
    return cfg
