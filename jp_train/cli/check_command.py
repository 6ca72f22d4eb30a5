"""`jp-train check`: everything about a run that can be known without running it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from jp_train.cli.arguments import Commands, add_command, add_config, add_json

DETAILS = """\
Reads the configuration, the hostfile, the tokenizer, the headers of the starting weights, and the shards' indexes as
far as they are built, and prints the resolved plan of the stage: batch arithmetic, parameters and what learns, sources
with samples, tokens and the epochs that the stage will make over each. Problems are listed first; exit status 2 when
there is one.

  jp-train check launch/janus_pro_1b_stage1.yaml --hostfile hostfiles/a100_16x8
  jp-train check launch/janus_pro_1b_stage1.yaml --config-only optimizer.lr=5e-5"""


def register(commands: Commands) -> None:
    parser = add_command(commands, "check", "what a configuration would run, and whether it fits together", DETAILS)
    add_config(parser)
    parser.add_argument("--hostfile", type=Path, help="take the world size from this hostfile")
    parser.add_argument(
        "--config-only",
        action="store_true",
        help="do not look at tokenizer, weights and shards (they are on another machine)",
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from jp_train.config import load_config

    config = load_config(arguments.config, arguments.overrides)  # before torch: a misspelt key is answered at once

    from jp_train.tools.check import check, format_check

    plan = check(config, arguments.hostfile, config_only=arguments.config_only)
    print(json.dumps(plan) if arguments.json else format_check(plan))
    return 2 if plan["problems"] else 0
