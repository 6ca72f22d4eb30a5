"""`jp-train import`: a released checkpoint into the layout that stages start from."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jp_train.cli.arguments import Commands, add_command

DETAILS = """\
Turns a released deepseek-ai Janus-Pro folder (or any layout that `export` writes) into transformers' format, and checks
names and shapes. Optional: `model.init_from` reads a released folder directly too.

  jp-train import Janus-Pro-1B weights/janus_pro_1b"""


def register(commands: Commands) -> None:
    parser = add_command(commands, "import", "turn a released checkpoint into transformers' format", DETAILS)
    parser.add_argument("source", metavar="IN", type=Path, help="folder with config.json and safetensors")
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from jp_train.tools.export import convert, describe

    print(convert(arguments.source, arguments.out, layout="hf", dtype=arguments.dtype))
    print(f"written: {describe(arguments.out)}, {arguments.dtype} (VQ tokenizer fp32)", file=sys.stderr)
    return 0
