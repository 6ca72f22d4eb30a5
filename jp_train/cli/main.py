"""Entry point: finds the subcommand, turns the package's errors into one line and an exit status."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from jp_train import __version__
from jp_train.cli.arguments import Parser
from jp_train.errors import JpTrainError

COMMANDS = (
    "init",
    "train",
    "launch",
    "preflight",
    "check",
    "config",
    "forecast",
    "data",
    "import",
    "export",
    "generate",
    "ask",
    "report",
    "status",
)

EPILOG = """\
the steps of a training, in order:
  jp-train init mine --data shards/llava --init-from weights/Janus-Pro-1B             the files of a first run
  jp-train config launch/janus_pro_1b_stage1.yaml                                     every key: value, origin, meaning
  jp-train check launch/janus_pro_1b_stage1.yaml --hostfile hostfiles/a100_16x8       what would run, and does it fit
  jp-train data import conversations llava.json shards/llava --images llava           shards from what was downloaded
  jp-train data index launch/janus_pro_1b_stage1.yaml                                 token counts, once
  jp-train data verify launch/janus_pro_1b_stage1.yaml                                every fault of every sample
  jp-train data simulate launch/janus_pro_1b_stage1.yaml --world 128                  fill, ratio, epochs, balance
  jp-train preflight launch/janus_pro_1b_stage1.yaml --hostfile hostfiles/a100_16x8   every fault of every host
  jp-train launch launch/janus_pro_1b_stage1.yaml --hostfile hostfiles/a100_16x8      train; run again to resume
  jp-train status runs/janus_pro_1b/stage1                                            one screen
  jp-train report runs/janus_pro_1b/stage1                                            curves and tables as one HTML page

exit status: 0 done (an early stop included), 2 configuration or usage, 3 data, 4 checkpoint, 5 launch,
130/138/143 stopped by a signal after saving
"""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; each module of `jp_train.cli` adds its own subcommand."""
    parser = Parser(
        prog="jp-train",
        description="Train Janus-Pro style unified models (understanding and generation) with DeepSpeed ZeRO-3.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # a bare deepspeed launcher puts it here
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"jp_train {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        importlib.import_module(f"jp_train.cli.{name}_command").register(commands)
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments; `key=value` may stand anywhere, also behind options (argparse alone rejects it there).
    Exits with 2 on a usage error."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    wrong = [word for word in rest if word.startswith("-") or not hasattr(arguments, "overrides")]
    if wrong:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = parse(argv)
    try:
        return int(arguments.run(arguments) or 0)
    except JpTrainError as error:
        print(f"jp-train {arguments.command}: {type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"jp-train {arguments.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `jp-train ... | head`
        sys.stderr.close()
        return 141


if __name__ == "__main__":
    raise SystemExit(main())
