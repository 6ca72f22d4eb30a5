"""The two options that every benchmark has for its figures, and what they do. Not a benchmark itself."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--json` and `--save FILE`."""
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the JSON object there as well")


def delivered(arguments: argparse.Namespace, figures: dict[str, Any]) -> bool:
    """Write the figures where `--save` says; True when `--json` has printed them, so that no table follows."""
    text = json.dumps(figures)
    if arguments.save:
        arguments.save.write_text(text)
    if arguments.json:
        print(text)
    return arguments.json
