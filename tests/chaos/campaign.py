"""A campaign: runs that are disturbed again and again, each compared at its end with a run that nobody touched.

A run is a series of lives. Before or during each life one fault is injected; then the same command starts again, until
the run is finished. What must hold:

- every life ends within its time, with the exit status that the fault calls for, and the cause is named where there is
  one to name;
- a life resumes from the newest complete checkpoint: no step is lost beyond it, none at all where the life ended with a
  save;
- at the end every step is in metrics.jsonl once, made of the same rows as in the undisturbed run; losses, gradient
  norms, rates and held-out losses are bit-equal if the world size never changed, else within 1e-3 relative; the ledger
  names the same samples;
- no process is left behind.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.chaos_world import ROWS, World
from tests.chaos.faults import (
    FAULTS,
    Fault,
    change_the_world_size,
    crash_after_a_non_finite_step,
    prepare_non_finite_step,
)
from tests.chaos.scene import BEGINS, Expectation, HungError, MissedError, Scene
from tests.distributed import Nursery

WORLD_SIZE = 2
LIFE_S = 150.0
GRACE_S = 90.0
"""Time that the other ranks get to end once one has failed: the collective timeout and a little."""
TOLERANCE = 1e-3
EVERY_STEPS = 4
"""Steps between checkpoints."""
MOST_LIVES = 60


@dataclass
class Life:
    """One launch of a run and what became of it. `tried`: the faults whose moment came, `missed`: the others."""

    run: int
    number: int
    world: int
    tried: list[str]
    missed: list[str]
    start: int
    end: int
    codes: list[int]
    seconds: float
    problems: list[str] = field(default_factory=list)


@dataclass
class Outcome:
    """All lives, the problems of whole runs, and the runs that were finished."""

    lives: list[Life] = field(default_factory=list)
    run_problems: list[str] = field(default_factory=list)
    runs: int = 0
    seconds: float = 0.0
    worst_difference: float = 0.0
    kinds: list[str] = field(default_factory=list)
    """All kinds that were to be injected, the skipped ones among them."""
    skipped_kinds: list[str] = field(default_factory=list)

    @property
    def tried(self) -> int:
        """Faults injected so far."""
        return sum(len(life.tried) for life in self.lives)

    @property
    def problems(self) -> list[str]:
        """Everything that did not hold."""
        of_lives = [
            f"run {life.run}, life {life.number}, {' + '.join(life.tried) or 'no fault'}: {text}"
            for life in self.lives
            for text in life.problems
        ]
        return of_lives + self.run_problems

    def joined(self, other: Outcome) -> Outcome:
        """Both, as one."""
        return Outcome(
            lives=self.lives + other.lives,
            run_problems=self.run_problems + other.run_problems,
            runs=self.runs + other.runs,
            seconds=self.seconds + other.seconds,
            worst_difference=max(self.worst_difference, other.worst_difference),
            kinds=self.kinds + other.kinds,
            skipped_kinds=self.skipped_kinds + other.skipped_kinds,
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON-able summary."""
        tried = Counter(name for life in self.lives for name in life.tried)
        survived = Counter(name for life in self.lives if not life.problems for name in life.tried)
        return {
            "faults_tried": self.tried,
            "faults_survived": sum(survived.values()),
            "kinds": {name: {"tried": tried[name], "survived": survived[name]} for name in sorted(tried)},
            "kinds_not_possible_here": self.skipped_kinds,
            "kinds_not_tried": [name for name in self.kinds if name not in tried and name not in self.skipped_kinds],
            "runs_compared": self.runs,
            "launches": len(self.lives),
            "worst_relative_difference_at_another_world_size": self.worst_difference,
            "problems": self.problems,
            "seconds": round(self.seconds, 1),
        }


class Campaign:
    """`folder` holds everything; `marker` is in the environment of every process it starts; `say` gets one line a
    life."""

    life_s = LIFE_S

    def __init__(
        self,
        world: World,
        folder: Path,
        nursery: Nursery | None,
        *,
        seed: int,
        steps: int = 22,
        collective_timeout_s: float = 16.0,
        small_disk: Path | None,
        marker: str,
        kinds: list[str] | None = None,
        known: dict[str, Fault] = FAULTS,
        say: Callable[[str], None] = print,
    ) -> None:
        self._world, self._folder, self._nursery, self._say = world, folder, nursery, say
        self._rng = random.Random(seed)
        self._steps = steps
        self._collective_timeout_s = collective_timeout_s
        self._small_disk, self._marker = small_disk, marker
        candidates = [known[name] for name in (kinds or known)]
        self._faults = [fault for fault in candidates if small_disk is not None or not fault.needs_small_disk]
        self.outcome = Outcome(
            kinds=[fault.name for fault in candidates],
            skipped_kinds=[fault.name for fault in candidates if fault not in self._faults],
        )
        self._bag: list[Fault] = []
        self._dealt_once = False

    def run(self, faults: int, budget_s: float, reference: Path | None = None) -> Outcome:
        """Inject at least `faults` faults, in as many runs as that takes, unless `budget_s` is over first.
        `reference`: the undisturbed run; None: it is trained."""
        began = time.monotonic()
        reference = reference or self.undisturbed()
        expected = metrics(reference)
        while self.outcome.tried < faults and time.monotonic() - began < budget_s:
            self._run(expected, reference, faults, began + budget_s)
            self.outcome.seconds = time.monotonic() - began
        return self.outcome

    def undisturbed(self, steps: int | None = None) -> Path:
        """The run folder of a run that nobody touches."""
        folder = self._folder / f"undisturbed{steps or self._steps}"
        scene = Scene(self._rng, folder, self._world.data, None, WORLD_SIZE, steps or self._steps)
        launch = self._launch(scene, [], -1, 0)
        assert set(launch.codes) == {0}, f"the undisturbed run failed: {launch.problems} {launch.codes}, see {folder}"
        return folder

    def _run(self, expected: dict[int, dict[str, float]], reference: Path, faults: int, deadline: float) -> None:
        """One run from its first life to its comparison. Past `faults` or the deadline, it is finished undisturbed.

        Every third run keeps its world size, so that its losses must be bit-equal; every second lies on the small disk,
        if there is one.
        """
        number = self.outcome.runs
        scene = self._scene(number)
        run_dir = scene.run_dir
        worlds: set[int] = set()
        failures = 0
        for life in range(MOST_LIVES):
            over = self.outcome.tried >= faults or time.monotonic() > deadline or life >= MOST_LIVES - 5
            faults_here = [] if over else self._draw(scene, life, same_world=number % 3 == 0)
            result = self._launch(scene, faults_here, number, life)
            self.outcome.lives.append(result)
            self._report(result)
            worlds.add(result.world)
            failures = failures + 1 if any(result.codes) and not result.tried else 0
            if (
                set(result.codes) == {0}
                or failures == 3
                or any(text.startswith(("left behind", "no end")) for text in result.problems)
            ):
                break
        else:
            self.outcome.run_problems.append(f"run {number} did not finish in {MOST_LIVES} lives")
        restarts = (event for event in scene.events() if event["event"] == "restart")
        same_world = worlds == {WORLD_SIZE} and all(event["ranks"] == WORLD_SIZE for event in restarts)
        self._compare(number, run_dir, reference, expected, same_world=same_world)
        self.outcome.runs += 1
        shutil.rmtree(run_dir, ignore_errors=True)

    def _scene(self, number: int) -> Scene:
        """The run of this number, at its beginning."""
        small = None if number % 2 else self._small_disk
        run_dir = (small or self._folder) / f"run{number:03d}"
        return Scene(self._rng, run_dir, self._world.data, small, WORLD_SIZE, self._steps)

    def _draw(self, scene: Scene, life: int, *, same_world: bool) -> list[Fault]:
        """Faults for one life: up to two on the files of the run that is down, perhaps a pause, then running ones up
        to the first that ends the life."""
        here = [fault for fault in self._faults if scene.small_disk is not None or not fault.needs_small_disk]
        down = [
            fault for fault in here if not fault.running and not (same_world and fault.act is change_the_world_size)
        ]
        running = [fault for fault in here if fault.running]
        pauses = [fault for fault in running if not fault.ends]
        faults: list[Fault] = []
        for chance in (0.85, 0.5) if life else ():
            possible = [fault for fault in down if fault not in faults]
            if possible and self._rng.random() < chance and not (faults and faults[-1].ends):
                faults.append(self._next(possible))
        if pauses and self._rng.random() < 0.5 and not (faults and faults[-1].ends):
            faults.append(self._next(pauses))
        while running and len(faults) < 4 and not (faults and faults[-1].ends):
            faults.append(self._next(running))
        return faults

    def _next(self, possible: list[Fault]) -> Fault:
        """The next possible fault of a shuffled bag, so that all get their turn: the first bag holds every kind once,
        the later ones by its weight."""
        while True:
            for position, fault in enumerate(self._bag):
                if fault in possible:
                    return self._bag.pop(position)
            more = [fault for fault in self._faults for _ in range(fault.weight if self._dealt_once else 1)]
            self._dealt_once = True
            self._rng.shuffle(more)
            self._bag += more

    def _launch(self, scene: Scene, faults: list[Fault], run: int, life: int) -> Life:
        """One life: harm what is down, start, harm what runs, wait for the end, judge."""
        expectation, tried, missed, problems = Expectation(), [], [], []
        scene.new_life()
        for fault in faults:
            if not fault.running:
                try:
                    expectation = fault.act(scene)
                    tried.append(fault.name)
                except MissedError:
                    missed.append(fault.name)
            if fault.act is crash_after_a_non_finite_step:
                prepare_non_finite_step(scene, EVERY_STEPS)
        newest = [path.name for path in scene.sound_checkpoints()][-1:]
        before, scene.saves_before = scene.step(), scene.unfinished_saves()

        def disturb(pids: list[int]) -> None:
            nonlocal expectation
            scene.pids = pids
            for fault in (fault for fault in faults if fault.running):
                try:
                    expectation = fault.act(scene)
                    tried.append(fault.name)
                except MissedError:
                    missed.append(fault.name)
                except HungError as error:
                    problems.append(f"no end: {error}")
                except (OSError, RuntimeError, subprocess.SubprocessError) as error:
                    problems.append(f"{fault.name} could not be injected: {error!r}")

        began = time.monotonic()
        codes, outputs = self._live(scene, faults, life, disturb)
        seconds = time.monotonic() - began
        for action in reversed(scene.clean_up):
            action()
        result = Life(
            run=run,
            number=life,
            world=scene.world,
            tried=tried,
            missed=missed,
            start=before,
            end=scene.step(),
            codes=codes,
            seconds=round(seconds, 1),
            problems=problems + scene.problems,
        )
        self._judge(result, scene, expectation, outputs, newest)
        self._bag += [fault for fault in faults if fault.name in missed]  # it gets another turn
        return result

    def _live(
        self, scene: Scene, faults: list[Fault], life: int, disturb: Callable[[list[int]], None]
    ) -> tuple[list[int], list[str]]:
        """Start the ranks, let `disturb` have their process ids, and wait for their end: exit statuses and output."""
        order = {
            "name": "life",
            "kind": "train",
            "exit_with_code": True,
            "data": str(self._world.data),
            "tokenizer": str(self._world.tokenizer),
            "run_dir": str(scene.run_dir),
            "steps": scene.steps,
            "engine.micro_batch_rows": ROWS // scene.world,
            "checkpoint.every_steps": EVERY_STEPS,
            "engine.collective_timeout_s": self._collective_timeout_s,
            "data.workers": max((fault.workers for fault in faults), default=0),
            **scene.changes,
        }
        logs = self._folder / "logs" / scene.run_dir.name / f"life{life:02d}"
        launch = self._nursery.run(
            logs, [order], world=scene.world, timeout_s=LIFE_S, while_running=disturb, grace_s=GRACE_S
        )
        return launch.codes, launch.errors

    def _judge(self, life: Life, scene: Scene, expectation: Expectation, logs: list[str], newest: list[str]) -> None:
        """Whether a life ended as it should; adds to `life.problems`."""
        output = "\n".join(logs)
        for rank, code in enumerate(life.codes):
            # 0 is always right: a rank may be done before the fault reaches it, and a stop signal in the last step
            # leaves a finished run
            allowed = (-9, 0) if rank in expectation.killed else (*expectation.codes, 0)
            allowed = expectation.codes if expectation.refused else allowed
            if code not in allowed:
                life.problems.append(
                    f"rank {rank} ended with {code}, expected one of {allowed}; {last_line(logs[rank])}"
                )
        if life.seconds > self.life_s:
            life.problems.append(f"no end within {self.life_s:.0f} s")
        if expectation.named and any(life.codes) and not re.search(expectation.named, output, re.IGNORECASE):
            life.problems.append(f"no rank's output names {expectation.named!r}: {last_line(output)}")
        # the first start of this life: a launch on several hosts may have made others, from checkpoints of this life
        first = next((event for event in list(scene.events())[scene.events_before :] if event["event"] in BEGINS), None)
        if first is not None:
            began_at = int(first["step"]) if first["event"] == "resume" else 0
            if began_at != (int(newest[0].removeprefix("step_")) if newest else 0):
                life.problems.append(
                    f"began after step {began_at}, the newest complete checkpoint is {newest or 'none'}"
                )
        saved = [int(path.name.removeprefix("step_")) for path in scene.sound_checkpoints()]
        if expectation.saved and any(life.codes) and life.end and life.end not in saved:
            life.problems.append(f"stopped after step {life.end}, but the newest checkpoint is {saved[-1:] or 'none'}")
        left = self._left_behind(scene)
        if left:
            life.problems.append(f"left behind: {left}")

    def _left_behind(self, scene: Scene) -> list[str]:
        """Processes of this campaign besides itself and its nursery, after a moment to go away."""
        deadline = time.monotonic() + 10.0
        while True:
            left = []
            for entry in Path("/proc").iterdir():
                if not entry.name.isdigit() or int(entry.name) in (os.getpid(), self._nursery.pid):
                    continue
                try:
                    mine = f"JP_CHAOS={self._marker}".encode() in (entry / "environ").read_bytes().split(b"\0")
                    if mine and (entry / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                        left.append(f"{entry.name} {(entry / 'cmdline').read_bytes()[:80]!r}")
                except (FileNotFoundError, ProcessLookupError, PermissionError):
                    continue
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(0.1)

    def _compare(
        self, number: int, run_dir: Path, reference: Path, expected: dict[int, dict[str, float]], *, same_world: bool
    ) -> None:
        """Metrics and ledger of a finished run against the undisturbed one's."""
        problems = self.outcome.run_problems
        try:
            measured = metrics(run_dir)
        except (AssertionError, FileNotFoundError) as error:
            problems.append(f"run {number}: {error}")
            return
        if measured.keys() != expected.keys():
            problems.append(f"run {number}: steps {sorted(measured.keys() ^ expected.keys())} are missing or too many")
            return
        for step, values in expected.items():
            for key, value in values.items():
                other = measured[step].get(key)
                if other == value:
                    continue
                if same_world or key in EXACT or other is None:
                    problems.append(f"run {number}, step {step}: {key} is {other!r}, undisturbed {value!r}")
                    return
                difference = abs(other - value) / max(abs(value), 1e-6)
                self.outcome.worst_difference = max(self.outcome.worst_difference, difference)
                if difference > TOLERANCE and key.startswith(("loss/total", "val/total")):
                    problems.append(
                        f"run {number}, step {step}: {key} is {other!r}, undisturbed {value!r}: "
                        f"{difference:.1e} relative"
                    )
                    return
        if ledger(run_dir) != ledger(reference):
            problems.append(f"run {number}: ledger.jsonl names {ledger(run_dir)}, undisturbed {ledger(reference)}")

    def _report(self, life: Life) -> None:
        what = " + ".join(life.tried) or "no fault"
        if life.missed:
            what += f" (not in time: {', '.join(life.missed)})"
        how = "; ".join(life.problems) if life.problems else "ok"
        self._say(
            f"{self.outcome.tried:4d}  run {life.run} world {life.world} steps {life.start}->{life.end} {life.codes} "
            f"{life.seconds:5.1f} s  {what}: {how}"
        )


EXACT = {
    "data/rows_digest",
    "tokens/total",
    "tokens/understanding",
    "tokens/text",
    "tokens/generation",
    "data/skipped",
    "optim/lr",
}
"""Metrics that may not differ at any world size."""
_COMPARED = ("loss/", "val/", "optim/", "tokens/", "data/", "mixture/")


def metrics(run_dir: Path) -> dict[int, dict[str, float]]:
    """The comparable values of every step, each of which must be there once."""
    by_step: dict[int, dict[str, float]] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        values = {key: value for key, value in entry.items() if key.startswith(_COMPARED)}
        repeated = by_step.get(entry["step"], {}).keys() & values.keys()
        assert not repeated, f"step {entry['step']} is in metrics.jsonl twice ({sorted(repeated)[:3]})"
        by_step.setdefault(entry["step"], {}).update(values)
    return by_step


def ledger(run_dir: Path) -> list[tuple[Any, ...]]:
    """Who was skipped when, in order of step."""
    path = run_dir / "ledger.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return sorted((entry["step"] or 0, entry["source"], Path(entry["shard"]).name, entry["key"]) for entry in entries)


def last_line(text: str) -> str:
    """The last line of some output, shortened."""
    return ([line for line in text.splitlines() if line.strip()] or ["no output"])[-1][:300]
