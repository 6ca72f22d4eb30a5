"""`jp-train init`: the files of a first run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jp_train.cli.arguments import Commands, add_command, whole_number
from jp_train.errors import ConfigError, one_of

PRESETS, STAGES = ("tiny", "janus_pro_1b", "janus_pro_7b"), ("2", "1", "3")
"""What may be chosen, the default first."""

DETAILS = """\
Writes FOLDER/run.yaml, recipe.yaml and hostfile for a short trial of a preset on this host, and prints the commands
that come next. At a terminal preset, stage, data and weights are asked for where they are not given; without one,
preset and stage have defaults. Nothing is overwritten.

  jp-train data import conversations llava.json shards/llava --images llava
  jp-train init mine --data shards/llava shards/text --init-from weights/Janus-Pro-1B --preset janus_pro_1b --stage 3
  jp-train init mine --data generation=other/tars --init-from runs/smoke/init
  jp-train init mine --data shards/text --init-from random --tokenizer runs/smoke/tokenizer

The paper's stage 1 starts from parts (LLM, SigLIP, VQ) instead: copy launch/janus_pro_1b_stage1.yaml for it."""


def register(commands: Commands) -> None:
    parser = add_command(commands, "init", "write the files of a first run with your own data", DETAILS)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where the files go")
    parser.add_argument("--preset", choices=PRESETS, help=f"size of the model (default {PRESETS[0]})")
    parser.add_argument("--stage", choices=STAGES, help=f"of the three (default {STAGES[0]})")
    parser.add_argument(
        "--data", nargs="+", metavar="[KIND=]FOLDER", help="folders of shards; what `data import` wrote says its kind"
    )
    parser.add_argument(
        "--init-from", dest="weights", metavar="PATH", help="starting weights: a model's folder, or `random`"
    )
    parser.add_argument("--tokenizer", default="", metavar="PATH", help="default: the one beside the weights")
    parser.add_argument("--steps", type=whole_number(1), default=20, help="steps of the trial (default 20)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    preset = arguments.preset or _chosen("--preset", "size of the model", PRESETS)
    stage = arguments.stage or _chosen("--stage", "stage of the training", STAGES)

    from jp_train.tools.first_run import RANDOM, TINY_WEIGHTS, TOKENIZER, FirstRun, source_of, write_first_run

    data = arguments.data or _asked("--data", "folders of shards, with blanks between them").split()
    for folder in data:  # before the next question
        source_of(folder)
    weights = arguments.weights or _asked(
        "--init-from", f"folder of the starting weights, or {RANDOM}", TINY_WEIGHTS if preset == "tiny" else ""
    )
    needed = f"{TOKENIZER}, with --init-from {RANDOM}"
    tokenizer = arguments.tokenizer or (_asked("--tokenizer", needed) if weights == RANDOM else "")
    first = FirstRun(
        folder=arguments.folder,
        preset=preset,
        stage=int(stage),
        data=data,
        weights=weights,
        tokenizer=tokenizer,
        steps=arguments.steps,
    )
    print("\n".join(write_first_run(first)))
    return 0


def _asked(option: str, what: str, ways: str = "") -> str:
    """The answer to a question on the terminal. Raises ConfigError without one; `ways`: to get what is asked for."""
    answer = input(f"{what} ({option}): ").strip() if sys.stdin.isatty() else ""
    if not answer:
        raise ConfigError(f"{option} is needed: {what}{f'. {ways}' if ways else ''}")
    return answer


def _chosen(option: str, what: str, choices: Sequence[str]) -> str:
    """One of the choices, the first where nothing is answered or there is no terminal. Raises ConfigError."""
    if not sys.stdin.isatty():
        return choices[0]
    answer = input(f"{what} ({option}): {', '.join(choices)} [{choices[0]}]: ").strip() or choices[0]
    if answer not in choices:
        raise ConfigError(f"{option} {answer}{one_of(answer, choices)}")
    return answer
