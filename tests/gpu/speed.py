"""Checks of the true 1B model that a clock decides: seconds a step, MFU, memory, and what the GPU waits for.

Judged only of the true model, against the forecast; with tiny models the same code runs and only losses are judged.
"""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile
from torch.utils._python_dispatch import TorchDispatchMode

from bench.forecast import live_tensors, synthetic_batch
from jp_train.config import RunConfig
from jp_train.tools.forecast.candidates import Candidate
from jp_train.train.trainer import Trainer
from jp_train.types import IGNORE_INDEX, PackedBatch
from tests.gpu.findings import Findings
from tests.gpu.scene import ROOT, Scene, rows_of, step

WARM_UP, TIMED = 2, {"tiny": 3, "1b": 8}
SLOWER = 1.3
"""Times the forecast's seconds that a step may take."""
MEMORY_ERROR = 0.10


@dataclass(frozen=True)
class Run:
    """Losses of all steps; medians of the timed ones, and memory at their peak (GiB)."""

    losses: list[float]
    step_s: float
    tokens_per_s: float
    mfu: float
    allocated_gib: float
    reserved_gib: float


def run_steps(trainer: Trainer, batches: Sequence[PackedBatch], timed: int) -> Run:
    """Steps on the same rows; the first ones are not timed."""
    values = [step(trainer, batches).values for _ in range(WARM_UP)]
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()  # the first step also proves the freeze
    values += [step(trainer, batches).values for _ in range(timed)]
    last = values[WARM_UP:]
    return Run(
        losses=[of["loss/total"] for of in values],
        step_s=median(of["time/step_s"] for of in last),
        tokens_per_s=median(of["perf/tokens_per_s"] for of in last),
        mfu=median(of["perf/mfu"] for of in last),
        allocated_gib=max(of["memory/peak_gib"] for of in last),
        reserved_gib=max(of.get("memory/reserved_gib", 0.0) for of in last),
    )


def beside_forecast(findings: Findings, scene: Scene, run: Run, forecast: Candidate) -> None:
    """Every figure with the forecast's; the losses of the same rows fall."""
    findings.equal("loss falls", run.losses[-1] < run.losses[0], True)
    findings.beside("losses", [run.losses[0], run.losses[-1]])
    findings.beside("tokens/s", run.tokens_per_s, forecast.time.tokens_per_second)
    findings.beside("MFU", run.mfu, forecast.time.mfu)
    findings.beside("bound by", None, forecast.time.bound)
    allocated = forecast.memory.total / 2**30
    reserved = allocated * (1 + scene.hardware.fragmentation) + scene.hardware.workspace_gib
    findings.beside("GiB reserved", run.reserved_gib, reserved)
    if scene.size == "1b":
        findings.at_most("seconds a step", run.step_s, SLOWER * forecast.time.overlapped)
        findings.near("GiB allocated", run.allocated_gib, allocated, MEMORY_ERROR)
    else:
        findings.beside("seconds a step", run.step_s, forecast.time.overlapped)


def stage(scene: Scene, findings: Findings, number: int) -> None:
    """Steps of a stage through `build_engine` and `train_step`."""
    cfg = scene.large(number)
    batches = rows_of(cfg)
    run = run_steps(scene.trainer(cfg), batches, TIMED[scene.size])
    beside_forecast(findings, scene, run, scene.forecast(cfg, batches))


def stage_1(scene: Scene, findings: Findings) -> None:
    """The true 1B stage 1 against the forecast."""
    stage(scene, findings, 1)


def stage_2(scene: Scene, findings: Findings) -> None:
    """The true 1B stage 2 against the forecast."""
    stage(scene, findings, 2)


def stage_3(scene: Scene, findings: Findings) -> None:
    """The true 1B stage 3 against the forecast."""
    stage(scene, findings, 3)


def profile(scene: Scene, findings: Findings) -> None:
    """How busy the device is over two steps, with what, and where the host waits for it."""
    cfg = scene.large(2)
    trainer, batches = scene.trainer(cfg), rows_of(cfg)
    for _ in range(WARM_UP):
        step(trainer, batches)
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * scene.on_gpu
    with torch_profile(activities=kinds) as recorded:
        seconds = sum(step(trainer, batches).values["time/step_s"] for _ in range(2))
    forecast = scene.forecast(cfg, batches).time
    working = sum(forecast.parts[name] for name in ("compute", "recompute", "update")) / forecast.overlapped
    busy_s, shares = busy_time(scene, recorded)
    findings.beside("busy share by the forecast", None, working)
    findings.at_least("busy share", busy_s / seconds, 0.8 * working if scene.size == "1b" else 0.01)
    findings.beside("shares of the busy time", shares)
    waits = Counter(event.name for event in recorded.events() or () if "Synchronize" in event.name)
    findings.beside("calls of two steps that wait", waits.most_common())
    with host_syncs(scene, trainer) as syncs:
        step(trainer, batches)
    inside = sum(count for where, count in syncs.items() if where.startswith(("forward", "backward")))
    # on a CPU the model looks at the lengths of a batch once
    findings.at_most("host syncs inside micro-batches", inside, 0 if scene.on_gpu else len(batches))
    findings.beside("host syncs of a step", syncs.most_common())


def busy_time(scene: Scene, recorded: torch_profile) -> tuple[float, list[tuple[str, float]]]:
    """Seconds in which the device did anything, and what took most of them, as shares."""
    wanted = DeviceType.CUDA if scene.on_gpu else DeviceType.CPU
    events = [e for e in recorded.events() or () if e.device_type == wanted and not e.is_user_annotation]
    taken: Counter[str] = Counter()
    for event in events:
        taken[event.name[:60]] += event.time_range.elapsed_us() if scene.on_gpu else event.self_cpu_time_total
    shares = [(name, us / sum(taken.values())) for name, us in taken.most_common(8)]
    return 1e-6 * covered((event.time_range.start, event.time_range.end) for event in events), shares


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


@contextmanager
def host_syncs(scene: Scene, trainer: Trainer) -> Iterator[Counter[str]]:
    """Counts, by the step's phase and place, what makes the host wait for the device: torch's own warnings on a GPU; on
    a CPU the operations that would (a value read, positions searched)."""
    found: Counter[str] = Counter()

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
                found[f"{trainer.engine.guard.phase}: {place()}"] += 1
            return func(*args, **(kwargs or {}))

    def warned(message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchroniz" in str(message):
            found[f"{trainer.engine.guard.phase}: {place()}"] += 1

    if not scene.on_gpu:
        with Reads():
            yield found
        return
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = warned
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


def place() -> str:
    """The innermost calls outside torch and these checks: `file:line function < file:line function ...`."""
    frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
    shown = [frame for frame in reversed(frames) if "/tests/gpu/" not in frame.filename][:3]
    return " < ".join(f"{frame.filename.removeprefix(f'{ROOT}/')[-60:]}:{frame.lineno} {frame.name}" for frame in shown)


def other_raw(raw: dict[str, Any]) -> Callable[[RunConfig, Trainer | None], None]:
    """A change of the DeepSpeed JSON before the engine is made."""

    def change(cfg: RunConfig, trainer: Trainer | None) -> None:
        if trainer is None:
            cfg.engine.deepspeed = raw

    return change


def other_fused(cfg: RunConfig, trainer: Trainer | None) -> None:
    """The other AdamW than shipped: fused on a GPU, a loop over tensors on a CPU."""
    if trainer is not None:
        for group in trainer.engine.deepspeed.optimizer.optimizer.param_groups:
            group["fused"] = not group["fused"]


VARIANTS: dict[str, Callable[[RunConfig, Trainer | None], None]] = {
    "as shipped": other_raw({}),
    "every module its own gather": other_raw({"zero_optimization": {"leaf_module": {"classes": []}}}),
    "throughput timer on": other_raw({"timers": {"throughput": {"enabled": True}}}),
    "fused AdamW the other way": other_fused,
}
"""One setting changed at a time."""


def toggles(scene: Scene, findings: Findings) -> None:
    """What leaves, the throughput timer and fused AdamW are worth; none changes a loss beyond rounding."""
    runs = {}
    for name, change in VARIANTS.items():
        cfg = scene.large(2)
        change(cfg, None)
        runs[name] = changed_run(scene, cfg, change)
    shipped = runs.pop("as shipped")
    findings.beside("as shipped: seconds a step", shipped.step_s)
    for name, run in runs.items():
        findings.beside(f"{name}: times the seconds", run.step_s / shipped.step_s, ">= 1")
        findings.near(f"{name}: last loss", run.losses[-1], shipped.losses[-1], 1e-2 if scene.on_gpu else 1e-5)
    held = memory_held(scene)
    scene.release()
    findings.at_most("share of an engine's memory left by four", memory_held(scene) / held, 0.1)


def memory_held(scene: Scene) -> int:
    """Bytes of tensors on the device."""
    return torch.cuda.memory_allocated() if scene.on_gpu else live_tensors()


def changed_run(scene: Scene, cfg: RunConfig, change: Callable[[RunConfig, Trainer | None], None]) -> Run:
    """Half as many timed steps; the engine is gone when this returns."""
    torch.manual_seed(0)
    trainer = scene.trainer(cfg)
    change(cfg, trainer)
    return run_steps(trainer, rows_of(cfg), TIMED[scene.size] // 2 + 1)


def padded(batch: PackedBatch) -> PackedBatch:
    """The same documents, each with unsupervised tokens behind it up to the longest: what a batch of rows computes
    that is padded and not packed. Causal attention keeps them from what stands before."""
    lengths = batch.document_lengths
    longest = int(lengths.max())
    places = torch.cat([torch.arange(n) + i * longest for i, n in enumerate(lengths.tolist())])

    def spread(values: torch.Tensor, fill: int) -> torch.Tensor:
        return torch.full((len(lengths) * longest,), fill, dtype=values.dtype).index_copy(0, places, values)

    return replace(
        batch,
        input_ids=spread(batch.input_ids, 0),
        position_ids=torch.arange(longest).repeat(len(lengths)),
        labels=spread(batch.labels, IGNORE_INDEX),
        gen_labels=spread(batch.gen_labels, IGNORE_INDEX),
        cu_seqlens=torch.arange(0, (len(lengths) + 1) * longest, longest, dtype=torch.int32),
        max_seqlen=longest,
        und_slots=places[batch.und_slots],
        gen_slots=places[batch.gen_slots],
        document_lengths=torch.full_like(lengths, longest),
        text_positions=None,
        image_positions=None,
    )


def packed_and_padded(scene: Scene, findings: Findings) -> None:
    """The same documents packed and padded to the longest: equal losses, and what padding costs."""
    cfg = scene.large(2)
    cfg.engine.micro_batch_rows, cfg.stage.batch_size = 1, 2
    batches = [synthetic_batch(cfg, 1) for _ in range(2)]
    wide = [padded(batch) for batch in batches]
    trainer = scene.trainer(cfg)
    cfg.optimizer.lr = 0.0  # both see the same weights
    seconds, losses, forecasts = [], [], []
    for of in (batches, wide):
        run = run_steps(trainer, of, TIMED[scene.size] // 2 + 1)
        seconds.append(run.step_s)
        losses.append(run.losses[-1])
        forecasts.append(scene.forecast(cfg, of).time.overlapped)
    findings.near("loss of the padded rows", losses[1], losses[0], 1e-2 if scene.on_gpu else 1e-5)
    tokens = [sum(len(batch.input_ids) for batch in of) for of in (batches, wide)]
    findings.at_least("padded tokens of a packed one", tokens[1] / tokens[0], 1.05)
    findings.beside("times the seconds of packed rows", seconds[1] / seconds[0], forecasts[1] / forecasts[0])
