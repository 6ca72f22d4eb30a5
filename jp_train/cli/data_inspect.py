"""`jp-train data inspect`: packed rows as one HTML page."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from jp_train.cli.arguments import Commands, add_command, add_json
from jp_train.cli.replay_arguments import add_replay, config_and_overrides

DETAILS = """\
Writes one HTML file that needs no network: each row as a bar to scale in the colours of its sources, where positions
restart, which positions train which head, and for every document its text token by token, its images as the model sees
them and what the VQ makes of them. Look at it before a long run: it shows a wrong template, mask or crop within a
minute.

  jp-train data inspect launch/janus_pro_1b_stage2.yaml --rows 4 --out inspect.html
  jp-train data inspect --run runs/janus_pro_1b/stage2 --step 12345

VQ ids are decoded with the weights of --model, else with those the configuration starts from."""


def register(tools: Commands) -> None:
    parser = add_command(
        tools, "inspect", "packed rows of a step as one HTML page: text, images, boundaries, loss masks", DETAILS
    )
    add_replay(parser, step_required=False)
    parser.add_argument(
        "--rows", type=int, default=8, help="how many rows of the step to show, from its first (default: 8)"
    )
    parser.add_argument(
        "--model",
        metavar="DIR",
        type=Path,
        help="take the VQ from this model (an export, a run folder, a released model)",
    )
    parser.add_argument(
        "--out",
        metavar="FILE.html",
        type=Path,
        default=Path("inspect.html"),
        help="where to write (default: inspect.html)",
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from jp_train.tools.explain.step import open_replay
    from jp_train.tools.inspect.rows import as_json, describe_page, inspect_rows, place_of

    config, overrides = config_and_overrides(arguments)
    where = place_of(config, arguments.run_dir)
    with open_replay(config, overrides, arguments.run_dir) as replay:
        page = inspect_rows(
            replay, arguments.step, rows=arguments.rows, out=arguments.out, model=arguments.model, where=where
        )
        notes = list(replay.notes)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(json.dumps(as_json(page, notes)) if arguments.json else describe_page(page))
    return 0
