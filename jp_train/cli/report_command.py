"""`jp-train report`: curves and tables of one or several runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from jp_train.cli.arguments import Commands, add_command

DETAILS = """\
Writes report.html (one self-contained file) and PNG curves. Several run folders are overlaid to compare runs; folders
that are consecutive stages of one training are laid side by side.

  jp-train report runs/janus_pro_1b/stage1
  jp-train report runs/janus_pro_1b/stage1 runs/janus_pro_1b/stage2 --out runs/janus_pro_1b"""


def register(commands: Commands) -> None:
    parser = add_command(
        commands, "report", "loss curves, mixture, throughput, events and samples as one HTML page and PNGs", DETAILS
    )
    parser.add_argument("run_dirs", metavar="RUN_DIR", type=Path, nargs="+")
    parser.add_argument(
        "--out", type=Path, help="where to write report.html (default: the run folder, or the folder above several)"
    )
    parser.add_argument("--title")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from jp_train.tools.report import build_report

    print(build_report(arguments.run_dirs, arguments.out, arguments.title))
    return 0
