"""The weights that a stage starts from: opened and compared with the configuration, from headers and config.json alone.
`jp-train check` and training ask the same function."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from jp_train.config.choices import GenEmbedInit, Init
from jp_train.config.schema import ModelConfig
from jp_train.errors import CheckpointError, ConfigError, named
from jp_train.model.freeze import VQ_MODULE, VQ_PREFIX, module_of
from jp_train.model.parameters import parameter_shapes, vq_shapes
from jp_train.model.weight_files import WeightSource, check_keys, open_part, open_weights

if TYPE_CHECKING:  # transformers: weights that are absent need not wait for it
    from jp_train.model.stored_config import StoredModel

SECTIONS = {"language_model": "language", "vision_model": "vision", VQ_MODULE: "vq"}
"""{key of `model.init_parts`: section of `ModelConfig` that describes it}."""

HEAD, EMBEDDINGS = "lm_head.weight", "model.language_model.embed_tokens.weight"


@dataclass(frozen=True, kw_only=True)
class StartWeights:
    """`whole`: of `model.init_from`; `parts`: of `model.init_parts`; `without_config`: language models
    and vision towers that have no config.json beside them, so that only names and shapes are known to fit."""

    whole: WeightSource | None = None
    parts: dict[str, WeightSource] = field(default_factory=dict)
    without_config: tuple[str, ...] = ()

    def remark(self) -> str:
        """What ends a line about these weights: that there is less to compare them by; mostly empty."""
        places = ", ".join(self.without_config)
        return f" (no config.json beside {places}: heads, rope and eps were not compared)" if places else ""


def open_start(cfg: ModelConfig, trainable: Collection[str]) -> StartWeights:
    """The weights that `cfg` names, each compared by names, shapes and what its config.json says.

    Raises:
        ConfigError: for `init_from` and `init_parts` together, and where what is not in `trainable` has no weights
            although `model.init` is not `random`.
        CheckpointError: from the files, or for the first that does not fit, with every difference of it.
    """
    given = {name: path for name in SECTIONS if (path := getattr(cfg.init_parts, name))}
    if cfg.init_from and given:
        raise ConfigError(
            f"model.init_from={cfg.init_from} already names every weight: remove model.init_parts.{next(iter(given))}"
        )
    refuse_random(cfg, without_weights(cfg, trainable))
    if cfg.init_from:
        with named("model.init_from"):
            whole = open_weights(cfg.init_from)
            from jp_train.model.stored_config import PARTS, stored_model

            stored = stored_model(whole.path)
            whole = _compared(whole, stored, cfg, PARTS)
            check_keys(parameter_shapes(cfg) | vq_shapes(cfg), whole)
        return StartWeights(whole=whole, without_config=() if stored else (str(whole.path),))
    parts, without_config = {}, []
    for name, path in given.items():
        with named(f"model.init_parts.{name}"):
            opened = open_part(path, name)
            from jp_train.model.stored_config import stored_part

            stored = stored_part(Path(path), SECTIONS[name])
            parts[name] = _part(cfg, name, opened, stored)
        without_config += [] if stored or name == VQ_MODULE else [path]  # a VQ's shapes show everything
    return StartWeights(parts=parts, without_config=tuple(without_config))


def open_vq(cfg: ModelConfig) -> WeightSource | None:
    """The VQ tokenizer's weights alone, compared in the same way; None where it is to be random.

    Raises:
        ConfigError: where nothing names its weights although `model.init` is not `random`.
        CheckpointError: from the files, or when they do not fit.
    """
    from jp_train.model.stored_config import stored_model, stored_part

    if cfg.init_from:
        with named("model.init_from"):
            source = open_weights(cfg.init_from)
            return _part(cfg, VQ_MODULE, source.select([VQ_PREFIX]), stored_model(source.path))
    if path := cfg.init_parts.gen_vision_model:
        with named(f"model.init_parts.{VQ_MODULE}"):
            return _part(cfg, VQ_MODULE, open_part(path, VQ_MODULE), stored_part(Path(path), SECTIONS[VQ_MODULE]))
    refuse_random(cfg, [VQ_MODULE])
    return None


def without_weights(cfg: ModelConfig, trainable: Collection[str]) -> list[str]:
    """The modules that nothing gives weights and that never train: they would stay random."""
    if cfg.init_from:
        return []
    modules = [name for name in SECTIONS if not getattr(cfg.init_parts, name)]
    modules += ["aligner", "gen_aligner", "gen_head"]
    modules += ["gen_embed"] if cfg.gen_embed_init is GenEmbedInit.random else []
    return [name for name in modules if name not in trainable]


def refuse_random(cfg: ModelConfig, modules: Collection[str]) -> None:
    """Raise ConfigError for modules that would stay random, unless `model.init` is `random`."""
    if not modules or cfg.init is Init.random:
        return
    keys = [f"model.init_parts.{name}" for name in modules if name in SECTIONS]
    train = [name for name in modules if name not in SECTIONS]
    ways = [
        "model.init_from for all weights",
        *([f"{', '.join(keys)} for single parts"] if keys else []),
        *([f"stage.trainable with {', '.join(train)}"] if train else []),
    ]
    raise ConfigError(
        f"{', '.join(modules)}: frozen and without weights, so random for the whole run. Set {', or '.join(ways)}; "
        "model.init=random trains like this on purpose"
    )


def _part(cfg: ModelConfig, name: str, source: WeightSource, stored: StoredModel | None) -> WeightSource:
    source = _compared(source, stored, cfg, [SECTIONS[name]])
    shapes = vq_shapes(cfg) if name == VQ_MODULE else parameter_shapes(cfg)
    check_keys({key: shape for key, shape in shapes.items() if module_of(key) == name}, source)
    return source


def _compared(
    source: WeightSource, stored: StoredModel | None, cfg: ModelConfig, sections: Collection[str]
) -> WeightSource:
    """The source, with a text head where its embeddings are tied to it; raises CheckpointError with every difference
    that its config.json names."""
    problems = stored.problems(cfg, sections) if stored else []
    names = set(source.keys())
    if "language" in sections and EMBEDDINGS in names and (stored is None or stored.tied):
        if HEAD not in names:
            source = source.with_alias(HEAD, EMBEDDINGS)
        elif stored and not source.equal(HEAD, EMBEDDINGS):
            problems.append(
                f"tie_word_embeddings is true, but {HEAD} is stored and differs from the embeddings: set it to false "
                "in that file if the stored head is the right one, or take the head out of the weights"
            )
    if problems and stored:
        raise CheckpointError(
            f"{source.path} is another model than this configuration describes ({stored.file}): {'; '.join(problems)}. "
            "Set the keys in brackets, or name other weights"
        )
    return source
