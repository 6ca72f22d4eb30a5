"""`jp-train check`: everything about a run that can be known without running it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from jp_train.cli.arguments import Commands, add_command, add_config, add_json, whole_number

DETAILS = """\
Reads the configuration, the hostfile, the run folder, the tokenizer, the headers of the starting weights, and the
shards' indexes (what is missing of them is built), and prints the resolved plan of the stage: batch arithmetic,
parameters and what learns, sources with samples, tokens and the epochs that the stage will make over each. Problems
are listed first. Exit status: 0 without one, 3 where all are of the data, 4 of weights or checkpoints, else 2.

  jp-train check launch/janus_pro_1b_stage1.yaml --hostfile hostfiles/a100_16x8
  jp-train check launch/janus_pro_1b_stage1.yaml --config-only optimizer.lr=5e-5"""


def register(commands: Commands) -> None:
    parser = add_command(commands, "check", "what a configuration would run, and whether it fits together", DETAILS)
    add_config(parser)
    ranks = parser.add_mutually_exclusive_group()
    ranks.add_argument("--hostfile", type=Path, help="take the number of ranks from this hostfile")
    ranks.add_argument("--world", type=whole_number(1), default=1, help="number of ranks (default 1)")
    parser.add_argument(
        "--config-only",
        action="store_true",
        help="do not look at run folder, tokenizer, weights and shards (they are on another machine)",
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from jp_train.config import load_config

    config = load_config(arguments.config, arguments.overrides)  # before torch: a misspelt key is answered at once

    from jp_train.tools.check.check import check
    from jp_train.tools.check.text import format_check

    plan = check(config, arguments.hostfile, world=arguments.world, config_only=arguments.config_only)
    print(json.dumps(plan) if arguments.json else format_check(plan))
    return int(plan["exit_status"])
