"""`jp-train generate`: pictures from prompts."""

from __future__ import annotations

import argparse
from pathlib import Path

from jp_train.cli.arguments import add_command, add_model
from jp_train.errors import ConfigError


def register(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "generate",
        "pictures from prompts, with classifier-free guidance",
        "The paper samples with scale 5 at temperature 1; small models that memorise are ruined by that: try 1 to 2.",
    )
    add_model(parser)
    parser.add_argument("--prompt", action="append", required=True, help="may be given several times; one picture each")
    parser.add_argument(
        "--out", type=Path, required=True, help="PNG; several prompts are written as OUT-1.png, OUT-2.png, ..."
    )
    parser.add_argument(
        "--cfg-scale",
        type=float,
        default=5.0,
        help="logits = uncond + scale x (cond - uncond); 1 turns guidance off (default 5)",
    )
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.out.suffix.lower() != ".png":
        raise ConfigError(f"--out {arguments.out}: expected a .png file name")
    if arguments.temperature <= 0:
        raise ConfigError(f"--temperature must be above 0, found {arguments.temperature}")
    from PIL import Image

    from jp_train.tools.inference import generate_images, load_for_inference

    pictures = generate_images(
        load_for_inference(arguments.model),
        arguments.prompt,
        cfg_scale=arguments.cfg_scale,
        temperature=arguments.temperature,
        seed=arguments.seed,
        template=arguments.template,
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures, start=1):
        file = arguments.out if len(pictures) == 1 else arguments.out.with_name(f"{arguments.out.stem}-{number}.png")
        Image.fromarray(picture).save(file)
        print(file)
    return 0
