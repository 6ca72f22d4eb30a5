"""Checks across fields, beyond what types can express. Every message names the keys, the values found and what to
change."""

from __future__ import annotations

import math
import re

from jp_train.config.batch import rows_per_step
from jp_train.config.choices import Crop, Template, VqIds
from jp_train.config.deepspeed import check_raw_keys
from jp_train.config.fields import parse_fields, parse_filter
from jp_train.config.schema import A100_TFLOPS, MODULES, ModelConfig, RunConfig, SourceConfig
from jp_train.errors import ConfigError, one_of

NORM_GROUPS = 32
"""Groups of the VQ tokenizer's group norms."""


def validate(config: RunConfig) -> None:
    """Raise ConfigError for the first impossible combination."""
    _positive(config)
    _fractions(config)
    _guard(config)
    _model(config)
    _stage(config)
    _sources(config)
    _checkpoint(config)
    rows_per_step(config)
    check_raw_keys(config.engine.deepspeed)


def _positive(config: RunConfig) -> None:
    numbers = {
        "stage.training_steps": config.stage.training_steps,
        "stage.batch_size": config.stage.batch_size,
        "stage.samples_per_row": config.stage.samples_per_row,
        "data.seq_len": config.data.seq_len,
        "data.pool_size": config.data.pool_size,
        "data.image_threads": config.data.image_threads,
        "data.prefetch_rows": config.data.prefetch_rows,
        "data.snapshot_steps": config.data.snapshot_steps,
        "data.max_image_pixels": config.data.max_image_pixels,
        "optimizer.lr": config.optimizer.lr,
        "optimizer.clip": config.optimizer.clip,
        "optimizer.eps": config.optimizer.eps,
        "loss.chunk_tokens": config.loss.chunk_tokens,
        "engine.micro_batch_rows": config.engine.micro_batch_rows,
        "engine.recompute_every": config.engine.recompute_every,
        "engine.hpz_partition_size": config.engine.hpz_partition_size,
        "engine.collective_timeout_s": config.engine.collective_timeout_s,
        "engine.grace_s": config.engine.grace_s,
        "guard.outlier_factor": config.guard.outlier_factor,
        "guard.max_consecutive_skips": config.guard.max_consecutive_skips,
        "guard.skip_window": config.guard.skip_window,
        "checkpoint.every_steps": config.checkpoint.every_steps,
        "checkpoint.keep_last": config.checkpoint.keep_last,
        "checkpoint.max_failed_saves": config.checkpoint.max_failed_saves,
        "validation.documents": config.validation.documents,
        "logging.every_steps": config.logging.every_steps,
        "logging.peak_tflops": A100_TFLOPS if config.logging.peak_tflops is None else config.logging.peak_tflops,
    }
    for key, value in numbers.items():
        if not value > 0 or math.isinf(value):
            raise ConfigError(f"{key} must be a positive number, found {value}")
    at_least_zero = {
        "data.workers": config.data.workers,
        "data.io_retries": config.data.io_retries,
        "engine.stall_timeout_s": config.engine.stall_timeout_s,
        "guard.max_dumps": config.guard.max_dumps,
        "data.skip_minimum": config.data.skip_minimum,
        "optimizer.weight_decay": config.optimizer.weight_decay,
        "optimizer.warmup_steps": config.optimizer.warmup_steps,
        "checkpoint.keep_every": config.checkpoint.keep_every,
        "validation.every_steps": config.validation.every_steps,
        "loss.text_weight": config.loss.text_weight,
        "loss.image_weight": config.loss.image_weight,
    }
    for key, value in at_least_zero.items():
        if value < 0:
            raise ConfigError(f"{key} must not be negative, found {value}")


def _fractions(config: RunConfig) -> None:
    for key in ("pad_dropout", "first_sentence", "max_bad_share", "skip_budget"):
        value = getattr(config.data, key)
        if not 0 <= value <= 1:
            raise ConfigError(f"data.{key} is a probability or share between 0 and 1, found {value}")
    for key in ("beta1", "beta2"):
        value = getattr(config.optimizer, key)
        if not 0 <= value < 1:
            raise ConfigError(f"optimizer.{key} must lie in [0, 1), found {value}")
    if not 0 <= config.optimizer.warmup_from <= 1:
        raise ConfigError(f"optimizer.warmup_from is a factor between 0 and 1, found {config.optimizer.warmup_from}")


def _guard(config: RunConfig) -> None:
    if config.guard.outlier_window < 8:
        raise ConfigError(
            f"guard.outlier_window {config.guard.outlier_window} is too short to say what is normal; use at least 8 "
            "steps"
        )
    if not 0 <= config.guard.max_skip_share <= 1:
        raise ConfigError(f"guard.max_skip_share is a share between 0 and 1, found {config.guard.max_skip_share}")


def _model(config: RunConfig) -> None:
    model = config.model
    check_sizes(model)
    slots = (model.vision.image_size // model.vision.patch_size) ** 2
    if config.data.seq_len < slots + 4:
        raise ConfigError(
            f"data.seq_len {config.data.seq_len} cannot hold one image: {slots} slots and at least 4 tokens around "
            f"them; use at least {slots + 4}"
        )
    if config.data.seq_len > model.language.max_position_embeddings:
        raise ConfigError(
            f"data.seq_len {config.data.seq_len} exceeds model.language.max_position_embeddings "
            f"{model.language.max_position_embeddings}"
        )


def check_sizes(cfg: ModelConfig) -> None:
    """Raise ConfigError where the sizes of a model do not fit each other."""
    vision, vq, language = cfg.vision, cfg.vq, cfg.language
    stride = 2 ** (len(vq.channel_multiplier) - 1)
    patches, codes = vision.image_size / vision.patch_size, vision.image_size / stride
    if patches != codes or patches % 1:
        raise ConfigError(
            f"model.vision.image_size={vision.image_size} with model.vision.patch_size={vision.patch_size} and a VQ "
            f"stride of {stride} gives {patches:g} and {codes:g} tokens a side: they must be the same whole number"
        )
    for key, width, heads in (
        ("vision", vision.hidden_size, vision.heads),
        ("language", language.hidden_size, language.heads),
    ):
        if width % heads:
            raise ConfigError(f"model.{key}.hidden_size={width} is not divisible by model.{key}.heads={heads}")
    if any(vq.base_channels * factor % NORM_GROUPS for factor in vq.channel_multiplier):
        raise ConfigError(
            f"model.vq.base_channels={vq.base_channels} times each of channel_multiplier={list(vq.channel_multiplier)} "
            f"must be divisible by {NORM_GROUPS}, the number of groups of its norms"
        )


def _stage(config: RunConfig) -> None:
    stage = config.stage
    if not stage.trainable:
        raise ConfigError(f"stage.trainable is empty: nothing would learn; name some of {', '.join(MODULES)}")
    for name in stage.trainable:
        if name not in MODULES:
            raise ConfigError(f"stage.trainable: unknown module {name!r}{one_of(name, MODULES, cutoff=0.4)}")
    at_step = stage.early_stop.at_step
    if at_step is not None and not 0 < at_step <= stage.training_steps:
        raise ConfigError(
            f"stage.early_stop.at_step {at_step} must lie between 1 and stage.training_steps {stage.training_steps}; "
            "stage.early_stop.at_step=null trains all of them"
        )
    if stage.early_stop.patience is not None and (stage.early_stop.patience < 1 or not config.validation.every_steps):
        raise ConfigError(
            f"stage.early_stop.patience {stage.early_stop.patience} needs a value of at least 1 and "
            f"validation.every_steps > 0 (found {config.validation.every_steps})"
        )
    shares = (stage.mixture.understanding, stage.mixture.text, stage.mixture.generation)
    if min(shares) < 0 or sum(shares) <= 0 or not all(map(math.isfinite, shares)):
        raise ConfigError(
            f"stage.mixture needs shares >= 0 with a positive sum, found {':'.join(f'{share:g}' for share in shares)}"
        )


def _checkpoint(config: RunConfig) -> None:
    every, validated = config.checkpoint.every_steps, config.validation.every_steps
    if config.checkpoint.keep_best and (not config.validation.sources or not validated or every % validated):
        raise ConfigError(
            f"checkpoint.keep_best needs a held-out loss for every checkpoint: set validation.sources, and "
            f"checkpoint.every_steps ({every}) to a multiple of validation.every_steps ({validated})"
        )


def _sources(config: RunConfig) -> None:
    if "://" in config.data.index_dir:
        raise ConfigError(
            f"data.index_dir {config.data.index_dir!r} is no folder: the index is read by many small reads, so it lies "
            "on a disk of this host or one that the hosts share"
        )
    if config.data.vq_ids is VqIds.require and config.data.crop is not Crop.centre:
        raise ConfigError(
            f"data.vq_ids=require cannot be met with data.crop={config.data.crop.value}: stored ids are of the centre "
            "crop; use data.crop=centre or data.vq_ids=auto"
        )
    known = {"training": config.data.sources, "validation": config.validation.sources}
    for where, sources in known.items():
        for name, source in sources.items():
            _source(f"{'data' if where == 'training' else 'validation'}.sources.{name}", source, config.allow_code)
    for kind in ("understanding", "text", "generation"):
        share = getattr(config.stage.mixture, kind)
        mine = [source for source in config.data.sources.values() if source.kind.value == kind and source.weight > 0]
        if config.data.sources and share > 0 and not mine:
            raise ConfigError(
                f"stage.mixture.{kind} is {share:g} but no source in data.sources has kind {kind}; add one, or set the "
                "share to 0"
            )
    if (
        config.stage.template is Template.stage1
        and config.stage.mixture.text > 0
        and "language_model" not in config.stage.trainable
    ):
        raise ConfigError(
            "stage.mixture.text is above 0 while language_model is frozen: pure text would train nothing; set the "
            "share to 0"
        )


def _source(key: str, source: SourceConfig, allow_code: bool) -> None:
    if source.map and not re.fullmatch(r"[\w.]+:\w+", source.map):
        raise ConfigError(f"{key}.map {source.map!r} names no function; write `module:function`")
    if source.map and not allow_code:
        raise ConfigError(
            f"{key}.map runs code of the module {source.map.partition(':')[0]} on every host: set allow_code: true in "
            "your configuration if you trust it"
        )
    if not source.shards:
        raise ConfigError(f"{key}.shards is empty: give a path, folder, glob or brace expansion of tar shards")
    if source.weight < 0 or not math.isfinite(source.weight):
        raise ConfigError(f"{key}.weight must not be negative, found {source.weight}")
    if source.from_step < 0 or (source.to_step is not None and source.to_step <= source.from_step):
        raise ConfigError(
            f"{key}: steps from {source.from_step} to {source.to_step} are empty; to_step must exceed from_step"
        )
    try:
        parse_fields(source.kind.value, source.fields)
        for text in source.filter:
            parse_filter(text)
    except ConfigError as error:
        raise ConfigError(f"{key}.{error}") from None
    if source.class_template.count("{}") != 1:
        raise ConfigError(f"{key}.class_template needs exactly one {{}}, found {source.class_template!r}")
