"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeAlias

from jp_train.cluster.options import DEFAULT_PORT, LaunchOptions
from jp_train.errors import did_you_mean, one_of

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""What `register` of a command adds its parser to."""


class Parser(argparse.ArgumentParser):
    """An argument parser that answers a misspelt command with the nearest one; exit status 2 as for every usage
    error."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            what = str(action.metavar).lower()
            hint = did_you_mean(value, action.choices) or one_of(value, action.choices)
            raise argparse.ArgumentError(None, f"there is no {what} {value!r}{hint}")
        super()._check_value(action, value)


def add_config(parser: argparse.ArgumentParser) -> None:
    """CONFIG and any number of key=value overrides."""
    parser.add_argument(
        "config", metavar="CONFIG", type=Path, help="a YAML of launch/, or the config.yaml of a run folder"
    )
    add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Any number of key=value."""
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="override any key, for example optimizer.lr=5e-5 data.workers=0",
    )


def add_hosts(parser: argparse.ArgumentParser) -> None:
    """--hostfile with its filters and the rendezvous, for `launch_options`."""
    parser.add_argument(
        "--hostfile",
        type=Path,
        required=True,
        help="DeepSpeed hostfile: `[user@]name slots=N` a line, node[01-16] for many (hostfiles/README.md)",
    )
    parser.add_argument("--include", default="", help="only these hosts or slots, deepspeed syntax: host1:0,1@host2")
    parser.add_argument("--exclude", default="", help="all but these hosts or slots")
    parser.add_argument(
        "--master-port",
        type=int,
        help=f"rendezvous port on the first host (default {DEFAULT_PORT}; a free one if that is in use and the "
        "hostfile is this host alone)",
    )
    parser.add_argument(
        "--master-addr",
        default="",
        help="the first host's address for the others (default: what its `hostname -I` names first)",
    )
    parser.add_argument(
        "--ssh-args", default="", metavar='"-p 2222 ..."', help="more words for every ssh, pdsh's and mpirun's too"
    )
    parser.add_argument(
        "--env", action="append", metavar="NAME", help="one more variable of this shell for remote ranks"
    )


def launch_options(arguments: argparse.Namespace) -> LaunchOptions:
    """The options of a launch that the command was given, the others at their defaults. Raises ConfigError."""
    names = {field.name for field in fields(LaunchOptions)}
    given = {name: value for name, value in vars(arguments).items() if name in names and value is not None}
    return LaunchOptions(**given, choose_port="master_port" not in given)


def add_json(parser: argparse.ArgumentParser) -> None:
    """--json: one object on stdout and nothing else there."""
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, and nothing else there")


def add_upload(parser: argparse.ArgumentParser) -> None:
    """--upload: a copy of what was written in an object store."""
    parser.add_argument(
        "--upload",
        metavar="URL",
        help="also copy the folder, under its own name, into this one of an object store (s3://, gs://, az://)",
    )


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
    parser.add_argument(
        "--model", type=Path, required=True, help="an exported folder, a finished run folder, or a checkpoint of a run"
    )
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
