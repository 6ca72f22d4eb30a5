"""`jp-train status`: one screen about a run, running or not."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from jp_train.cli.arguments import Commands, add_command, add_json

DETAILS = """\
  jp-train status runs/janus_pro_1b/stage1
  jp-train status runs/janus_pro_1b/stage1 --watch 10"""


def register(commands: Commands) -> None:
    parser = add_command(
        commands,
        "status",
        "one screen about a run: step, losses, ETA, data wait, checkpoint age, skipped samples",
        DETAILS,
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    parser.add_argument(
        "--watch",
        type=float,
        metavar="SECONDS",
        default=0,
        help="print again every SECONDS until the run has ended well, or Ctrl-C",
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from jp_train.run.status import format_status, status

    while True:
        state = status(arguments.run_dir)
        if arguments.watch and not arguments.json and sys.stdout.isatty():
            print("\033[H\033[2J", end="")  # one screen, not one below another
        print(json.dumps(state) if arguments.json else format_status(state), flush=True)
        if not arguments.watch or state["state"] in ("finished", "stopped_early"):
            return 0
        time.sleep(arguments.watch)
