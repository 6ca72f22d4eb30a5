"""The smoke run: data, tokenizer, pretrained parts, the three stages under the deepspeed launcher, judging, report.

Each step writes into `--out` and leaves a mark in `--out/steps/` when it is complete, so an interrupted run goes on
where it was; the stages themselves resume from their checkpoints. A run that had finished starts afresh.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from examples.smoke.console import LineFilter, recorded
from examples.smoke.sizes import SmokeSizes
from jp_train.errors import ConfigError, JpTrainError, LaunchError
from jp_train.files import has_gpu_files
from jp_train.terminal import duration

ROOT = Path(__file__).resolve().parents[2]
STAGES = (1, 2, 3)
LAST = "report"
EXPECTED_S = {
    "data": 12,
    "tokenizer": 3,
    "parts": 136,
    "stage1": 70,
    "stage2": 215,
    "stage3": 175,
    "evaluation": 17,
    "report": 5,
}
"""Seconds of each step on two idle cores. The time left is this scaled by the pace of the steps that are done."""
PRIOR_S = 30.0
"""The pace starts at 1 with the weight of this many seconds: the first steps are too short to tell."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """`out`: the folder everything goes to; `overrides`: key=value for every stage; `tiny`: a few steps of
    everything, for tests."""

    out: Path
    seed: int = 0
    hostfile: Path = ROOT / "hostfiles" / "local"
    overrides: tuple[str, ...] = ()
    tiny: bool = False
    master_port: int = 29500
    recipe: str = "smoke"
    """Which `examples/{recipe}/stage{1,2,3}.yaml` the stages are launched with."""

    @property
    def sizes(self) -> SmokeSizes:
        return SmokeSizes.minute() if self.tiny else SmokeSizes()


OptionsT = TypeVar("OptionsT", bound=Options)
Step = tuple[str, Callable[[], int]]
"""A step's name and its function, which returns an exit status."""


def run_smoke(options: Options, *, only_stage: int | None = None, fresh: bool = False) -> int:
    """Run all steps (or those up to `only_stage`, that stage anew) and print the summary. Returns the exit status."""
    started = time.monotonic()
    code = run_steps(options, _steps(options), EXPECTED_S, only_stage=only_stage, fresh=fresh)
    if code == 0 and only_stage is None:
        from examples.smoke.summary import format_summary

        print(format_summary(options.out, seconds=time.monotonic() - started))
    return code


def run_steps(
    options: Options,
    steps: Sequence[Step],
    expected_s: Mapping[str, float],
    *,
    only_stage: int | None = None,
    fresh: bool = False,
) -> int:
    """Run `steps` in order, without those that are marked done in `options.out`; the first status that is not 0 ends it
    and is returned.

    `expected_s`: seconds of every step, for the estimate of the time left.
    """
    if fresh or (only_stage is None and _mark(options.out, LAST).exists()):
        _clear(options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    _check_same_options(options)  # before anything is removed
    if only_stage is not None:
        steps = steps[: [name for name, _ in steps].index(f"stage{only_stage}") + 1]
        _forget(options.out, [f"stage{number}" for number in STAGES if number >= only_stage])
    for number, (name, step) in enumerate(steps, start=1):
        if _mark(options.out, name).exists():
            say(f"[{number}/{len(steps)}] {name}: done before, kept")
            continue
        pace = measured_pace(options.out, [done for done, _ in steps[: number - 1]], expected_s)
        later_s = pace * sum(expected_s[later] for later, _ in steps[number:])
        left = duration(pace * expected_s[name] + later_s)
        say(f"[{number}/{len(steps)}] {name} ... (about {left} left in all)")
        log = options.out / "logs" / f"{name}.log"
        began = time.monotonic()
        try:
            with recorded(log, LineFilter(later_s)):
                code = step()
        except JpTrainError:
            say(f"the whole output of {name} is in {log}")
            raise
        if code:
            say(f"the whole output of {name} is in {log}")
            return code
        _write_mark(options.out, name, time.monotonic() - began)
    return 0


def measured_pace(out: Path, done: Sequence[str], expected_s: Mapping[str, float]) -> float:
    """Seconds that the steps `done` took per expected second, by their marks in `out`; above 1 on a slower machine."""
    took = sum(float(json.loads(_mark(out, name).read_text())["seconds"]) for name in done)
    return (PRIOR_S + took) / (PRIOR_S + sum(expected_s[name] for name in done))


def _steps(options: Options) -> list[Step]:
    return all_steps(
        options, data=_build_data, parts=_build_parts, evaluate=_evaluate, title="jp_train smoke run: three stages"
    )


def all_steps(
    options: OptionsT,
    *,
    data: Callable[[OptionsT], int],
    parts: Callable[[OptionsT], int],
    evaluate: Callable[[OptionsT], int],
    title: str,
) -> list[Step]:
    """Names and functions in order, with what a recipe does its own way; a function returns an exit status. `title`:
    of the report."""
    return [
        ("data", lambda: data(options)),
        ("tokenizer", lambda: build_tokenizer(options)),
        ("parts", lambda: parts(options)),
        *((f"stage{stage}", lambda stage=stage: train_stage(options, stage)) for stage in STAGES),
        ("evaluation", lambda: evaluate(options)),
        ("report", lambda: _report(options, title)),
    ]


def _build_data(options: Options) -> int:
    from examples.smoke.shards import build_shards

    with rebuilt(options.out / "data") as folder:
        built = build_shards(folder, options.seed, options.sizes.shards)
    say(f"  {sum(built.samples.values())} samples of {len(built.samples)} sources")
    return 0


def build_tokenizer(options: Options) -> int:
    """Train the tokenizer on the training sources in `options.out/data`."""
    from examples.smoke.tokenizer import train_tokenizer

    with rebuilt(options.out / "tokenizer") as folder:
        train_tokenizer(options.out / "data", folder)
    return 0


def _build_parts(options: Options) -> int:
    from examples.smoke.pretrain import pretrain_all

    with rebuilt(options.out / "init") as folder:
        pretrain_all(folder, options.out / "data", options.out / "tokenizer", options.sizes, options.seed)
    return 0


def stage_overrides(options: Options, stage: int) -> list[str]:
    """key=value that put one stage's run into `options.out`."""
    out = options.out
    start = out / "init" if stage == 1 else out / f"stage{stage - 1}"
    overrides = [
        f"run_dir={out / f'stage{stage}'}",
        f"tokenizer.path={out / 'tokenizer'}",
        f"model.init_from={start}",
        f"data.root={out / 'data'}",
        f"seed={options.seed}",
    ]
    if has_gpu_files():
        overrides.append("precision=bf16")  # so that the kernels of a real run are used
    if options.tiny:
        steps = {1: 3, 2: 6, 3: 4}[stage]
        overrides += [f"stage.training_steps={steps}", "validation.documents=8", "optimizer.warmup_steps=1"]
        overrides += ["stage.early_stop.at_step=4"] if stage == 2 else []
    return [*overrides, *options.overrides]


def train_stage(options: Options, stage: int) -> int:
    """Train one stage under the deepspeed launcher; returns its exit status. Raises LaunchError if it wrote no
    export."""
    from jp_train.cluster.facts import device_count
    from jp_train.cluster.launch import launch
    from jp_train.cluster.options import LaunchOptions

    config = ROOT / "examples" / options.recipe / f"stage{stage}.yaml"
    code = launch(
        config,
        stage_overrides(options, stage),
        LaunchOptions(
            hostfile=options.hostfile,
            master_port=options.master_port,
            include="localhost:0" if options.hostfile == Options.hostfile and device_count() == 1 else "",
        ),
    )
    if code:
        say(f"stage {stage} ended with status {code}; run the same command again to resume it")
        return code
    if not (options.out / f"stage{stage}" / "export" / "config.json").is_file():
        raise LaunchError(f"stage {stage} ended with status 0 but wrote no export in {options.out / f'stage{stage}'}")
    return 0


def _evaluate(options: Options) -> int:
    from examples.smoke.judgement import judge

    judge(options.out, seed=options.seed, tiny=options.tiny)
    return 0


def _report(options: Options, title: str) -> int:
    from jp_train.tools.report import build_report

    build_report([options.out / f"stage{stage}" for stage in STAGES], options.out, title)
    return 0


@contextlib.contextmanager
def rebuilt(folder: Path) -> Iterator[Path]:
    """A fresh `folder` for one step: what an interrupted run left there is removed first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yield folder


def _clear(out: Path) -> None:
    """Remove an earlier run. Raises ConfigError for a folder that holds something else: `--out ~ --fresh` must not
    empty a home."""
    if not out.exists():
        return
    if any(out.iterdir()) and not (out / "steps" / "options.json").exists():
        raise ConfigError(f"{out} is not empty and was not made by this command; give another --out")
    say(f"starting afresh in {out}")
    shutil.rmtree(out)


def _mark(out: Path, name: str) -> Path:
    return out / "steps" / f"{name}.json"


def _write_mark(out: Path, name: str, seconds: float) -> None:
    mark = _mark(out, name)
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps({"step": name, "seconds": round(seconds, 1)}))


def _forget(out: Path, names: Sequence[str]) -> None:
    """Remove steps and what they wrote; what comes after them is not valid any more either."""
    for name in (*names, "evaluation", LAST):
        _mark(out, name).unlink(missing_ok=True)
    for name in names:
        shutil.rmtree(out / name, ignore_errors=True)


def _check_same_options(options: Options) -> None:
    """A folder begun with another seed or other sizes cannot be continued."""
    file = options.out / "steps" / "options.json"
    mine = {"seed": options.seed, "tiny": options.tiny, "overrides": list(options.overrides)}
    if options.recipe != "smoke":
        mine["recipe"] = options.recipe
    if file.exists():
        earlier = json.loads(file.read_text())
        if earlier != mine:
            raise ConfigError(
                f"{options.out} was begun with {earlier}, not {mine}; add --fresh to start over, or give another --out"
            )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(mine))


def say(text: str) -> None:
    """A line of progress on stderr."""
    print(f"smoke: {text}", file=sys.stderr, flush=True)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """What the smoke and the showcase run both take."""
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="start over even if an interrupted run could go on")
    parser.add_argument(
        "--tiny", action="store_true", help="a few steps of everything: tests the plumbing, learns nothing"
    )
    parser.add_argument(
        "--hostfile",
        type=Path,
        default=Options.hostfile,
        help="default hostfiles/local: this machine, two ranks (one on a single GPU)",
    )
    parser.add_argument("--master-port", type=int, default=29500)
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="override keys of all three stages")


def run_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of `Options` that `add_run_arguments` reads, and `out`."""
    return {
        "out": arguments.out,
        "seed": arguments.seed,
        "hostfile": arguments.hostfile,
        "overrides": tuple(arguments.overrides),
        "tiny": arguments.tiny,
        "master_port": arguments.master_port,
    }


def exit_status(run: Callable[[], int]) -> int:
    """The status of `run()`; the package's errors and Ctrl-C become one line and their status."""
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        return run()
    except JpTrainError as error:
        say(f"{type(error).__name__}: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        say("interrupted; run the same command again to go on")
        return 130


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m examples.smoke`."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.smoke",
        description="Train a tiny Janus-Pro through all three stages on real images and text, judge it, and write a "
        "report. 10 to 14 minutes on 2 cores.",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/smoke"), help="folder for everything the run makes (default runs/smoke)"
    )
    parser.add_argument(
        "--only-stage", type=int, choices=STAGES, help="only this stage, anew; what it needs is made first"
    )
    add_run_arguments(parser)
    arguments = parser.parse_args(argv)
    options = Options(**run_options(arguments))
    return exit_status(lambda: run_smoke(options, only_stage=arguments.only_stage, fresh=arguments.fresh))
