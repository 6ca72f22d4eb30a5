"""Run folders that look like those of a real training, written from a seed: for the tests, and to look at the page
while changing it.

python tests/run/synthetic_run.py OUT       writes OUT/stage1 .. stage3, OUT/run_a, OUT/run_b and their reports
"""

from __future__ import annotations

import json
import math
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np

START = datetime(2025, 11, 20, 8, 0, tzinfo=timezone.utc)
MIXTURES = {"stage1": (1, 0, 3), "stage2": (2, 3, 5), "stage3": (5, 1, 4)}
TRAINABLE = {
    "stage1": ["aligner", "gen_embed", "gen_aligner", "gen_head"],
    "stage2": ["aligner", "language_model", "gen_embed", "gen_aligner", "gen_head"],
    "stage3": ["vision_model", "aligner", "language_model", "gen_embed", "gen_aligner", "gen_head"],
}
SOURCES = {
    "und_digits": "understanding",
    "und_scenes": "understanding",
    "text_topics": "text",
    "gen_digits": "generation",
    "gen_scenes": "generation",
}
EARLY = "stage.early_stop.at_step {} of 720 training steps"
KINDS = ("understanding", "text", "generation")
LEVELS = {"understanding": (4.6, 0.9), "text": (6.8, 3.1), "generation": (6.2, 3.4)}


def write_run(folder: Path, *, stage: str = "stage2", steps: int = 400, planned: int | None = None,
              schedule: int | None = None, seed: int = 0,
              speed: float = 1.0, state: str = "done", evaluation: bool = False, pictures: bool = False,
              killed_at: int | None = None) -> Path:  # fmt: skip
    """One run folder, as `run/log.py` and `run/sinks.py` write it. `killed_at`: the run was killed there with half a
    line written, and resumed from the checkpoint before it."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    planned = planned or steps
    shares = np.array(MIXTURES[stage]) / sum(MIXTURES[stage])
    _write_config(folder, stage, planned, schedule or planned)
    every = max(1, steps // 4)
    events: list[dict[str, Any]] = [_event(0, "start", 0, world_size=2, git_commit="3f2c1ab")]
    lines: list[str] = [json.dumps({"step": 0} | _validation(_metrics(0, steps, stage, shares, random, speed))) + "\n"]
    for step in range(1, steps + 1):
        record = _metrics(step, steps, stage, shares, random, speed)
        if step % every == 0:
            record |= _validation(record)
        lines.append(json.dumps(record) + "\n")
        if step % every == 0:
            events.append(_event(step, "save", step, path=f"checkpoints/step_{step:07d}", seconds=1.7))
            (folder / "checkpoints" / f"step_{step:07d}").mkdir(parents=True)
        if killed_at == step:
            resumed = step // every * every
            lines[-1] = lines[-1][:60]
            lines += [
                json.dumps(_metrics(s, steps, stage, shares, random, speed)) + "\n"
                for s in range(resumed + 1, step + 1)
            ]
            events.append(_event(step, "resume", resumed, checkpoint=f"step_{resumed:07d}", world_size=2))
    if stage == "stage2":
        events.append(
            _event(steps * 0.6, "spike", int(steps * 0.6), loss=9.31, policy="skip", rows="explain/step_240.json")
        )
    if state == "stopped_early":
        events.append(_event(steps, "stopped_early", steps, reason=EARLY.format(steps), state=state, exit_code=0))
    elif state != "running":
        events.append(_event(steps, "stop", steps, reason="all training steps done", state=state, exit_code=0))
    events.sort(key=lambda event: event["time"])
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    status = {"state": state, "step": steps, "stage": stage, "planned_steps": planned,
              "training_steps": schedule or planned, "dp_world_size": 2, "updated": _at(steps),
              "checkpoint": {"step": steps // every * every, "time": _at(steps // every * every)}, "loss": 2.9,
              "losses": {"understanding": 1.0, "text": 3.2}, "step_s": 1.9, "data_wait_s": 0.02,
              "tokens_per_s": 4350.0, "skipped_documents": 3,
              "skipped_steps": 0, "eta_s": (planned - steps) * 1.9}  # fmt: skip
    if state != "running":
        status["reason"] = EARLY.format(steps) if state == "stopped_early" else "all training steps done"
    (folder / "status.json").write_text(json.dumps(status))
    (folder / "ledger.jsonl").write_text(
        "".join(json.dumps(entry) + "\n" for entry in _ledger(steps)) if stage == "stage2" else ""
    )
    if pictures:
        _write_pictures(folder / "samples", random)
    if evaluation:
        (folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    return folder


EVALUATION = [
    {
        "name": "Generated digits, judged",
        "value": 0.74,
        "chance": 0.1,
        "ceiling": 0.93,
        "target": 0.6,
        "note": "judge's own accuracy 0.98; CFG 1.5",
    },
    {"name": "Held-out digits named", "value": 0.88, "chance": 0.1, "target": 0.8},
    {"name": "Scenes: single object", "value": 0.61, "chance": 0.04, "ceiling": 0.84, "target": 0.4},
    {
        "name": "Scenes: colours",
        "value": 0.29,
        "chance": 0.11,
        "ceiling": 0.84,
        "target": 0.4,
        "note": "short by 0.11: too few steps",
    },
    {"name": "Scenes: counting", "value": 0.33, "chance": 0.2},
]


def _at(step: float) -> float:
    return round((START + timedelta(seconds=1.9 * step)).timestamp(), 3)


def _event(at: float, event: str, step: int, **more: Any) -> dict[str, Any]:
    return {"time": _at(at), "event": event, "step": step, **more}


def _write_config(folder: Path, stage: str, planned: int, schedule: int) -> None:
    und, text, gen = MIXTURES[stage]
    early = f"\n    at_step: {planned}" if schedule != planned else " {}"
    (folder / "config.yaml").write_text(
        f"preset: tiny/{stage}\nrun_dir: {folder}\nseed: 0\nprecision: fp32\nmodel:\n  name: "
        f"janus_pro\nstage:\n  name: {stage}\n  template: {stage}\n"
        f"  trainable: [{', '.join(TRAINABLE[stage])}]\n  training_steps: {schedule}\n  early_stop:{early}\n  "
        "batch_size: 16\n"
        f"  mixture:\n    understanding: {und}\n    text: {text}\n    generation: {gen}\n  ratio_unit: samples\n"
        f"data:\n  seq_len: 512\noptimizer:\n  lr: 0.001\n  clip: 1.0\nvalidation:\n  sources:\n"
        "    held_digits: {kind: understanding, shards: digits_val.tar}\n"
    )


def _metrics(
    step: int, steps: int, stage: str, shares: np.ndarray, random: np.random.Generator, speed: float
) -> dict[str, float]:
    progress = 1 - math.exp(-4 * step / steps)
    losses = {k: LEVELS[k][0] + (LEVELS[k][1] - LEVELS[k][0]) * progress + random.normal(0, 0.12) for k in KINDS}
    if stage == "stage2" and step == int(steps * 0.6):
        losses["text"] += 4.5
    noise = random.normal(0, 0.006, 3) * (shares > 0)
    mixture = shares + noise - noise.mean() * (shares > 0)
    tokens = 16 * 512 * (1 - abs(random.normal(0, 0.0009)))
    wait = abs(random.normal(0.02, 0.015)) + (0.4 if step == 1 else 0)
    seconds = (1.85 + abs(random.normal(0, 0.05)) + (6 if step == 1 else 0)) / speed
    record: dict[str, float] = {
        "step": step,
        "loss/total": float(sum(losses[k] * s for k, s in zip(KINDS, shares, strict=True))),
    }
    for kind, share, mixed in zip(KINDS, shares, mixture, strict=True):
        if share > 0:
            record |= {f"loss/{kind}": losses[kind], f"tokens/{kind}": round(tokens * mixed)}
        record[f"mixture/{kind}"] = float(mixed)
    for i, (name, kind) in enumerate(SOURCES.items()):
        if f"loss/{kind}" in record:
            record[f"loss/source/{name}"] = losses[kind] + 0.25 * (i % 2) + random.normal(0, 0.08)
    return record | {
        "tokens/total": round(tokens), "packing/fill": tokens / (16 * 512), "packing/truncated_tokens": 0,
        "data/skipped": int(step % 97 == 0),
        "time/step_s": seconds, "time/data_wait_s": wait, "perf/tokens_per_s": tokens / seconds,
        "perf/mfu": 0.31 * speed,
        "optim/lr": 1e-3 * min(1, step / 20), "optim/grad_norm": abs(random.lognormal(-0.2, 0.35)),
        "memory/peak_gib": 1.42,
    }  # fmt: skip


def _validation(record: dict[str, float]) -> dict[str, float]:
    losses = {f"val/{k}": record[f"loss/{k}"] + 0.1 for k in KINDS if f"loss/{k}" in record}
    return losses | {"val/total": sum(losses.values()) / len(losses), "val/held_digits": losses["val/understanding"]}


def _ledger(steps: int) -> list[dict[str, Any]]:
    reasons = ["cannot identify image file", "caption is empty", "image file is truncated (12 bytes not processed)"]
    return [
        {"time": _at(i), "step": i * steps // 70, "source": "gen_scenes" if i % 3 else "und_digits",
         "shard": f"scenes-{i % 4:06d}.tar", "key": f"{i:08d}", "reason": reasons[i % 3]}
        for i in range(62)
    ]  # fmt: skip


def _write_pictures(folder: Path, random: np.random.Generator) -> None:
    from PIL import Image, ImageDraw

    folder.mkdir()
    for name, columns, cell in (("digits", 10, 56), ("scenes", 6, 64)):
        grid = Image.new("RGB", (columns * cell, 3 * cell), "white")
        draw = ImageDraw.Draw(grid)
        for i in range(columns * 3):
            x, y = i % columns * cell, i // columns * cell
            color = tuple(int(c) for c in random.integers(20, 235, 3))
            inset = int(random.integers(6, 18))
            draw.ellipse((x + inset, y + inset, x + cell - inset, y + cell - inset), fill=color)
        grid.save(folder / f"{name}.png")
        caption = {
            "title": f"Generated {name}",
            "text": 'Rows: CFG 1, 1.5, 3.\nPrompts: a handwritten digit <0> ... "9" & so on.',
        }
        (folder / f"{name}.json").write_text(json.dumps(caption))


if __name__ == "__main__":
    import sys

    from jp_train.tools.report.page import build_report

    out = Path(sys.argv[1])
    stages = [
        write_run(out / "stage1", stage="stage1", steps=200, seed=1),
        write_run(
            out / "stage2", stage="stage2", steps=540, schedule=720, seed=2, state="stopped_early", killed_at=317
        ),
        write_run(out / "stage3", stage="stage3", steps=300, seed=3, evaluation=True, pictures=True),
    ]
    print(build_report(stages))
    runs = [write_run(out / "run_a", steps=900, planned=2000, seed=4, state="running", pictures=True, killed_at=500),
            write_run(out / "run_b", steps=2000, seed=5, speed=1.3, evaluation=True)]  # fmt: skip
    print(build_report(runs, out / "compared"))
    print(build_report(runs[:1]))
