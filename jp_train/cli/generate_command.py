"""`jp-train generate`: images from prompts."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from jp_train.cli.arguments import Commands, add_command, add_model, add_sampling
from jp_train.errors import ConfigError
from jp_train.terminal import duration

DETAILS = """\
The paper samples with scale 5 at temperature 1; for a small model that memorises, try 1 to 2 at 0.6. An export keeps
what is best for it: `jp-train export RUN OUT --cfg-scale 2 --temperature 0.6`.

  jp-train generate --model runs/janus_pro_1b/stage3 --prompt 'a red circle' --out circle.png"""


def register(commands: Commands) -> None:
    parser = add_command(commands, "generate", "images from prompts, with classifier-free guidance", DETAILS)
    add_model(parser)
    parser.add_argument("--prompt", action="append", required=True, help="may be given several times; one image each")
    parser.add_argument(
        "--out", type=Path, required=True, help="PNG; several prompts are written as OUT-1.png, OUT-2.png, ..."
    )
    add_sampling(parser, "the model's generation_config.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.out.suffix.lower() != ".png":
        raise ConfigError(f"--out {arguments.out}: expected a .png file name")
    if arguments.temperature is not None and arguments.temperature <= 0:
        raise ConfigError(f"--temperature must be above 0, found {arguments.temperature}")
    from PIL import Image

    from jp_train.tools.inference import generate_images, load_for_inference

    began = time.monotonic()
    model = load_for_inference(arguments.model)
    try:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)  # as every --out does, and before the work
    except OSError as error:
        raise ConfigError(f"--out {arguments.out}: its folder cannot be made: {error}") from error
    sampling = model.sampling.override(arguments.cfg_scale, arguments.temperature)
    images = generate_images(
        model,
        arguments.prompt,
        cfg_scale=sampling.cfg_scale,
        temperature=sampling.temperature,
        seed=arguments.seed,
        template=arguments.template,
    )
    for number, image in enumerate(images, start=1):
        file = arguments.out if len(images) == 1 else arguments.out.with_name(f"{arguments.out.stem}-{number}.png")
        Image.fromarray(image).save(file)
        print(file)
    origin = " (the model's defaults)" if sampling == model.sampling else ""
    print(
        f"{len(images)} x {images.shape[1]} x {images.shape[2]} pixels, {sampling.describe()}{origin}, "
        f"{str(model.janus.lm_head.weight.dtype).removeprefix('torch.')} on {model.device}, "
        f"{duration(time.monotonic() - began)} with loading",
        file=sys.stderr,
    )
    return 0
