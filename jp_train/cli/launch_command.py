"""`jp-train launch`: a run on the hosts of a hostfile."""

from __future__ import annotations

import argparse
from pathlib import Path

from jp_train.cli.arguments import add_command, add_config

DETAILS = """\
Checks the configuration and the hostfile, prints the batch arithmetic and the exact deepspeed command, then runs it. `--dry-run` stops
after printing. Run the same command again to resume. Signals are passed on: the ranks save and exit."""


def register(commands: argparse._SubParsersAction) -> None:
    parser = add_command(commands, "launch", "start a training run on every host of a hostfile", DETAILS)
    add_config(parser)
    parser.add_argument("--hostfile", type=Path, required=True, help="DeepSpeed hostfile: `name slots=N` a line")
    parser.add_argument("--include", default="", help="only these hosts or slots, deepspeed syntax: host1:0,1@host2")
    parser.add_argument("--exclude", default="", help="all but these hosts or slots")
    parser.add_argument("--master-port", type=int, default=29500, help="rendezvous port on the first host (default 29500)")
    parser.add_argument("--dry-run", action="store_true", help="print what would run and stop")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from jp_train.launch import launch

    return launch(
        arguments.config,
        arguments.overrides,
        arguments.hostfile,
        include=arguments.include,
        exclude=arguments.exclude,
        master_port=arguments.master_port,
        dry_run=arguments.dry_run,
    )
