"""The part of a campaign that runs on several hosts, through `jp-train launch --hostfile`.

A life is one launch. It survives several faults (links, clocks, the object store), is made to start its ranks again by
others (a host without power, a killed rank), and ends by the last one; then the same command is given again. What must
hold is what holds on one host (`campaign.py`), and that nothing is left running on any host.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

from jp_train.config import save_config
from tests.chaos.campaign import EVERY_STEPS, WORLD_SIZE, Campaign
from tests.chaos.faults import Fault
from tests.chaos.host_faults import HOST_FAULTS, impossible_here
from tests.chaos.hosts import HEAD, TRAINING, Hosts, HostScene
from tests.chaos.scene import Scene
from tests.multinode.cluster_rig import _kill_group
from tests.small_disk import ThrottledDisk

HOST_LIFE_S = 600.0
PATIENCE_S = 240.0
LAUNCH_PATIENCE_S = 5.0
MAX_RESTARTS = 3


class HostCampaign(Campaign):
    """`disk`: holds the run folders, None where there is none. `parts`: of `parts_here`."""

    life_s = HOST_LIFE_S

    def __init__(
        self, hosts: Hosts, *arguments: Any, disk: ThrottledDisk | None, parts: set[str],
        kinds: list[str] | None = None, **settings: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            *arguments, small_disk=disk and disk.place, kinds=kinds or list(HOST_FAULTS), known=HOST_FAULTS, **settings
        )
        self._hosts = hosts
        hosts.disk = disk
        impossible = [fault.name for fault in impossible_here(parts)]
        self.outcome.skipped_kinds += [fault.name for fault in self._faults if fault.name in impossible]
        self._faults = [fault for fault in self._faults if fault.name not in impossible]

    def _scene(self, number: int) -> HostScene:
        name = f"hosts{number:03d}"
        small = self._small_disk
        run_dir = (small or self._folder) / name
        config = self._folder / f"{name}.yaml"
        changes = {
            "checkpoint.every_steps": EVERY_STEPS,
            "engine.collective_timeout_s": 2.5 * self._collective_timeout_s,
            "engine.stall_timeout_s": self._collective_timeout_s,
        }
        save_config(self._hosts.configuration(run_dir, self._steps, **changes), config)
        return HostScene(
            self._rng, run_dir, self._world.data, small, WORLD_SIZE, self._steps,
            patience_s=PATIENCE_S, hosts=self._hosts, config=config,
        )  # fmt: skip

    def _draw(self, scene: Scene, life: int, *, same_world: bool) -> list[Fault]:
        """Some faults that a run survives, one after which the launch starts the ranks again, and one that ends the
        launch; or one that lets nothing start, alone."""
        down = [fault for fault in self._faults if not fault.running]
        survived = [fault for fault in self._faults if fault.running and not fault.ends and not fault.restarts]
        again = [fault for fault in self._faults if fault.restarts]
        ends = [fault for fault in self._faults if fault.running and fault.ends]
        tried = {name for earlier in self.outcome.lives for name in earlier.tried}
        chance = 0.2 if tried.issuperset(fault.name for fault in down) else 0.6  # each of them is to be tried
        faults: list[Fault] = []
        if down and (not (survived or again or ends) or (life and self._rng.random() < chance)):
            faults.append(self._next(down))
            if faults[0].ends:
                return faults
        if survived:
            faults += [self._next(survived) for _ in range(self._rng.randint(2, 4))]
        if again and (not ends or self._rng.random() < 0.5):
            faults.append(self._next(again))
            faults += [self._next(survived) for _ in range(self._rng.randint(0, 2))] if survived else []
        if ends:
            faults.append(self._next(ends))
        return faults

    def _live(
        self, scene: Scene, faults: list[Fault], life: int, disturb: Callable[[list[int]], None]
    ) -> tuple[list[int], list[str]]:
        """One launch, from `jp-train launch` to its end: its exit status, and what it printed."""
        assert isinstance(scene, HostScene)
        scene.head = self._rng.choice([HEAD, HEAD, TRAINING[0]])
        logs = self._folder / "logs" / scene.run_dir.name
        logs.mkdir(parents=True, exist_ok=True)
        terminal = logs / f"life{life:02d}.log"
        options = ["--launcher", self._rng.choice(["pdsh", "pdsh", "openmpi"]), "--patience", f"{LAUNCH_PATIENCE_S:g}"]
        options += ["--max-restarts", str(MAX_RESTARTS) if any(fault.restarts for fault in faults) else "0"]
        if all(fault.running for fault in faults):
            options.append("--skip-preflight")
        options += sorted({override for fault in faults for override in fault.overrides})
        scene.launch = self._hosts.launch(scene.head, scene.config, terminal, *options)
        try:
            disturb([scene.launch.pid])
            code = scene.launch.wait(self.life_s)
        except subprocess.TimeoutExpired:
            scene.problems.append(f"no end: the launch did not end within {self.life_s:.0f} s")
            _kill_group(scene.launch)
            code = scene.launch.wait()
        return [code], [terminal.read_text(errors="replace")]

    def _left_behind(self, scene: Scene) -> list[str]:
        """Processes on the hosts; they are ended, so that the campaign can go on."""
        assert isinstance(scene, HostScene)
        left = self._hosts.left(scene.left_s)
        self._hosts.repair()
        return left
