"""`jp-train data simulate`: what a stage will do with its data, without a GPU and without reading an image."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from jp_train.cli.arguments import Commands, add_command, add_config, add_json

DETAILS = """\
Plans some hundred steps from all over the stage (real rows, from the index alone) and shows how full rows are, how
exact the mixture is, how often each source is seen and from which step on it repeats, what is truncated, how evenly
work falls on ranks, how often a rank lacks a kind, and what storage must deliver to a node. Extrapolated figures come
with their error. Without data yet, give --synthetic or --lengths.

  jp-train data simulate launch/janus_pro_1b_stage2.yaml --hostfile hostfiles/a100_16x8 --out forecast/
  jp-train data simulate launch/janus_pro_1b_stage2.yaml --world 128 --step-seconds 4.5 --synthetic"""


def register(tools: Commands) -> None:
    parser = add_command(
        tools, "simulate", "forecast a stage's data: fill, mixture, epochs, balance between ranks, reads", DETAILS
    )
    add_config(parser)
    ranks = parser.add_mutually_exclusive_group()
    ranks.add_argument("--hostfile", type=Path, help="take ranks and nodes from this hostfile")
    ranks.add_argument("--world", type=int, help="number of ranks, 8 a node (default: 1)")
    parser.add_argument(
        "--steps", type=int, help="steps of the stage (default: the configuration's, up to its early stop)"
    )
    parser.add_argument("--sample-steps", type=int, help="steps to plan (default: 100,000 rows, at least 200 steps)")
    parser.add_argument(
        "--step-seconds", type=float, help="time of a step, for reads a second (default: from its FLOPs)"
    )
    lengths = parser.add_mutually_exclusive_group()
    lengths.add_argument(
        "--lengths",
        type=Path,
        help="YAML or JSON of length distributions by source or kind: `NAME: {mean: 200, sigma: 0.6, samples: 1e6}`",
    )
    lengths.add_argument(
        "--synthetic", action="store_true", help="stated log-normal lengths of every kind instead of an index"
    )
    parser.add_argument("--out", type=Path, help="folder for simulate.png and simulate.json")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from jp_train.config import load_config

    config = load_config(arguments.config, arguments.overrides)  # before torch: a misspelt key is answered at once

    from jp_train.tools.simulate.plots import save_forecast
    from jp_train.tools.simulate.stage import SimulateOptions, simulate_stage
    from jp_train.tools.simulate.table import format_forecast

    names = ("hostfile", "world", "steps", "sample_steps", "lengths", "synthetic", "step_seconds")
    options = SimulateOptions(**{name: getattr(arguments, name) for name in names})
    forecast = simulate_stage(config, options)
    print(json.dumps(forecast) if arguments.json else format_forecast(forecast))
    if arguments.out is not None:
        print(f"written: {save_forecast(forecast, arguments.out)}", file=sys.stderr)
    return 0
