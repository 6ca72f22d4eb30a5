"""What may not change between a checkpoint and the run that resumes it, and what the checkpoint was made with."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

from jp_train.config import RunConfig
from jp_train.config.schema import Schedule

FREE_KEYS = (
    "preset",
    "recipe",
    "run_dir",
    "logging",
    "checkpoint",
    "validation",
    "stage.early_stop",
    "loss.chunk_tokens",
    "engine.micro_batch_rows",
    "engine.activation_checkpointing",
    "engine.persistence_threshold",
    "engine.hpz_partition_size",
    "engine.collective_timeout_s",
    "data.workers",
    "data.prefetch_rows",
    "data.io_retries",
    "data.skip_budget",
    "data.skip_minimum",
    "data.skip_consecutive",
    "data.snapshot_steps",
    # places may move; what lies there is checked by its contents (plan, tokenizer and frozen-weight checksums)
    "data.root",
    "tokenizer.path",
    "model.init_from",
    "model.init_parts",
)
"""Keys that a resumed run may change. `stage.training_steps` joins them unless the schedule's shape depends on it."""

PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "omegaconf", "safetensors")


def identity(cfg: RunConfig) -> dict[str, Any]:
    """Flat {dotted key: value} of everything that decides what is trained on what, in which order and how."""
    flat = dict(_flatten(plain(asdict(cfg))))
    free = [*FREE_KEYS] + (["stage.training_steps"] if cfg.optimizer.schedule is Schedule.constant else [])
    return {key: value for key, value in flat.items() if not _is_free(key, free)}


def differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """One `key: saved -> current` line for every difference between two identities."""
    lines = []
    for key in sorted(saved.keys() | current.keys()):
        old, new = saved.get(key, "(not there)"), current.get(key, "(not there)")
        if old != new:
            lines.append(f"{key}: {old!r} -> {new!r}")
    return lines


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
    return any(key == name or key.startswith(name + ".") for name in free) or (key.startswith("data.sources.") and key.endswith(".license"))


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
