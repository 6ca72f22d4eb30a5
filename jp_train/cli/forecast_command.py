"""`jp-train forecast`: whether a stage fits its GPUs, and how long it takes, before anyone books them."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from jp_train.cli.arguments import Commands, add_command, add_config, add_json, whole_number

DETAILS = """\
Needs no GPU and no data. For every micro-batch, with and without activation checkpointing and hpZ: memory of one GPU by
what takes it, and whether it fits; then communication and FLOPs of a step, its time with and without overlap, days of
the stage and of the whole training, and what would make it faster, with the time of each variant. Memory agrees within
10 % with measured runs (python bench/forecast.py); time rests on the hardware figures that are printed with it: give
measured ones with --hardware.

  jp-train forecast launch/janus_pro_7b_stage2.yaml --hostfile hostfiles/a100_32x8 --out forecast/
  jp-train forecast launch/janus_pro_1b_stage2.yaml --world 64 --gpu h100 --hardware inter_gbs=100"""


def register(commands: Commands) -> None:
    parser = add_command(
        commands, "forecast", "memory, communication, FLOPs, time and days of a stage on a cluster", DETAILS
    )
    add_config(parser)
    ranks = parser.add_mutually_exclusive_group(required=True)
    ranks.add_argument("--hostfile", type=Path, help="take nodes and ranks from this hostfile")
    ranks.add_argument("--world", type=whole_number(1), help="number of ranks, 8 a node, without a hostfile")
    parser.add_argument("--include", default="", help="only these hosts and slots of the hostfile: host1@host2:0,2")
    parser.add_argument("--exclude", default="", help="all but these")
    parser.add_argument("--gpu", default="a100-40gb", help="a100-40gb (default), a100-80gb, a100-40gb-pcie, h100, h200")
    parser.add_argument(
        "--hardware",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another figure than the GPU's: memory_gib, achievable, intra_gbs, inter_gbs, ... (all are printed with "
        "the forecast); repeatable",
    )
    parser.add_argument("--out", type=Path, help="folder for forecast.html, memory.png, time.png and forecast.json")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from jp_train.config import load_config

    load_config(arguments.config, arguments.overrides)  # before torch: a misspelt key is answered at once

    from jp_train.tools.forecast.forecast import Question, forecast_stage
    from jp_train.tools.forecast.plots import save_forecast
    from jp_train.tools.forecast.table import format_forecast

    question = Question(
        **{name: getattr(arguments, name) for name in ("hostfile", "world", "include", "exclude", "gpu")},
        figures=tuple(arguments.hardware),
    )
    forecast = forecast_stage(arguments.config, arguments.overrides, question)
    print(json.dumps(forecast) if arguments.json else format_forecast(forecast))
    if arguments.out is not None:
        print(f"written: {save_forecast(forecast, arguments.out)}", file=sys.stderr)
    return 0
