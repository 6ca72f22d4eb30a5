"""`jp-train data explain`: the documents of a step's rows, and the exact tensors."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from jp_train.cli.arguments import Commands, add_command, add_json
from jp_train.cli.replay_arguments import add_replay, config_and_overrides

DETAILS = """\
Rebuilds what an optimizer step was, or will be, made of: for every document of a row its source, shard and key, which
of its tokens lie where in the row, which positions carry a loss of which head, and what was cut, truncated or skipped.
Rows depend on configuration and data alone, so no checkpoint and no GPU is needed. With --run any step is reached
quickly (from the run's plan_snapshots.jsonl), other data than the run's are rejected, and a whole step is compared with
the counts in its metrics.jsonl. Without it, planning starts at step 1.

  jp-train data explain --run runs/janus_pro_1b/stage1 --step 12345            a line for every row
  jp-train data explain --run runs/janus_pro_1b/stage1 --step 12345 --row 7    its documents
  jp-train data explain launch/janus_pro_1b_stage1.yaml --step 1 --row 0       before there is a run

--save writes the micro-batch as it went into the model; in Python jp_train.data.batch_file.load_batch(path) reads it
back."""


def register(tools: Commands) -> None:
    parser = add_command(tools, "explain", "which documents the rows of an optimizer step were made of", DETAILS)
    add_replay(parser, step_required=True)
    parser.add_argument("--row", type=int, help="only this row of the step, counted from 0 over all ranks")
    parser.add_argument("--rank", type=int, help="only the rows of this data-parallel rank (give --world too)")
    parser.add_argument("--world", type=int, help="how many data-parallel ranks there are")
    parser.add_argument(
        "--save", metavar="OUT.safetensors", type=Path, help="write the micro-batches that hold these rows"
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from jp_train.errors import ConfigError
    from jp_train.tools.explain.step import compare_with_metrics, explain_step, format_explained, open_replay

    if (arguments.rank is None) != (arguments.world is None):
        raise ConfigError("--rank and --world go together: which rank, of how many")
    config, overrides = config_and_overrides(arguments)
    with open_replay(config, overrides, arguments.run_dir) as replay:
        explained = explain_step(
            replay,
            arguments.step,
            row=arguments.row,
            rank=arguments.rank,
            world=arguments.world or 1,
            save=arguments.save,
        )
    agrees = compare_with_metrics(explained, arguments.run_dir) if arguments.run_dir else None
    for note in [*explained["notes"], *([agrees] if agrees else [])]:
        print(f"note: {note}", file=sys.stderr)
    print(json.dumps(explained) if arguments.json else format_explained(explained))
    return 0
