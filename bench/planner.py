"""How well and how fast the plan packs: fill, ratio error, milliseconds a step, bytes of state, time to the first row;
against targets.

    python bench/planner.py [--steps 40] [--rows 512] [--pool 32] [--json] [--save FILE]

Lengths are simulated: an understanding document is 579 tokens of image, BOS and markers, and a log-normal text (mean
200); a text is log-normal (mean 1000, up to 20000 tokens, so some span rows); a generation document is 580 tokens and a
log-normal caption (mean 80). Four sources a kind. No file is read. "x2": rows that close after 2 documents (stage 1),
which fills nothing.

Times are CPU times. `ms/step`: planning all rows of a step and making those of one of 128 ranks, as the loader does
(median, and the least, which is what a machine without other work takes); `all rows`: making every row, as a single
rank does. `first row`: from a constructed state of step 10, 1,000 and 100,000 to the first rows, least of several in
turns; flat is within 20 %. The exit status does not depend on the targets.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from jp_train.config.schema import DataConfig
from jp_train.data.plan import Plan, PlanSource
from jp_train.data.sequence import COLUMNS
from jp_train.types import KINDS, Kind

MIXTURES = {"1:0:3": (1, 0, 3), "2:3:5": (2, 3, 5), "5:1:4": (5, 1, 4), "1:0:1": (1, 0, 1), "7:3:10": (7, 3, 10)}
"""Understanding : text : generation, of Janus-Pro's stages 1 to 3 and Janus' stages 1 and 3."""
LEAST_FILL = {"1:0:3": 99.6, "2:3:5": 99.95, "5:1:4": 99.95}
"""Percent."""
MOST_RATIO_ERROR, MOST_MS, MOST_STATE_BYTES, MOST_SPREAD = 0.3, 10.0, 50_000, 1.2
"""Percentage points in the worst step; CPU milliseconds a step; bytes of JSON; slowest over fastest restore."""
RANKS = 128
RESTORED_STEPS = (10, 1_000, 100_000)


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


def make_plan(sources: list[PlanSource], name: str, rows: int, **settings: Any) -> Plan:
    return Plan(
        sources,
        seed=0,
        rows_per_step=rows,
        mixture=MIXTURES[name],
        **{"seq_len": 4096, "pool_size": DataConfig().pool_size, **settings},
    )


def measure(name: str, sources: list[PlanSource], *, steps: int, rows: int, **settings: Any) -> dict[str, Any]:
    """Plan `steps` steps of `rows` rows; figures over all of them, and which targets they meet."""
    plan = make_plan(sources, name, rows, **settings)
    rank_plan = make_plan(sources, name, rows, **settings)
    shares = np.array(MIXTURES[name]) / sum(MIXTURES[name])
    kinds = np.array([KINDS.index(source.kind) for source in sources])
    column = {field: number for number, field in enumerate(COLUMNS)}
    tokens = spans = documents = 0
    errors: list[float] = []
    rank_ms: list[float] = []
    for _ in range(steps):
        table, _ = plan.next_table()
        rank_ms.append(cpu_ms(lambda: (rank_plan.next_step(0, max(1, rows // RANKS)), rank_plan.state())))
        starts = table[:, column["start"]] == 0
        amounts = np.bincount(kinds[table[starts, column["source"]]], minlength=len(KINDS))
        tokens += int(table[:, column["length"]].sum())
        spans += len(table)
        documents += int(starts.sum())
        errors.append(100 * float(np.abs(amounts / amounts.sum() - shares).max()))
    every = [cpu_ms(plan.next_step) for _ in range(max(3, steps // 4))]
    fill = 100 * tokens / (steps * rows * plan.seq_len)
    figure: dict[str, Any] = {
        "mixture": name,
        "samples_per_row": plan.samples_per_row,
        "fill_percent": fill,
        "documents_per_row": documents / (steps * rows),
        "cuts_per_row": (spans - documents) / (steps * rows),
        "step_share_error_points_worst": max(errors),
        "step_share_error_points_median": float(np.median(errors)),
        "ms_per_step": float(np.median(rank_ms)),
        "ms_per_step_least": min(rank_ms),
        "ms_per_step_all_rows": float(np.median(every)),
        "ms_per_step_all_rows_least": min(every),
        "state_bytes": len(json.dumps(plan.state())),
    }
    figure["targets"] = {
        f"ratio error <= {MOST_RATIO_ERROR} points": max(errors) <= MOST_RATIO_ERROR,
        f"<= {MOST_MS:g} ms a step": figure["ms_per_step"] <= MOST_MS,
        f"state <= {MOST_STATE_BYTES} bytes": figure["state_bytes"] <= MOST_STATE_BYTES,
    }
    if name in LEAST_FILL and plan.samples_per_row is None:
        figure["targets"][f"fill >= {LEAST_FILL[name]} %"] = fill >= LEAST_FILL[name]
    return figure


def cpu_ms(action: Callable[[], object]) -> float:
    """CPU milliseconds of a call."""
    started = time.process_time()
    action()
    return 1000 * (time.process_time() - started)


def measure_restores(sources: list[PlanSource], *, rows: int, repeats: int = 15, **settings: Any) -> dict[str, Any]:
    """CPU milliseconds from the state of a step to its first rows, for RESTORED_STEPS: the plan itself exists, as in a
    trainer that resumes.

    The states are those of a run that reached the step: constructed, and planned on for 3 steps so that the pool is
    full.
    """
    plan = make_plan(sources, "2:3:5", rows, **settings)
    states = {}
    for step in RESTORED_STEPS:
        plan.restore(
            plan.state_at(step - 3, {source.name: (step - 3) * rows * 5 // len(sources) for source in sources})
        )
        for _ in range(3):
            plan.next_step(0, 0)
        assert plan.step == step
        states[step] = json.dumps(plan.state())
    times: dict[int, list[float]] = {step: [] for step in states}
    resumed = make_plan(sources, "2:3:5", rows, **settings)

    def first_row(state: str) -> None:
        resumed.restore(json.loads(state))
        resumed.next_step(0, 1)

    for _ in range(repeats):
        for step, state in states.items():
            times[step].append(cpu_ms(partial(first_row, state)))
    least = {step: min(values) for step, values in times.items()}
    spread = max(least.values()) / min(least.values())
    target = f"restores within {100 * (MOST_SPREAD - 1):.0f} %"
    return {
        "ms_to_first_row": {str(step): value for step, value in least.items()},
        "state_bytes": {str(step): len(state) for step, state in states.items()},
        "spread": spread,
        "targets": {
            target: spread <= MOST_SPREAD,
            f"state <= {MOST_STATE_BYTES} bytes": max(map(len, states.values())) <= MOST_STATE_BYTES,
        },
    }


def missed(targets: dict[str, bool]) -> str:
    return "pass" if all(targets.values()) else "FAIL: " + "; ".join(name for name, met in targets.items() if not met)


def main() -> None:
    from _figures import add_options, delivered

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument(
        "--pool", type=int, default=DataConfig().pool_size, help="data.pool_size (default: of the schema)"
    )
    add_options(parser)
    arguments = parser.parse_args()
    sources = simulated_sources()
    gc.collect()
    gc.freeze()  # torch's objects need no scan in every collection; a trainer does the same after start-up
    sizes = {"steps": arguments.steps, "rows": arguments.rows, "pool_size": arguments.pool}
    figures = [measure(name, sources, **sizes) for name in MIXTURES]
    figures.append(measure("1:0:3", sources, **sizes, samples_per_row=2))
    restores = measure_restores(sources, rows=arguments.rows, pool_size=arguments.pool)
    if delivered(arguments, {"rows_per_step": arguments.rows, **sizes, "mixtures": figures, "restores": restores}):
        return
    print(
        "mixture    fill %  documents/row  cuts/row  share error, points (worst, "
        "median)  ms/step (least)  all rows (least)  state bytes  targets"
    )
    for figure in figures:
        label = figure["mixture"] + (f" x{figure['samples_per_row']}" if figure["samples_per_row"] else "")
        print(
            f"{label:9}  {figure['fill_percent']:6.2f}  {figure['documents_per_row']:13.2f}  "
            f"{figure['cuts_per_row']:8.3f}  "
            f"{figure['step_share_error_points_worst']:26.2f}, {figure['step_share_error_points_median']:7.2f}  "
            f"{figure['ms_per_step']:7.1f} ({figure['ms_per_step_least']:5.1f})  "
            f"{figure['ms_per_step_all_rows']:8.1f} ({figure['ms_per_step_all_rows_least']:5.1f})  "
            f"{figure['state_bytes']:11d}  "
            f"{missed(figure['targets'])}"
        )
    times = ", ".join(f"step {int(step):,}: {value:.1f} ms" for step, value in restores["ms_to_first_row"].items())
    print(f"first row  {times}; slowest/fastest {restores['spread']:.2f}  {missed(restores['targets'])}")


if __name__ == "__main__":
    main()
