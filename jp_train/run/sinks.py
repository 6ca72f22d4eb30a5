"""Where a run's numbers go: console, metrics.jsonl, wandb, TensorBoard, and the two small files `status.json` and
`events.jsonl`.

To add a place, write a class with the four members of `Sink` and name it in `SINKS`. Only rank 0 has sinks. wandb and
TensorBoard are imported only when they are used.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from jp_train.config.schema import RunConfig
from jp_train.errors import ConfigError
from jp_train.files import Appender, json_safe, lines_until, write_atomically
from jp_train.run.wandb_sink import Wandb
from jp_train.terminal import duration, folded, measured, short_number, terminal_columns
from jp_train.types import KINDS, Kind

SHORT = {Kind.UNDERSTANDING: "und", Kind.TEXT: "text", Kind.GENERATION: "gen"}

MAX_EVENTS_WAITING = 10_000

LINE_COLUMNS = 100
"""Most characters of a console line about a step."""
SHOWN_WAIT_SHARE = 0.1
"""From this share of the step time on, the console says how long the steps waited for data."""

RATE_SMOOTHING = 0.1
"""Weight of the newest step in the step time that the ETA is made of."""


class Sink(Protocol):
    """Takes the values of one step; `values` uses the metrics.jsonl keys. When one that is not `essential` fails,
    training goes on without it. What `log` and `close` return is trouble that the user has to know about."""

    essential: bool

    def log(self, step: int, values: Mapping[str, float]) -> str | None: ...

    def close(self) -> str | None: ...


class OpenedSink(Sink, Protocol):
    """A sink that the configuration opens."""

    @classmethod
    def opened(cls, cfg: RunConfig, resumed_step: int | None) -> Sink | None:
        """The sink for a run that continues after `resumed_step` steps (None: a new run); None: not configured."""


class MetricsFile:
    """metrics.jsonl: one JSON object a step, appended.

    Opening it for a run that continues after `resumed_step` steps drops the lines of later steps (they are trained
    again) and a torn last line, in one atomic replacement, so that the file holds every step once. A run that starts
    anew passes None, and the file starts empty.
    """

    essential = True

    def __init__(self, path: Path, resumed_step: int | None) -> None:
        if path.exists():
            write_atomically(path, "".join(lines_until(path, resumed_step)))
        self._file = Appender(path)

    @classmethod
    def opened(cls, cfg: RunConfig, resumed_step: int | None) -> MetricsFile:
        return cls(Path(cfg.run_dir) / "metrics.jsonl", resumed_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(json.dumps(json_safe({"step": step, **values}), allow_nan=False) + "\n")

    def close(self) -> None:
        self._file.close()


class Events:
    """events.jsonl: what happened to the run, one object a line with `event`, `step` and `time` (seconds since
    1970)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: list[str] = []
        if path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size:
            # a kill in the middle of a line: the next event gets its own
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")

    def write(self, event: str, step: int, **details: Any) -> None:
        record = {"event": event, "step": step, "time": round(time.time(), 3), **details}
        self._waiting.append(json.dumps(json_safe(record), ensure_ascii=False) + "\n")
        try:
            with self._path.open("ab", buffering=0) as file:
                size = file.tell()
                while self._waiting:
                    line = self._waiting[0].encode()
                    if file.write(line) < len(line):
                        # the disk is full inside the line: it is written whole when there is room again
                        file.truncate(size)
                        return
                    size += len(line)
                    del self._waiting[0]
                os.fsync(file.fileno())
        except OSError:
            if len(self._waiting) > MAX_EVENTS_WAITING:
                raise


class StatusFile:
    """status.json: one small object, replaced whole after every step. `update` keeps the values of earlier calls."""

    def __init__(self, path: Path, **constants: Any) -> None:
        self._path = path
        self._values: dict[str, Any] = {"state": "starting", **constants}
        self.update()

    def update(self, **values: Any) -> None:
        self._values.update(values, updated=round(time.time(), 3))
        with contextlib.suppress(OSError):  # a full disk: the next step tries again, and a stale one harms nobody
            write_atomically(self._path, json.dumps(json_safe(self._values)) + "\n", durable=False)


class Progress:
    """Steps done of steps planned, and the time to the end from a smoothed step time (without the first step, which
    warms up)."""

    def __init__(self, planned: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.planned = planned
        self._clock = clock
        self._last: float | None = None
        self._step_s: float | None = None

    def tick(self) -> None:
        """Call once after every step (validation and saves in between count: the ETA is about the wall clock)."""
        now = self._clock()
        if self._last is not None:
            took = now - self._last
            self._step_s = took if self._step_s is None else (1 - RATE_SMOOTHING) * self._step_s + RATE_SMOOTHING * took
        self._last = now

    def eta_s(self, step: int) -> float | None:
        """Seconds to the planned end, None before two steps were seen."""
        return None if self._step_s is None else max(0, self.planned - step) * self._step_s


class Console:
    """A line of at most LINE_COLUMNS on stderr every `every_steps` steps, after the first and the last step, and after
    a validation. On a narrower terminal it is folded between its fields.

    Losses, norm and speed are means since the line before, over the steps where they are finite. The loss of a kind is
    weighted by `loss_tokens`, so that it stands in the line whichever kinds the last step had.
    """

    essential = True

    def __init__(self, every_steps: int, progress: Progress, stream: TextIO | None = None) -> None:
        self._every = every_steps
        self._progress = progress
        self._stream = stream
        self._first = True
        self._sums: dict[str, tuple[float, float]] = {}
        """{metrics key: (sum of value x weight, sum of weights)} since the last line."""
        self.loss_tokens: Mapping[Kind, float] = {}
        """Supervised tokens of each kind in the step that is logged next; a kind that is left out weighs 1."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if "loss/total" in values:
            self._add(values)
            if self._first or step % self._every == 0 or step >= self._progress.planned:
                self._first = False
                self.say(self._line(step, values["optim/lr"]))
                self._sums.clear()
        if "val/total" in values:
            held_out = {"total": values["val/total"]} | _by_kind("val", values)
            self.say(f"{self._head(step)}  held out  " + _named(held_out, "{:.4f}".format))

    def say(self, text: str) -> None:
        """A line of its own."""
        stream = self._stream or sys.stderr
        print(folded(text, terminal_columns(stream)), file=stream, flush=True)

    def close(self) -> None:
        pass

    def _head(self, step: int) -> str:
        return f"step {step:>{len(str(self._progress.planned))}}/{self._progress.planned}"

    def _add(self, values: Mapping[str, float]) -> None:
        weights = {f"loss/{kind}": tokens for kind, tokens in self.loss_tokens.items()}
        weights["perf/tokens_per_s"] = values["time/step_s"]
        for key, value in values.items():
            total, weight = self._sums.get(key, (0.0, 0.0))
            more = weights.get(key, 1.0)
            if math.isfinite(value):
                self._sums[key] = total + value * more, weight + more

    def _line(self, step: int, lr: float) -> str:
        """The fields that every line has, and of the others, the most useful first, as many as there is room for."""
        means: dict[str, float] = defaultdict(lambda: math.nan)
        means |= {key: total / weight for key, (total, weight) in self._sums.items() if weight}
        wait_share = means["time/data_wait_s"] / means["time/step_s"]
        skipped = self._sums["data/skipped"][0] if "data/skipped" in self._sums else 0
        kinds = _named(_by_kind("loss", means), measured)
        eta = self._progress.eta_s(step)
        fields = {
            "head": self._head(step),
            "loss": f"loss {measured(means['loss/total'])}" + (f" ({kinds})" if kinds else ""),
            "lr": f"lr {short_number(lr)}",
            "norm": f"norm {means['optim/grad_norm']:.2f}",
            "speed": f"{short_number(means['perf/tokens_per_s'])} tok/s",
            "wait": f"wait {wait_share:.0%}" if wait_share >= SHOWN_WAIT_SHARE else "",
            "skipped": f"skipped {skipped:.0f}" if skipped else "",
            "eta": "" if step >= self._progress.planned else f"ETA {'--' if eta is None else duration(eta)}",
        }
        room = LINE_COLUMNS - len(f"{fields['head']}  {fields['loss']}  ETA 12 min 34 s")
        shown = {"head", "loss", "eta"}
        for name in ("wait", "skipped", "speed", "norm", "lr"):
            if fields[name] and (room := room - len(fields[name]) - 2) >= 0:
                shown.add(name)
        return "  ".join(text for name, text in fields.items() if name in shown and text)


def _by_kind(prefix: str, values: Mapping[str, float]) -> dict[str, float]:
    return {SHORT[kind]: values[f"{prefix}/{kind}"] for kind in KINDS if f"{prefix}/{kind}" in values}


def _named(values: Mapping[str, float], text: Callable[[float], str]) -> str:
    return " ".join(f"{name} {text(value)}" for name, value in values.items())


class TensorBoard:
    """TensorBoard scalars in `RUN/tensorboard/`. Raises ConfigError when the package is missing."""

    essential = False

    def __init__(self, folder: Path, resumed_step: int | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                f"logging.tensorboard is true but TensorBoard cannot be imported ({error}); pip install tensorboard, "
                "or set it to false"
            ) from None
        purge = None if resumed_step is None else resumed_step + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge)

    @classmethod
    def opened(cls, cfg: RunConfig, resumed_step: int | None) -> TensorBoard | None:
        return cls(Path(cfg.run_dir) / "tensorboard", resumed_step) if cfg.logging.tensorboard else None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


SINKS: tuple[type[OpenedSink], ...] = (MetricsFile, TensorBoard, Wandb)
"""What a run opens, beside the console, in this order."""
