"""What may not change between a checkpoint and the run that resumes it, and what the checkpoint was made with."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

from jp_train.config import RunConfig
from jp_train.config.choices import Schedule
from jp_train.data.sample_map import find_sample_map
from jp_train.errors import CheckpointError

FREE_KEYS = (
    "preset",
    "recipe",
    "allow_code",
    "run_dir",
    "logging",
    "checkpoint",
    "validation",
    "stage.early_stop",
    "loss.chunk_tokens",
    "engine.micro_batch_rows",
    "engine.activation_checkpointing",
    "engine.recompute_every",
    "engine.deterministic",
    "engine.persistence_threshold",
    "engine.hpz_partition_size",
    "engine.collective_timeout_s",
    "engine.stall_timeout_s",
    "engine.grace_s",
    "engine.deepspeed_config",  # its keys are under engine.deepspeed
    # what is judged and skipped decides what is trained; how much of it is reported, and when to give up, does not
    "guard.max_consecutive_skips",
    "guard.skip_window",
    "guard.max_skip_share",
    "guard.max_dumps",
    "guard.dump_tensors",
    "data.workers",
    "data.image_threads",
    "data.prefetch_rows",
    "data.io_retries",
    "data.max_bad_share",
    "data.skip_budget",
    "data.skip_minimum",
    "data.skip_consecutive",
    "data.snapshot_steps",
    "data.vq_ids",  # ids are the same stored and encoded on the fly
    "data.token_ids",
    # places may move; what lies there is checked by its contents (plan, tokenizer and frozen-weight checksums)
    "data.root",
    "data.index_dir",
    "tokenizer.path",
    "model.init_from",
    "model.init_parts",
    "model.init",
)
"""Keys that a resumed run may change. `stage.training_steps` joins them unless the schedule's shape depends on it."""

FIXED_KEYS = ("model", "stage.trainable")
"""Keys that decide which tensors there are."""

SHOWN = 12
"""Differences listed in a message."""

PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "omegaconf", "safetensors")


def training_identity(cfg: RunConfig) -> dict[str, Any]:
    """Flat {dotted key: value} of everything that decides what is trained on what, in which order and how."""
    flat = dict(_flatten(plain(asdict(cfg))))
    for key in [key for key in flat if key.startswith("data.sources.") and key.endswith(".map")]:
        if name := flat.pop(key):  # a source without one is what it was before there was this key
            flat[key] = f"{name} {find_sample_map(name).sha256}"
    free = [*FREE_KEYS] + (["stage.training_steps"] if cfg.optimizer.schedule is Schedule.constant else [])
    return {key: value for key, value in flat.items() if not _is_free(key, free)}


def differences(saved: dict[str, Any], current: dict[str, Any]) -> dict[str, str]:
    """{key: `key: saved -> current`} for every difference between two identities."""
    changes = {}
    for key in sorted(saved.keys() | current.keys()):
        old, new = saved.get(key, "(not there)"), current.get(key, "(not there)")
        if old != new:
            changes[key] = f"{key}: {old!r} -> {new!r}"
    return changes


def accepted_differences(
    origin: Path, saved: dict[str, Any], current: dict[str, Any], accept: Iterable[str]
) -> list[str]:
    """The differences that `accept` (keys, or sections of keys) lets pass, in words.

    Raises CheckpointError when resuming would train something else than the checkpoint at `origin` did, naming every
    difference and what to pass to go on all the same. What fixes the shape of the checkpoint (FIXED_KEYS) cannot be
    accepted.
    """
    changes = differences(saved, current)
    accept = list(accept)
    fixed = [key for key in changes if _under(key, FIXED_KEYS)]
    refused = [key for key in changes if key in fixed or not _under(key, accept)]
    if not refused:
        return list(changes.values())
    may = [key for key in refused if key not in fixed]
    lines = [changes[key] for key in refused]
    more = f"; and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    advice = (
        f"To go on with the change on purpose, pass checkpoint.accept=[{','.join([*accept, *may])}]. " if may else ""
    )
    if "stage.training_steps" in may:
        advice += "(The cosine schedule's shape depends on stage.training_steps; with a constant rate it may change.) "
    if fixed:
        advice += (
            f"{', '.join(fixed[:SHOWN])} cannot change within a run: use another run_dir, with model.init_from naming "
            f"{origin} for the weights. "
        )
    raise CheckpointError(
        f"{origin} belongs to another configuration ({len(lines)} difference(s), saved -> now): "
        f"{'; '.join(lines[:SHOWN])}{more}. Undo the changes to resume. {advice}".strip()
    )


def _under(key: str, names: Iterable[str]) -> bool:
    return any(key == name or key.startswith(name + ".") for name in names)


def environment() -> dict[str, Any]:
    """Versions and the git commit of the code, for the manifest."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {"git_commit": git_commit(), "packages": versions, "host": platform.node()}


def git_commit() -> str | None:
    """The commit of the working tree this package lies in, `-dirty` when it has changes; None outside a repository."""
    folder = Path(__file__).resolve().parent
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def _is_free(key: str, free: list[str]) -> bool:
    return any(key == name or key.startswith(name + ".") for name in free) or (
        key.startswith("data.sources.") and key.endswith(".license")
    )


def plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
