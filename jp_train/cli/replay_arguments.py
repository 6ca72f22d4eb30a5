"""Arguments of the commands that rebuild rows: a configuration or a run folder, and a step."""

from __future__ import annotations

import argparse
from pathlib import Path

from jp_train.errors import ConfigError


def add_replay(parser: argparse.ArgumentParser, *, step_required: bool) -> None:
    """Add `[CONFIG] [key=value ...] --run RUN_DIR --step S`."""
    parser.add_argument(
        "config", metavar="CONFIG", nargs="?", help="a YAML of launch/; default with --run: the run's own config.yaml"
    )
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", help="override any key, for example data.root=/other/place"
    )
    parser.add_argument(
        "--run",
        dest="run_dir",
        metavar="RUN_DIR",
        type=Path,
        help="a run folder: its configuration, and its plan snapshots",
    )
    parser.add_argument(
        "--step",
        type=int,
        required=step_required,
        default=1,
        help="optimizer step as metrics.jsonl and wandb count: the first is 1"
        + ("" if step_required else " (default: 1)"),
    )


def config_and_overrides(arguments: argparse.Namespace) -> tuple[Path | None, list[str]]:
    """The configuration file, if one is named, and the overrides, in whatever order they stand: a word with "=" is an
    override.

    Raises ConfigError when two files are named.
    """
    words = [word for word in (arguments.config, *arguments.overrides) if word is not None]
    files = [word for word in words if "=" not in word or Path(word).is_file()]
    if len(files) > 1:
        raise ConfigError(f"one configuration is expected, got {' and '.join(files)}; overrides are written key=value")
    return (Path(files[0]) if files else None), [word for word in words if word not in files]
