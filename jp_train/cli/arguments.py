"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeAlias

from jp_train.cluster.options import DEFAULT_PORT, LaunchOptions
from jp_train.errors import did_you_mean

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""What `register` of a command adds its parser to."""


class Parser(argparse.ArgumentParser):
    """An argument parser that answers a misspelt command with the nearest one; exit status 2 as for every usage
    error."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            what = str(action.metavar).lower()
            hint = did_you_mean(value, action.choices) or f"; it is one of {', '.join(action.choices)}"
            raise argparse.ArgumentError(None, f"there is no {what} {value!r}{hint}")
        super()._check_value(action, value)


def add_config(parser: argparse.ArgumentParser) -> None:
    """CONFIG and any number of key=value overrides."""
    parser.add_argument(
        "config", metavar="CONFIG", type=Path, help="a YAML of launch/, or the config.yaml of a run folder"
    )
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="override any key, for example optimizer.lr=5e-5 data.workers=0",
    )


def add_hosts(parser: argparse.ArgumentParser) -> None:
    """--hostfile with its filters and the rendezvous, for `launch_options`."""
    parser.add_argument(
        "--hostfile", type=Path, required=True, help="DeepSpeed hostfile: `name slots=N` a line (hostfiles/README.md)"
    )
    parser.add_argument("--include", default="", help="only these hosts or slots, deepspeed syntax: host1:0,1@host2")
    parser.add_argument("--exclude", default="", help="all but these hosts or slots")
    parser.add_argument(
        "--master-port",
        type=int,
        default=DEFAULT_PORT,
        help=f"rendezvous port on the first host (default {DEFAULT_PORT})",
    )
    parser.add_argument(
        "--master-addr",
        default="",
        help="the first host's address for the others (default: what its `hostname -I` names first)",
    )


def launch_options(arguments: argparse.Namespace) -> LaunchOptions:
    """The options of a launch that the command has, the others at their defaults. Raises ConfigError."""
    given = vars(arguments)
    return LaunchOptions(**{field.name: given[field.name] for field in fields(LaunchOptions) if field.name in given})


def add_json(parser: argparse.ArgumentParser) -> None:
    """--json: one object on stdout and nothing else there."""
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, and nothing else there")


def whole_number(lowest: int) -> Callable[[str], int]:
    """An argparse type: a whole number of at least `lowest`."""

    def parse(text: str) -> int:
        number = int(text) if text.strip().lstrip("-").isdecimal() else lowest - 1
        if number < lowest:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {lowest}")
        return number

    return parse


def add_model(parser: argparse.ArgumentParser) -> None:
    """--model and --template: a trained model in use."""
    parser.add_argument("--model", type=Path, required=True, help="an exported folder, or a finished run folder")
    parser.add_argument(
        "--template",
        choices=("stage1", "stage2", "stage3"),
        help="prompt layout (default: of the stage the weights come from)",
    )


def add_sampling(parser: argparse.ArgumentParser, default: str) -> None:
    """--cfg-scale and --temperature of image generation, None where not given; `default`: where they come from then."""
    parser.add_argument(
        "--cfg-scale",
        type=float,
        help="logits = uncond + scale x (cond - uncond); 1 turns guidance off "
        f"(default: {default}, else the paper's 5)",
    )
    parser.add_argument(
        "--temperature", type=float, help=f"of the softmax over image codes (default: {default}, else the paper's 1)"
    )


def add_command(commands: Commands, name: str, summary: str, details: str = "") -> argparse.ArgumentParser:
    """A subparser whose help starts with what the command is for."""
    return commands.add_parser(
        name, help=summary, description=f"{summary}.\n\n{details}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
