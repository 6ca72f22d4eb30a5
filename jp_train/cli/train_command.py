"""`jp-train train`: one rank of a training run."""

from __future__ import annotations

import argparse

from jp_train.cli.arguments import Commands, add_command, add_config

DETAILS = """\
The deepspeed launcher starts this on every rank; started by hand it trains with one process. To train on several
devices use `jp-train launch`. A run folder that already holds checkpoints is resumed from the newest complete one.
Ctrl-C or SIGTERM: the step is finished, a checkpoint saved, exit status 130 / 143; a second signal exits at once.

  jp-train train examples/smoke/stage1.yaml run_dir=runs/try stage.training_steps=20"""


def register(commands: Commands) -> None:
    parser = add_command(commands, "train", "run one rank of a training run", DETAILS)
    add_config(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from jp_train.config import load_config

    config = load_config(arguments.config, arguments.overrides)  # before torch: a misspelt key is answered at once

    from jp_train.train.session import train

    return train(config)
