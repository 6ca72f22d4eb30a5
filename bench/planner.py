"""How well and how fast the plan packs: fill, ratio error, milliseconds a step and bytes of state, per mixture of the paper.

    python bench/planner.py [--steps 40] [--rows 512] [--json]

Lengths are simulated: an understanding document is 579 tokens of image, BOS and markers, and a log-normal text (mean 200); a text is
log-normal (mean 1000, up to 20000 tokens, so some span rows); a generation document is 580 tokens and a log-normal caption (mean 80). Four
sources a kind. No file is read. "x2": rows that close after 2 documents (stage 1), which fills nothing. Times are CPU times.
"""

from __future__ import annotations

import argparse
import gc
import json
import time

import numpy as np

from jp_train.data.mixture import realised_shares
from jp_train.data.plan import Plan, PlanSource
from jp_train.types import KINDS, Kind

MIXTURES = {"1:0:3": (1, 0, 3), "2:3:5": (2, 3, 5), "5:1:4": (5, 1, 4), "1:0:1": (1, 0, 1), "7:3:10": (7, 3, 10)}
"""Understanding : text : generation, of Janus-Pro's stages 1 to 3 and Janus' stages 1 and 3."""


def simulated_sources(samples: int = 20_000, per_kind: int = 4) -> list[PlanSource]:
    """`per_kind` sources of each kind with `samples` simulated lengths each."""
    sources = []
    for number, (kind, fixed, mean, sigma) in enumerate(
        ((Kind.UNDERSTANDING, 579, 200, 0.6), (Kind.TEXT, 2, 1000, 1.0), (Kind.GENERATION, 580, 80, 0.8))
    ):
        for index in range(per_kind):
            generator = np.random.default_rng([number, index])
            words = generator.lognormal(np.log(mean) - sigma**2 / 2, sigma, samples)
            tokens = (fixed + np.clip(words, 3, 20_000)).astype(np.int32)
            sources.append(PlanSource(name=f"{kind}{index}", kind=kind, tokens=tokens, cuttable=kind is Kind.TEXT))
    return sources


def measure(name: str, *, steps: int, rows: int, **settings) -> dict[str, float | int | str | None]:
    """Plan `steps` steps of `rows` rows; figures over all of them."""
    shares = MIXTURES[name]
    sources = simulated_sources()
    plan = Plan(sources, seed=0, rows_per_step=rows, mixture=shares, **{"seq_len": 4096, "pool_size": 64, **settings})
    tokens = spans = documents = 0
    errors, seconds = [], []
    for _ in range(steps):
        started = time.process_time()
        step = plan.next_step()
        seconds.append(time.process_time() - started)
        tokens += sum(document.length for row in step for document in row.documents)
        spans += sum(len(row.documents) for row in step)
        documents += sum(document.start == 0 for row in step for document in row.documents)
        realised = realised_shares(step, sources, tokens=settings.get("ratio_unit") == "tokens")
        errors.append(max(abs(realised[kind] - share / sum(shares)) for kind, share in zip(KINDS, shares, strict=True)))
    return {
        "mixture": name,
        "samples_per_row": plan.samples_per_row,
        "fill_percent": 100 * tokens / (steps * rows * plan.seq_len),
        "documents_per_row": documents / (steps * rows),
        "cuts_per_row": (spans - documents) / (steps * rows),
        "step_share_error_points_worst": 100 * max(errors),
        "step_share_error_points_median": 100 * float(np.median(errors)),
        "ms_per_step": 1000 * float(np.mean(seconds)),
        "state_bytes": len(json.dumps(plan.state())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args()
    gc.collect()
    gc.freeze()  # torch's objects need no scan in every collection; a trainer does the same after start-up
    figures = [measure(name, steps=arguments.steps, rows=arguments.rows) for name in MIXTURES]
    figures.append(measure("1:0:3", steps=arguments.steps, rows=arguments.rows, samples_per_row=2))
    if arguments.json:
        print(json.dumps({"rows_per_step": arguments.rows, "steps": arguments.steps, "mixtures": figures}))
        return
    print("mixture     fill %  documents/row  cuts/row  share error, points (worst, median)  ms/step  state bytes")
    for figure in figures:
        label = figure["mixture"] + (f" x{figure['samples_per_row']}" if figure["samples_per_row"] else "")
        print(
            f"{label:10}  {figure['fill_percent']:6.2f}  {figure['documents_per_row']:13.2f}  {figure['cuts_per_row']:8.3f}  "
            f"{figure['step_share_error_points_worst']:25.2f}, {figure['step_share_error_points_median']:6.2f}  "
            f"{figure['ms_per_step']:7.1f}  {figure['state_bytes']:11d}"
        )


if __name__ == "__main__":
    main()
