"""`jp-train export`: weights of a run in a layout that others read."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from jp_train.cli.arguments import Commands, add_command, add_sampling, add_upload
from jp_train.terminal import duration

DETAILS = """\
SOURCE: a finished run folder, its export/, a checkpoint folder (checkpoints/step_...), or any folder in transformers'
or the released layout. `hf` loads with transformers' JanusForConditionalGeneration.from_pretrained; `deepseek` has the
tensor names of the released Janus-Pro files (load it non-strictly there: the pooling head, which nothing uses, is left
out).

  jp-train export runs/janus_pro_1b/stage3 exported/janus_pro_1b
  jp-train export runs/janus_pro_1b/stage3 released/janus_pro_1b --layout deepseek"""


def register(commands: Commands) -> None:
    parser = add_command(
        commands, "export", "write a run's weights as safetensors, in transformers' or the released layout", DETAILS
    )
    parser.add_argument("source", metavar="SOURCE", type=Path)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; complete or absent")
    parser.add_argument("--layout", choices=("hf", "deepseek"), default="hf")
    parser.add_argument(
        "--dtype",
        choices=("bf16", "fp32"),
        default="bf16",
        help="of the trained modules; the VQ tokenizer stays fp32 (default bf16)",
    )
    add_sampling(parser, "SOURCE's generation_config.json")
    add_upload(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from jp_train.tools.export import convert, describe
    from jp_train.tools.upload import Upload

    began = time.monotonic()
    upload = Upload(arguments.upload) if arguments.upload else None
    options = {name: getattr(arguments, name) for name in ("layout", "dtype", "cfg_scale", "temperature")}
    print(convert(arguments.source, arguments.out, **options))
    print(
        f"written: {describe(arguments.out)}; layout {arguments.layout}, {arguments.dtype} (VQ tokenizer fp32), "
        f"{duration(time.monotonic() - began)}",
        file=sys.stderr,
    )
    if upload is not None:
        print(upload.copy(arguments.out, sys.stderr))
    return 0
