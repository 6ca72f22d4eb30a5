"""The parts of the plan that `jp-train check` prints: each a function of the run that is looked at.

torch, transformers and the data are imported where they are needed: an error in the configuration is answered without.
"""

from __future__ import annotations

from typing import Any

from jp_train.config import batch_plan
from jp_train.config.deepspeed import deepspeed_config
from jp_train.errors import ConfigError, named
from jp_train.tools.check.subject import Subject
from jp_train.types import KINDS


def steps(subject: Subject) -> dict[str, int]:
    """Steps of the stage, and where it stops."""
    return {"training_steps": subject.config.stage.training_steps, "stops_at": subject.steps}


def optimizer(subject: Subject) -> dict[str, Any]:
    """Learning rate and what belongs to it."""
    settings = subject.config.optimizer
    return {
        "lr": settings.lr,
        "schedule": settings.schedule.value,
        "warmup_steps": settings.warmup_steps,
        "weight_decay": settings.weight_decay,
        "clip": settings.clip,
    }


def mixture(subject: Subject) -> dict[str, Any]:
    """The shares of the kinds and what they count."""
    stage = subject.config.stage
    return {"unit": stage.ratio_unit.value, "shares": {str(kind): getattr(stage.mixture, str(kind)) for kind in KINDS}}


def named_sources(subject: Subject) -> None:
    """Raises ConfigError without any."""
    if not subject.config.data.sources:
        raise ConfigError("data.sources is empty: name a recipe (`recipe: data_recipes/...`) or sources")


def batch(subject: Subject) -> dict[str, Any]:
    """The batch arithmetic for the ranks of the hostfile. Raises ConfigError for ranks that do not divide the rows,
    LaunchError (hostfile)."""
    plan = subject.batch
    return {
        "ranks": subject.ranks,
        "rows_per_step": plan.rows_per_step,
        "micro_batch_rows": plan.micro_batch_rows,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "text": plan.describe(),
    }


def parameters(subject: Subject) -> dict[str, Any]:
    """What the model has and what of it learns. Raises ConfigError for sizes that do not fit each other."""
    from jp_train.model.parameters import parameter_counts

    config = subject.config
    counts = parameter_counts(config.model)
    trainable = sum(counts[name] for name in config.stage.trainable)
    return {
        "modules": counts,
        "total": sum(counts.values()),
        "trainable": trainable,
        "trainable_modules": list(config.stage.trainable),
    }


def deepspeed(subject: Subject) -> None:
    """Raises ConfigError for a value among the raw DeepSpeed keys that DeepSpeed rejects. Without raw keys there is
    nothing to ask it, and it is not imported."""
    if subject.config.engine.deepspeed:
        from jp_train.engine.config import check_values

        check_values(deepspeed_config(subject.config, batch_plan(subject.config, 1)))  # it knows no other ranks here


def tokenizer_files(subject: Subject) -> None:
    """Raises ConfigError where there is no tokenizer; none is loaded."""
    from jp_train.data.tokenizer import tokenizer_place

    tokenizer_place(subject.config.tokenizer)


def weight_files(subject: Subject) -> None:
    """A CheckpointError for every path of starting weights without such files; none is opened."""
    from jp_train.model.weight_places import files_of, whole_model

    model = subject.config.model
    given = {"model.init_from": model.init_from}
    given |= {f"model.init_parts.{name}": path for name, path in vars(model.init_parts).items()}
    for key, path in given.items():
        if path:
            with subject.collecting(), named(key):
                files_of(whole_model(path) if key == "model.init_from" else path)


def tokenizer(subject: Subject) -> dict[str, Any]:
    """Path and size of the vocabulary. Raises ConfigError for one that is missing, or larger than the model's."""
    config, tokenizer = subject.config, subject.tokenizer
    if tokenizer.vocab_size > config.model.language.vocab_size:
        raise ConfigError(
            f"the tokenizer {config.tokenizer.path} has {tokenizer.vocab_size} entries but model.language.vocab_size "
            f"is {config.model.language.vocab_size}; the embedding needs a row for each"
        )
    return {"path": config.tokenizer.path, "entries": tokenizer.vocab_size}


def weights(subject: Subject) -> dict[str, Any]:
    """The starting weights, compared with the model as training does: names, shapes and config.json. Raises
    ConfigError, CheckpointError."""
    from jp_train.model.start_weights import open_start, without_weights

    model, trainable = subject.config.model, subject.config.stage.trainable
    start = open_start(model, trainable)
    if random := without_weights(model, trainable):
        subject.warnings.append(f"{', '.join(random)}: frozen and random for the whole run (model.init=random)")
    remark = {"remark": start.remark()}
    if start.whole is not None:
        return {"init_from": model.init_from, "tensors": len(start.whole.keys()), **remark}
    parts = vars(model.init_parts)
    return {
        "init_parts": {
            name: {"path": parts[name], "tensors": len(source.keys())} for name, source in start.parts.items()
        },
        **remark,
    }
