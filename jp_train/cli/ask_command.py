"""`jp-train ask`: a question about one or several images."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jp_train.cli.arguments import Commands, add_command, add_model
from jp_train.errors import DataError

DETAILS = """\
Several images stand before the question, or in order at each <image> in it, as in training.

  jp-train ask --model runs/janus_pro_1b/stage3 --image cat.jpg --question 'What is the cat doing?'
  jp-train ask --model runs/mine --image left.png right.png --question 'Is <image> larger than <image>?'"""


def register(commands: Commands) -> None:
    parser = add_command(commands, "ask", "answer a question about one or several images", DETAILS)
    add_model(parser)
    parser.add_argument(
        "--image",
        type=Path,
        required=True,
        nargs="+",
        action="extend",
        help="JPEG, PNG or WebP; several for a question about all of them",
    )
    parser.add_argument("--question", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from jp_train.tools.inference import answer_about_files, load_for_inference

    for path in arguments.image:  # before the model is loaded
        if not path.is_file():
            raise DataError(f"--image {path}: {'is a folder; name an image file' if path.is_dir() else 'no such file'}")
    answer = answer_about_files(
        load_for_inference(arguments.model),
        arguments.image,
        arguments.question,
        template=arguments.template,
        max_new_tokens=arguments.max_new_tokens,
    )
    print(answer)
    if not answer.strip():
        print("(the model answered nothing)", file=sys.stderr)
    return 0
