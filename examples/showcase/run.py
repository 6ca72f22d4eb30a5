"""`make showcase`: the smoke run's code with another recipe, emoji in three drawing styles and WordNet's glosses.

Downloads once into `.cache/showcase` (npm and Debian packages, see `showcase_sources`), then shards, tokenizer,
pretrained parts, the three stages of `examples/showcase/stage*.yaml`, judgement and report, with the same marks and
resume as `make smoke`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from examples.showcase.shards import ShowcaseCounts, build_showcase_shards, link_pretraining_sources
from examples.showcase.sources import download
from examples.smoke.run import (
    ROOT,
    Options,
    Step,
    add_run_arguments,
    all_steps,
    exit_status,
    rebuilt,
    run_options,
    run_steps,
    say,
)
from examples.smoke.sizes import SmokeSizes

PARTS_FACTOR = {"vq": 2.5, "vision": 2.0, "text": 3.0}
"""The pretraining of each part takes this many times the smoke run's steps: emoji have more to draw than scenes,
WordNet more to read."""
EXPECTED_S = {
    "data": 90,
    "tokenizer": 30,
    "parts": 450,
    "stage1": 150,
    "stage2": 600,
    "stage3": 520,
    "evaluation": 120,
    "report": 10,
}
"""Estimated, not measured: smoke's times, scaled; the stages as the comments of `examples/showcase/stage*.yaml`
reckon."""


@dataclass(frozen=True, kw_only=True)
class ShowcaseOptions(Options):
    """Options of the smoke run, and where downloads are kept."""

    recipe: str = "showcase"
    cache: Path = ROOT / ".cache" / "showcase"

    @property
    def counts(self) -> ShowcaseCounts:
        if self.tiny:
            return ShowcaseCounts(
                names=12, held_out_names=4, held_out_drawings=3, documents=600, conversations=60, held_out_texts=40
            )
        return ShowcaseCounts()

    @property
    def sizes(self) -> SmokeSizes:
        """The smoke run's, with more steps for every part."""
        sizes = SmokeSizes.minute() if self.tiny else SmokeSizes()
        if self.tiny:
            return sizes
        longer = {
            part: replace(getattr(sizes, part), steps=round(getattr(sizes, part).steps * by))
            for part, by in PARTS_FACTOR.items()
        }
        return replace(sizes, **longer)


def run_showcase(options: ShowcaseOptions, *, only_data: bool = False, fresh: bool = False) -> int:
    """Run all steps, or those that make the data, and print the summary. Returns the exit status."""
    steps = _steps(options)
    if only_data:
        steps = steps[: [name for name, _ in steps].index("data") + 1]
    started = time.monotonic()
    code = run_steps(options, steps, EXPECTED_S, fresh=fresh)
    if code == 0 and not only_data:
        from examples.smoke.summary import format_summary

        print(format_summary(options.out, seconds=time.monotonic() - started))
    return code


def _steps(options: ShowcaseOptions) -> list[Step]:
    return all_steps(
        options,
        data=_build_data,
        parts=_build_parts,
        evaluate=_evaluate,
        title="jp_train showcase: emoji in three styles, three stages",
    )


def _build_data(options: ShowcaseOptions) -> int:
    from examples.showcase.judgement import contact_sheet

    options.cache.mkdir(parents=True, exist_ok=True)
    download(options.cache)
    with rebuilt(options.out / "data") as folder:
        built = build_showcase_shards(folder, options.cache, options.seed, options.counts)
    say(f"  {sum(built.samples.values())} samples of {len(built.samples)} sources")
    say(f"  a look at it: {contact_sheet(options.out / 'data', options.out / 'data.png')}")
    return 0


def _build_parts(options: ShowcaseOptions) -> int:
    from examples.smoke.pretrain import pretrain_all

    with rebuilt(options.out / "parts-data") as linked, rebuilt(options.out / "init") as folder:
        link_pretraining_sources(options.out / "data", linked)
        pretrain_all(folder, linked, options.out / "tokenizer", options.sizes, options.seed)
    return 0


def _evaluate(options: ShowcaseOptions) -> int:
    from examples.showcase.judgement import judge_showcase

    judge_showcase(options.out, seed=options.seed, tiny=options.tiny)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m examples.showcase`."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.showcase",
        description="Train a tiny Janus-Pro on emoji in three drawing styles and WordNet, judge it, "
        "and write a report. About 40 minutes on 2 cores.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/showcase"),
        help="folder for everything the run makes (default runs/showcase)",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=ShowcaseOptions.cache,
        help="folder that keeps the downloads (--fresh keeps it too)",
    )
    parser.add_argument("--only-data", action="store_true", help="download and write the shards, train nothing")
    add_run_arguments(parser)
    arguments = parser.parse_args(argv)
    options = ShowcaseOptions(cache=arguments.cache, **run_options(arguments))
    return exit_status(lambda: run_showcase(options, only_data=arguments.only_data, fresh=arguments.fresh))
