"""The faults of a campaign on several hosts: of links, hosts, clocks, disks, the object store and wandb, and of the
launch."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.chaos import faults
from tests.chaos.faults import Fault
from tests.chaos.hosts import STORED, TRAINING, HostScene
from tests.chaos.scene import Expectation, MissedError
from tests.multinode.host_faults import lose_packets, set_clock

HOST_FAULTS: dict[str, Fault] = {}
fault = functools.partial(faults.fault, into=HOST_FAULTS)
CUT_OFF_S = 150.0
"""Time that the ranks on a host without a network get to end by themselves."""
WANDB_LEFT_S = 60.0
"""Time that wandb's own processes get to end when their server does not answer."""


def _one(scene: HostScene) -> str:
    return scene.rng.choice(TRAINING)


def _one_without_launch(scene: HostScene) -> str:
    return scene.rng.choice([host for host in TRAINING if host != scene.head])


def _for_a_moment(scene: HostScene, low_s: float, high_s: float, begin: Callable[[], None], end: Callable[[], None]):
    """Something that a run survives: it goes on where it was."""
    scene.steps_on(1, 2)
    scene.clean_up.append(end)
    begin()
    time.sleep(scene.rng.uniform(low_s, high_s))
    scene.clean_up.remove(end)
    end()
    scene.goes_on()
    return Expectation()


# -- links -----------------------------------------------------------------------------------------


@fault(running=True, ends=False, weight=3)
def host_link_down_for_a_moment(scene: HostScene) -> Expectation:
    host, rig = _one(scene), scene.rig
    return _for_a_moment(scene, 0.2, 2.5, lambda: rig.link(host, "down"), lambda: rig.link(host, "up"))


@fault(running=True, ends=False, weight=3, needs="packet loss")
def host_loses_packets(scene: HostScene) -> Expectation:
    host, rig, percent = _one(scene), scene.rig, scene.rng.choice([2, 10, 30])
    return _for_a_moment(scene, 0.5, 2.5, lambda: lose_packets(rig, host, percent), lambda: lose_packets(rig, host, 0))


@fault(running=True, ends=False)
def host_network_slow(scene: HostScene) -> Expectation:
    host, rig = _one(scene), scene.rig
    return _for_a_moment(scene, 0.5, 2.0, lambda: rig.slow(host, rate="2mbit"), lambda: rig.full_speed(host))


@fault(running=True, ends=False, restarts=True, weight=1)
def host_link_down_for_good(scene: HostScene) -> Expectation:
    """The launch goes on without the host; what runs there ends by itself."""
    scene.steps_on(1, 3)
    host = _one_without_launch(scene)
    scene.clean_up.append(lambda: scene.rig.link(host, "up"))
    scene.left_s = max(scene.left_s, CUT_OFF_S)
    scene.starts_again(lambda: scene.rig.link(host, "down"), named=host)
    return Expectation()


# -- hosts -----------------------------------------------------------------------------------------


@fault(running=True, ends=False, restarts=True, weight=1)
def host_loses_power(scene: HostScene) -> Expectation:
    scene.steps_on(1, 3)
    host = _one_without_launch(scene)
    scene.clean_up.append(lambda: scene.rig.start_host(host))
    scene.starts_again(lambda: scene.rig.stop_host(host), named=host)
    return Expectation()


@fault(running=True, ends=False, restarts=True)
def host_reboots(scene: HostScene) -> Expectation:
    """It is back before anybody has noticed."""
    scene.steps_on(1, 3)
    host = _one_without_launch(scene)

    def reboot() -> None:
        scene.rig.stop_host(host)
        time.sleep(scene.rng.uniform(0.0, 1.0))
        scene.rig.start_host(host)

    scene.starts_again(reboot, named=host)
    return Expectation()


@fault(running=True)
def host_of_the_launch_loses_power(scene: HostScene) -> Expectation:
    """The ranks on the other hosts are on their own."""
    scene.steps_on(1, 3)
    scene.clean_up.append(scene.hosts.store.start)
    scene.clean_up.append(lambda: scene.rig.start_host(scene.head))
    scene.left_s = max(scene.left_s, CUT_OFF_S)
    scene.rig.stop_host(scene.head)
    return Expectation(killed=(0,))


@fault(running=True, ends=False, restarts=True, weight=3)
def host_rank_killed(scene: HostScene) -> Expectation:
    scene.steps_on(1, 3)
    host = _one(scene)
    pid = scene.rank(host)
    scene.starts_again(lambda: os.kill(pid, signal.SIGKILL), named=rf"rank \d on {host}.*SIGKILL")
    return Expectation()


@fault(running=True, ends=False)
def host_rank_paused(scene: HostScene) -> Expectation:
    scene.wait(scene.begun, poll_s=0.02)
    pid = scene.rank(_one(scene))
    return _for_a_moment(scene, 0.2, 2.0, lambda: os.kill(pid, signal.SIGSTOP), lambda: os.kill(pid, signal.SIGCONT))


@fault(running=True, ends=False)
def host_sshd_restarts(scene: HostScene) -> Expectation:
    host = scene.rng.choice(scene.rig.names)
    return _for_a_moment(scene, 0.0, 0.2, lambda: scene.rig.restart_sshd(host), lambda: None)


@fault(running=True, ends=False, weight=4, needs="clock")
def host_clock_jumps(scene: HostScene) -> Expectation:
    """By an hour or a day, either way; the clock stays wrong for the rest of the life."""
    hosts = scene.rng.choice([[name] for name in (*TRAINING, scene.head)] + [list(scene.rig.names)])
    ahead_s = scene.rng.choice([-86400.0, -3600.0, 3600.0, 86400.0])

    def jump() -> None:
        for host in hosts:
            set_clock(scene.rig, host, ahead_s)

    return _for_a_moment(scene, 0.5, 1.0, jump, lambda: None)


# -- a launch that must not start ------------------------------------------------------------------


def _not_finished(scene: HostScene) -> None:
    """Ranks whose launch was killed may have trained to the end: a launch says so, whatever is down."""
    if scene.finished():
        raise MissedError


@fault(running=False, ends=True, weight=1)
def host_off_at_the_start(scene: HostScene) -> Expectation:
    _not_finished(scene)
    host = _one(scene)
    scene.rig.stop_host(host)
    return Expectation(codes=(5,), named=rf"preflight found.*{host}", refused=True)


@fault(running=False, ends=True, weight=1)
def host_key_changed_at_the_start(scene: HostScene) -> Expectation:
    _not_finished(scene)
    host = _one(scene)
    scene.rig.change_host_key(host)
    return Expectation(codes=(5,), named=rf"preflight found.*{host}: .*key", refused=True)


@fault(running=False, ends=True, weight=1, needs="clock")
def host_clock_wrong_at_the_start(scene: HostScene) -> Expectation:
    _not_finished(scene)
    host = _one(scene)
    set_clock(scene.rig, host, scene.rng.choice([-86400.0, -3600.0, 3600.0, 86400.0]))
    return Expectation(codes=(5,), named=rf"preflight found.*{host}: the clock is", refused=True)


@fault(running=False, ends=True, weight=1)
def store_gone_at_the_start(scene: HostScene) -> Expectation:
    _not_finished(scene)
    scene.hosts.store.kill()
    return Expectation(codes=(3, 5), named=rf"shard.*{scene.hosts.store.url}", refused=True)


# -- the object store ------------------------------------------------------------------------------


@fault(running=True, ends=False, weight=3)
def store_answers_503(scene: HostScene) -> Expectation:
    scene.steps_on(1, 2)
    scene.hosts.store.misbehave(",".join(scene.rng.choices(["503", "429"], k=scene.rng.randint(1, 4))))
    scene.goes_on()
    return Expectation()


@fault(running=True, ends=False, weight=3)
def store_cuts_answers(scene: HostScene) -> Expectation:
    scene.steps_on(1, 2)
    names = ["cut", "reset", "early reset", "short", "idle close"]
    scene.hosts.store.misbehave(",".join(scene.rng.choices(names, k=3)))
    scene.goes_on()
    return Expectation()


@fault(running=True, ends=False)
def store_hangs_for_a_moment(scene: HostScene) -> Expectation:
    store = scene.hosts.store
    return _for_a_moment(scene, 0.5, 2.5, lambda: store.stop(True), lambda: store.stop(False))


@fault(running=True, ends=False)
def store_restarts(scene: HostScene) -> Expectation:
    store = scene.hosts.store
    return _for_a_moment(scene, 0.0, 1.5, store.kill, store.start)


@fault(running=True)
def store_gone_for_good(scene: HostScene) -> Expectation:
    scene.steps_on(1, 3)
    scene.hosts.store.kill()
    return Expectation(codes=(3,), named=rf"shard {scene.hosts.store.url}/({'|'.join(STORED)})/")


# -- wandb -----------------------------------------------------------------------------------------

WANDB = ("logging.wandb.mode=online",)


def _without_wandb(scene: HostScene, act: Callable[[], None]) -> Expectation:
    """For the rest of the life; the process that hands over the curves is given time to notice."""
    scene.steps_on(1, 3)
    if not scene.hosts.wandb.running:
        raise MissedError
    scene.left_s = max(scene.left_s, WANDB_LEFT_S)
    act()
    scene.goes_on()
    return Expectation()


@fault(running=False, ends=False, weight=1, overrides=WANDB)
def wandb_gone_at_the_start(scene: HostScene) -> Expectation:
    scene.left_s = max(scene.left_s, WANDB_LEFT_S)
    scene.hosts.wandb.kill()
    return Expectation()


@fault(running=True, ends=False, overrides=WANDB)
def wandb_gone_under_way(scene: HostScene) -> Expectation:
    return _without_wandb(scene, scene.hosts.wandb.kill)


@fault(running=True, ends=False, overrides=WANDB)
def wandb_answers_errors(scene: HostScene) -> Expectation:
    status = scene.rng.choice(["401", "429", "500", "503"])
    return _without_wandb(scene, lambda: scene.hosts.wandb.misbehave(status))


@fault(running=True, ends=False, overrides=WANDB)
def wandb_hangs(scene: HostScene) -> Expectation:
    wandb = scene.hosts.wandb
    scene.clean_up.append(lambda: wandb.stop(False))
    return _without_wandb(scene, lambda: wandb.stop(True))


# -- disks -----------------------------------------------------------------------------------------


@fault(running=True, ends=False, weight=3, needs="slow disk")
def disk_slow(scene: HostScene) -> Expectation:
    """The shared file system takes 1 MB/s for a moment."""
    disk = scene.hosts.disk
    return _for_a_moment(scene, 1.0, 3.0, lambda: disk.limit(1 << 20), lambda: disk.limit(0))


@fault(running=True, needs_small_disk=True)
def disk_full(scene: HostScene) -> Expectation:
    return faults.fill_the_disk(scene)


def _checkpoints_elsewhere(scene: HostScene, change: Callable[[str, Path], None]) -> None:
    scene.steps_on(1, 2)
    host, folder = _one(scene), scene.run_dir / "checkpoints"
    scene.wait(folder.is_dir)
    scene.clean_up.append(lambda: scene.rig.unmount(host, folder))
    change(host, folder)


@fault(running=True)
def disk_full_on_one_host(scene: HostScene) -> Expectation:
    """One host sees a full disk where the others see the run folder."""
    _checkpoints_elsewhere(scene, lambda host, folder: scene.rig.small_disk(host, folder, full=True))
    return Expectation(codes=(4, 1), named="space|free|not the same|checkpoint")


@fault(running=True)
def disk_read_only_on_one_host(scene: HostScene) -> Expectation:
    _checkpoints_elsewhere(scene, lambda host, folder: scene.rig.mount_over(host, folder, folder, read_only=True))
    return Expectation(codes=(2, 4, 1), named="ead-only")


# -- the launch ------------------------------------------------------------------------------------


def _stop_the_launch(scene: HostScene, number: signal.Signals) -> Expectation:
    scene.steps_on(1, 4)
    time.sleep(scene.rng.uniform(0, 0.4))
    scene.send(number)
    return Expectation(codes=(128 + number,), saved=True)


@fault(running=True)
def launch_gets_sigterm(scene: HostScene) -> Expectation:
    return _stop_the_launch(scene, signal.SIGTERM)


@fault(running=True)
def launch_gets_ctrl_c(scene: HostScene) -> Expectation:
    return _stop_the_launch(scene, signal.SIGINT)


@fault(running=True)
def launch_killed(scene: HostScene) -> Expectation:
    """SIGKILL for `jp-train launch` itself."""
    scene.steps_on(1, 3)
    scene.left_s = max(scene.left_s, CUT_OFF_S)
    scene.send(signal.SIGKILL)
    return Expectation(killed=(0,))


def impossible_here(parts: set[str]) -> list[Fault]:
    """Kinds that this machine cannot show; `parts`: what it has of `Fault.needs`."""
    return [fault for fault in HOST_FAULTS.values() if fault.needs and fault.needs not in parts]


def parts_here(*, clock: bool, slow_disk: bool) -> set[str]:
    """What this machine has of `Fault.needs`."""
    have = {"clock": clock, "slow disk": slow_disk, "packet loss": shutil.which("nft") is not None}
    return {name for name, there in have.items() if there}
