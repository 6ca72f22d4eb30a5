"""Everything about a run that can be known without running it: `jp-train check`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jp_train.config import RunConfig, batch_plan
from jp_train.errors import JpTrainError
from jp_train.types import KINDS, Kind


def check(config: RunConfig, hostfile: Path | None = None, *, config_only: bool = False) -> dict[str, Any]:
    """The resolved plan of the stage as one JSON-able object.

    `problems` lists, in words, what would stop the run; everything else is information. `config_only` leaves tokenizer,
    weights and shards alone.
    """
    plan: dict[str, Any] = {"problems": [], "run_dir": config.run_dir, "stage": config.stage.name}
    stage = config.stage
    steps = stage.early_stop.at_step or stage.training_steps
    plan["steps"] = {"training_steps": stage.training_steps, "stops_at": steps}
    plan["optimizer"] = {
        "lr": config.optimizer.lr,
        "schedule": config.optimizer.schedule.value,
        "warmup_steps": config.optimizer.warmup_steps,
        "weight_decay": config.optimizer.weight_decay,
        "clip": config.optimizer.clip,
    }
    plan["mixture"] = {
        "unit": stage.ratio_unit.value,
        "shares": {str(kind): getattr(stage.mixture, str(kind)) for kind in KINDS},
    }
    _attempt(plan, "batch", lambda: _batch(config, hostfile))
    _attempt(plan, "parameters", lambda: _parameters(config))
    if not config.data.sources:
        plan["problems"].append("data.sources is empty: name a recipe (`recipe: data_recipes/...`) or sources")
    if not config_only:
        _attempt(plan, "tokenizer", lambda: _tokenizer(config))
        _attempt(plan, "weights", lambda: _weights(config))
        if "tokenizer" in plan:
            _attempt(plan, "sources", lambda: _sources(config, steps))
    return plan


def _attempt(plan: dict[str, Any], name: str, action: Callable[[], Any]) -> None:
    """Put the result of `action` under `name`, or its error among the problems."""
    try:
        plan[name] = action()
    except JpTrainError as error:
        plan["problems"].append(str(error))


def _batch(config: RunConfig, hostfile: Path | None) -> dict[str, Any]:
    ranks = 1
    if hostfile:
        from jp_train.cluster.hostfile import parse_hostfile

        ranks = sum(host.slots for host in parse_hostfile(hostfile))
    plan = batch_plan(config, ranks)
    return {
        "ranks": ranks,
        "rows_per_step": plan.rows_per_step,
        "micro_batch_rows": plan.micro_batch_rows,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "text": plan.describe(),
    }


def _parameters(config: RunConfig) -> dict[str, Any]:
    from jp_train.model.parameters import parameter_counts

    counts = parameter_counts(config.model)
    trainable = sum(counts[name] for name in config.stage.trainable)
    return {
        "modules": counts,
        "total": sum(counts.values()),
        "trainable": trainable,
        "trainable_modules": list(config.stage.trainable),
    }


def _tokenizer(config: RunConfig) -> dict[str, Any]:
    from jp_train.data.tokenizer import load_tokenizer
    from jp_train.errors import ConfigError

    tokenizer = load_tokenizer(config.tokenizer)
    if tokenizer.vocab_size > config.model.language.vocab_size:
        raise ConfigError(
            f"the tokenizer {config.tokenizer.path} has {tokenizer.vocab_size} entries but model.language.vocab_size "
            f"is {config.model.language.vocab_size}; the embedding needs a row for each"
        )
    return {"path": config.tokenizer.path, "entries": tokenizer.vocab_size}


def _weights(config: RunConfig) -> dict[str, Any]:
    """Names and shapes of the starting weights against the model, from file headers alone."""
    from jp_train.model.parameters import parameter_shapes, vq_shapes
    from jp_train.model.weight_files import check_keys, open_part, open_weights

    if config.model.init_from:
        source = open_weights(config.model.init_from)
        expected = parameter_shapes(config.model) | vq_shapes(config.model)
        check_keys(expected, source)
        return {"init_from": config.model.init_from, "tensors": len(expected)}
    parts = {name: path for name, path in vars(config.model.init_parts).items() if path}
    return {
        "init_parts": {
            name: {"path": path, "tensors": len(open_part(path, name).keys())} for name, path in parts.items()
        }
    }


def _sources(config: RunConfig, steps: int) -> list[dict[str, Any]]:
    """One entry a source: shards, samples, tokens, and epochs over the stage from the mean document length of every
    kind."""
    from jp_train.config.batch import rows_per_step
    from jp_train.config.choices import BatchUnit, RatioUnit
    from jp_train.data.index import index_sources
    from jp_train.data.tokenizer import load_tokenizer
    from jp_train.data.vq_use import ids_summary
    from jp_train.tools.index import IndexProgressLine

    indexes = index_sources(config, load_tokenizer(config.tokenizer), progress=IndexProgressLine(sys.stderr))
    mean = {index.name: float(index.tokens.mean()) for index in indexes}
    share: dict[str, float] = {}
    mixture = config.stage.mixture
    kinds = sum((mixture.understanding, mixture.text, mixture.generation))
    for index in indexes:
        source = config.data.sources[index.name]
        active = (min(source.to_step or steps, steps) - min(source.from_step, steps)) / steps
        peers = sum(other.weight for other in config.data.sources.values() if other.kind is source.kind)
        share[index.name] = getattr(mixture, str(index.kind)) / kinds * source.weight / peers * active if peers else 0.0
    if config.stage.ratio_unit is RatioUnit.tokens:
        share = {name: value / mean[name] for name, value in share.items()}
    if config.stage.batch_unit is BatchUnit.samples:
        documents = float(steps * config.stage.batch_size)
    else:
        per_document = sum(share[name] * mean[name] for name in share) / sum(share.values())
        documents = steps * rows_per_step(config) * config.data.seq_len / per_document
    total = sum(share.values())
    return [
        {
            "name": index.name,
            "kind": str(index.kind),
            "shards": len(index.shards),
            "samples": len(index),
            "bad": len(index.bad),
            "mean_tokens": mean[index.name],
            "tokens": int(index.tokens.sum()),
            "epochs": documents * share[index.name] / total / len(index),
            "vq_ids": ids_summary(index) if index.kind is Kind.GENERATION else {},
        }
        for index in indexes
    ]


def format_check(plan: dict[str, Any]) -> str:
    """The same for people: problems first."""
    lines = [f"PROBLEM: {problem}" for problem in plan["problems"]] or ["no problem found"]
    steps = plan["steps"]
    early = f", stopped early at {steps['stops_at']:,}" if steps["stops_at"] != steps["training_steps"] else ""
    lines += ["", f"{plan['stage']} -> {plan['run_dir']}", f"  steps       {steps['training_steps']:,}{early}"]
    if "batch" in plan:
        lines.append(f"  batch       {plan['batch']['text']}")
    optimizer = plan["optimizer"]
    lines.append(
        f"  optimizer   lr {optimizer['lr']:g} {optimizer['schedule']}, warm-up {optimizer['warmup_steps']:,}, decay "
        f"{optimizer['weight_decay']:g}"
    )
    shares = plan["mixture"]["shares"]
    lines.append(
        f"  mixture     {' : '.join(f'{value:g}' for value in shares.values())} ({' : '.join(shares)}, in "
        f"{plan['mixture']['unit']})"
    )
    if "parameters" in plan:
        counts = plan["parameters"]
        lines.append(f"  parameters  {counts['total']:,}, of which {counts['trainable']:,} learn:")
        for name, number in counts["modules"].items():
            lines.append(
                f"    {name:<18}{number:>16,}  {'learns' if name in counts['trainable_modules'] else 'frozen'}"
            )
    if "tokenizer" in plan:
        lines.append(f"  tokenizer   {plan['tokenizer']['path']}, {plan['tokenizer']['entries']:,} entries")
    if "weights" in plan:
        lines.append(f"  weights     {_weights_text(plan['weights'])}")
    if "sources" in plan:
        lines += [
            "",
            f"  {'source':<22}{'kind':<15}{'shards':>8}{'samples':>12}{'bad':>6}{'tokens each':>13}{'epochs':>9}",
        ]
        for row in plan["sources"]:
            lines.append(
                "  "
                f"{row['name']:<22}{row['kind']:<15}{row['shards']:>8,}{row['samples']:>12,}{row['bad']:>6,}{row['mean_tokens']:>13,.1f}{row['epochs']:>9.2f}"
            )
        lines += _ids_lines(plan["sources"])
    return "\n".join(lines)


def _ids_lines(sources: list[dict[str, Any]]) -> list[str]:
    """Which generation sources have stored VQ ids. Training compares the fingerprint with that of its VQ; this does
    not read the VQ."""
    lines = [
        f"  VQ ids of {row['name']}: fingerprint {fingerprint} for {shards:,} of {row['shards']:,} shards"
        for row in sources
        for fingerprint, shards in row["vq_ids"].items()
    ]
    without = [row["name"] for row in sources if row["kind"] == str(Kind.GENERATION) and not row["vq_ids"]]
    if without:
        lines.append(
            f"  no VQ ids stored for {', '.join(without)}: images are encoded in training (jp-train data "
            "encode-images does it once)"
        )
    return lines


def _weights_text(weights: dict[str, Any]) -> str:
    if "init_from" in weights:
        return f"{weights['init_from']}: all {weights['tensors']} tensors fit"
    if weights["init_parts"]:
        return (
            ", ".join(f"{name} from {part['path']}" for name, part in weights["init_parts"].items())
            + "; the rest fresh"
        )
    return "all fresh (random)"
