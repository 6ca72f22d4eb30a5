"""`jp-train ask`: a question about an image."""

from __future__ import annotations

import argparse
from pathlib import Path

from jp_train.cli.arguments import Commands, add_command, add_model
from jp_train.errors import DataError

DETAILS = """\
  jp-train ask --model runs/janus_pro_1b/stage3 --image cat.jpg --question 'What is the cat doing?'"""


def register(commands: Commands) -> None:
    parser = add_command(commands, "ask", "answer a question about an image", DETAILS)
    add_model(parser)
    parser.add_argument("--image", type=Path, required=True, help="JPEG, PNG or WebP")
    parser.add_argument("--question", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from jp_train.tools.inference import answer_questions, load_for_inference

    try:
        image = arguments.image.read_bytes()
    except OSError as error:
        raise DataError(f"--image {arguments.image}: {error.strerror or error}") from None
    model = load_for_inference(arguments.model)
    (answer,) = answer_questions(
        model, [image], [arguments.question], template=arguments.template, max_new_tokens=arguments.max_new_tokens
    )
    print(answer or "(the model answered nothing)")
    return 0
