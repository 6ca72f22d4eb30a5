"""The faults of a campaign. Each is a function of the scene; most wait for their moment, do their harm, and say how
the life should end."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.scene import Expectation, HungError, MissedError, Scene, state

CRASH = (1, 3, 4, 5, 70, -6)
"""Exit statuses of a rank whose peer vanished: an error of its own, or gloo's abort."""


@dataclass(frozen=True)
class Fault:
    """`running`: done to living ranks, else to the files of a run that is down. `ends`: the life is over with it.
    `weight`: how often it is drawn."""

    name: str
    act: Callable[[Scene], Expectation]
    running: bool
    ends: bool
    weight: int = 2
    workers: int = 0
    needs_small_disk: bool = False
    needs: str = ""
    """A part of the machine without which it is not possible: `clock`, `slow disk`, `packet loss`."""
    restarts: bool = False
    """On several hosts: the launch starts the ranks again by itself."""
    overrides: tuple[str, ...] = ()
    """On several hosts: configuration of the life that it happens in."""


FAULTS: dict[str, Fault] = {}


def fault(running: bool, into: dict[str, Fault] = FAULTS, **settings):
    def register(function: Callable[[Scene], Expectation]) -> Callable[[Scene], Expectation]:
        name = function.__name__
        into[name] = Fault(name, function, running, **{"ends": running} | settings)
        return function

    return register


# -- processes -------------------------------------------------------------------------------------


@fault(running=True, weight=5)
def kill_a_rank(scene: Scene) -> Expectation:
    scene.steps_on(0, 6)
    time.sleep(scene.rng.uniform(0, 0.4))
    victim = scene.rng.randrange(scene.world)
    scene.signal([victim], signal.SIGKILL)
    return Expectation(codes=CRASH, killed=(victim,))


@fault(running=True, weight=3)
def kill_all_ranks(scene: Scene) -> Expectation:
    scene.steps_on(0, 6)
    time.sleep(scene.rng.uniform(0, 0.4))
    scene.signal(list(range(scene.world)), signal.SIGKILL)
    return Expectation(killed=tuple(range(scene.world)))


@fault(running=True, weight=3)
def kill_during_start(scene: Scene) -> Expectation:
    time.sleep(scene.rng.uniform(0, 2.5))
    victim = scene.rng.randrange(scene.world)
    scene.signal([victim], signal.SIGKILL)
    return Expectation(codes=CRASH, killed=(victim,))


@fault(running=True, weight=5)
def kill_during_a_save(scene: Scene) -> Expectation:
    scene.wait(lambda: scene.begun() and scene.saving(), poll_s=0.001)
    time.sleep(scene.rng.uniform(0, 0.15))
    victims = [scene.rng.randrange(scene.world)] if scene.rng.random() < 0.6 else list(range(scene.world))
    scene.signal(victims, signal.SIGKILL)
    return Expectation(codes=CRASH, killed=tuple(victims))


@fault(running=True, ends=False)
def pause_a_rank(scene: Scene) -> Expectation:
    scene.steps_on(0, 3)
    victim = [scene.rng.randrange(scene.world)]
    scene.signal(victim, signal.SIGSTOP)
    time.sleep(scene.rng.uniform(0.2, 1.5))
    scene.signal(victim, signal.SIGCONT)
    return Expectation()


@fault(running=True, weight=1)
def crash_after_a_non_finite_step(scene: Scene) -> Expectation:
    """The loss of one step is NaN; the power fails before that is in a checkpoint. What follows must not remember
    it."""
    scene.wait(lambda: any(event["event"] == "spike" for event in list(scene.events())[scene.events_before :]))
    scene.signal(list(range(scene.world)), signal.SIGKILL)
    return Expectation(killed=tuple(range(scene.world)))


def prepare_non_finite_step(scene: Scene, every_steps: int) -> None:
    """Plant it in the next life, at a step that is followed by others before the next checkpoint."""
    step = scene.step() + 1
    while step % every_steps != 1:
        step += 1
    scene.changes["nan_at"] = step


# -- data workers ----------------------------------------------------------------------------------


def _to_worker(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        raise MissedError from None


@fault(running=True, workers=1)
def kill_a_data_worker(scene: Scene) -> Expectation:
    scene.steps_on(0, 3)
    scene.wait(lambda: bool(scene.data_workers()))
    _to_worker(scene.rng.choice(scene.data_workers()), signal.SIGKILL)
    return Expectation(codes=(3,), named="loader worker died")


@fault(running=True, ends=False, workers=1)
def pause_a_data_worker(scene: Scene) -> Expectation:
    scene.steps_on(0, 3)
    scene.wait(lambda: bool(scene.data_workers()))
    victim = scene.rng.choice(scene.data_workers())
    _to_worker(victim, signal.SIGSTOP)
    time.sleep(scene.rng.uniform(0.2, 1.5))
    if state(victim):
        os.kill(victim, signal.SIGCONT)
    return Expectation()


# -- what only the watchdog can end ----------------------------------------------------------------


def _others_end(scene: Scene, held: int) -> None:
    """Until every rank but `held` has ended; the watchdog's time and some more."""
    deadline = time.monotonic() + 60.0
    while any(state(pid) not in ("Z", "X", "") for rank, pid in enumerate(scene.pids) if rank != held):
        if time.monotonic() > deadline:
            raise HungError("nobody ended the run although nothing moved for 60 s")
        time.sleep(0.05)


@fault(running=True, weight=1)
def stop_a_rank_for_good(scene: Scene) -> Expectation:
    """A rank that stands still for ever (SIGSTOP): the others must name it and end. The launcher would then kill it."""
    if scene.world == 1:
        raise MissedError
    scene.steps_on(1, 3)
    victim = scene.rng.randrange(scene.world)
    scene.signal([victim], signal.SIGSTOP)
    try:
        _others_end(scene, held=victim)
    finally:
        scene.signal([victim], signal.SIGKILL)
    return Expectation(codes=(5,), killed=(victim,), named=rf"rank {victim}\b")


@fault(running=True, weight=1, workers=1)
def stop_a_data_worker_for_good(scene: Scene) -> Expectation:
    scene.steps_on(1, 3)
    scene.wait(lambda: bool(scene.data_workers()))
    victim = scene.rng.choice(scene.data_workers())
    _to_worker(victim, signal.SIGSTOP)
    try:
        _others_end(scene, held=-1)
    finally:
        if state(victim):
            os.kill(victim, signal.SIGCONT)
    return Expectation(codes=(3, 5), named="loader worker")


# -- signals ---------------------------------------------------------------------------------------


def _stop_signal(scene: Scene, number: signal.Signals, ranks: list[int]) -> Expectation:
    scene.steps_on(0, 6)
    time.sleep(scene.rng.uniform(0, 0.4))
    started = scene.trained()  # before there may be nothing to save, and the signal's own effect is right
    scene.signal(ranks, number)
    return Expectation(codes=(128 + number,) if started else (128 + number, -number, *CRASH), saved=started)


@fault(running=True, weight=3)
def sigterm_to_all(scene: Scene) -> Expectation:
    return _stop_signal(scene, signal.SIGTERM, list(range(scene.world)))


@fault(running=True)
def sigterm_to_a_rank(scene: Scene) -> Expectation:
    return _stop_signal(scene, signal.SIGTERM, [scene.rng.randrange(scene.world)])


@fault(running=True)
def sigusr1_to_all(scene: Scene) -> Expectation:
    return _stop_signal(scene, signal.SIGUSR1, list(range(scene.world)))


@fault(running=True)
def ctrl_c(scene: Scene) -> Expectation:
    return _stop_signal(scene, signal.SIGINT, list(range(scene.world)))


@fault(running=True)
def signal_during_a_save(scene: Scene) -> Expectation:
    scene.wait(lambda: scene.begun() and scene.saving(), poll_s=0.001)
    scene.signal(list(range(scene.world)), signal.SIGTERM)
    return Expectation(codes=(143,), saved=True)


@fault(running=True, weight=1)
def ctrl_c_twice(scene: Scene) -> Expectation:
    """The ranks are held in a step while the second Ctrl-C comes, else they would have ended well before it."""
    scene.steps_on(0, 3)
    held = scene.rng.randrange(scene.world)
    scene.signal([held], signal.SIGSTOP)
    everyone = list(range(scene.world))
    scene.signal(everyone, signal.SIGINT)
    time.sleep(2.3)
    scene.signal(everyone, signal.SIGINT)
    scene.signal([held], signal.SIGCONT)
    # the held rank sees both signals at once, as one: it notices that the others have left
    return Expectation(codes=(130, *CRASH))


# -- checkpoints of a run that is down -------------------------------------------------------------


def _harm_newest(scene: Scene, harm: Callable[[Path], None]) -> Expectation:
    complete = scene.sound_checkpoints()
    if len(complete) < 2:  # with one only, the right answer is to refuse: see the engine's own tests
        raise MissedError
    harm(complete[-1])
    scene.harmed[complete[-1].name] = complete[-1].stat().st_ino
    return Expectation()


def _files(scene: Scene, checkpoint: Path) -> Path:
    return scene.rng.choice(sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size))


@fault(running=False)
def flip_a_byte_of_a_checkpoint(scene: Scene) -> Expectation:
    def harm(checkpoint: Path) -> None:
        file = _files(scene, checkpoint)
        data = bytearray(file.read_bytes())
        place = scene.rng.randrange(len(data))
        data[place] ^= 1 << scene.rng.randrange(8)
        # a flip in a number or a note may leave it well-formed: make it unreadable instead
        if file.name == "manifest.json":
            data[0] = 0
        file.write_bytes(data)

    return _harm_newest(scene, harm)


@fault(running=False)
def truncate_a_file_of_a_checkpoint(scene: Scene) -> Expectation:
    def harm(checkpoint: Path) -> None:
        file = _files(scene, checkpoint)
        os.truncate(file, scene.rng.randrange(file.stat().st_size))

    return _harm_newest(scene, harm)


@fault(running=False)
def lose_a_file_of_a_checkpoint(scene: Scene) -> Expectation:
    return _harm_newest(scene, lambda checkpoint: _files(scene, checkpoint).unlink())


@fault(running=False)
def leave_rubbish_in_the_run_folder(scene: Scene) -> Expectation:
    """What a crash of the host could leave: a half-written save, a wrong `latest`, torn last lines."""
    folder = scene.run_dir / "checkpoints"
    if not folder.is_dir():
        raise MissedError
    half = folder / ".saving_step_0000003"
    half.mkdir(exist_ok=True)
    (half / "state.json").write_text("{")
    (folder / "latest").write_text("step_9999999\n")
    for name in ("metrics.jsonl", "events.jsonl"):
        with (scene.run_dir / name).open("a") as file:
            file.write('{"step": 1, "loss/to')
    (scene.run_dir / "status.json").write_text("")
    return Expectation()


@fault(running=False, weight=6)
def change_the_world_size(scene: Scene) -> Expectation:
    scene.world = scene.rng.choice([world for world in (1, 2, 3) if world != scene.world])
    return Expectation()


# -- data and disk ---------------------------------------------------------------------------------


def _shard(scene: Scene) -> Path:
    return scene.rng.choice(sorted(scene.data.glob("*-gen/*.tar")) + sorted(scene.data.glob("*-und/*.tar")))


@fault(running=False, ends=True)
def lose_a_shard(scene: Scene) -> Expectation:
    """One of the shards of a folder: a run that has begun must notice that its data has changed."""
    if not scene.sound_checkpoints():
        raise MissedError
    shard = _shard(scene)
    away = shard.with_suffix(".away")
    shard.rename(away)
    scene.clean_up.append(lambda: away.rename(shard))
    return Expectation(codes=(3,), named=re.escape(shard.parent.name))


@fault(running=False, ends=True)
def truncate_a_shard(scene: Scene) -> Expectation:
    shard = _shard(scene)
    kept, stamp = shard.read_bytes(), shard.stat()

    def restore() -> None:
        shard.write_bytes(kept)
        os.utime(shard, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))

    scene.clean_up.append(restore)
    os.truncate(shard, scene.rng.randrange(1024, len(kept) // 2))
    return Expectation(codes=(3,), named=re.escape(shard.name))


@fault(running=True)
def truncate_a_shard_under_way(scene: Scene) -> Expectation:
    """Every shard of a source loses its second half while the run reads it: the next read behind the cut must stop
    the run."""
    scene.steps_on(0, 2)
    source = scene.rng.choice(["digits-gen", "digits-und", "scenes-und"])
    for shard in sorted((scene.data / source).glob("*.tar")):
        kept, stamp = shard.read_bytes(), shard.stat()

        def restore(shard: Path = shard, kept: bytes = kept, stamp: os.stat_result = stamp) -> None:
            shard.write_bytes(kept)
            os.utime(shard, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))

        scene.clean_up.append(restore)
        os.truncate(shard, len(kept) // 8)
    return Expectation(codes=(3,), named=source)


@fault(running=True, needs_small_disk=True, weight=3)
def fill_the_disk(scene: Scene) -> Expectation:
    scene.steps_on(0, 2)
    _fill(scene)
    return Expectation(codes=(4, 1), named="free|space")


def _fill(scene: Scene) -> None:
    """Leave 64 KiB: enough for log lines, too little for a checkpoint."""
    assert scene.small_disk is not None
    filler = scene.small_disk / "filler"
    scene.clean_up.append(lambda: filler.unlink(missing_ok=True))
    with filler.open("wb") as file:
        for tries_left in reversed(range(100)):
            free = shutil.disk_usage(scene.small_disk).free + os.fstat(file.fileno()).st_blocks * 512
            try:
                os.posix_fallocate(file.fileno(), 0, max(1, free - (64 << 10)))
                return
            except OSError as error:  # the run has written meanwhile
                if error.errno != errno.ENOSPC or not tries_left:
                    raise


@fault(running=True, needs_small_disk=True)
def make_the_disk_read_only(scene: Scene) -> Expectation:
    scene.steps_on(0, 2)
    assert scene.small_disk is not None
    disk = str(scene.small_disk)
    scene.clean_up.append(lambda: subprocess.run(["mount", "-o", "remount,rw", disk], check=True))
    # open files keep a mount busy for a remount: it is enough that the checkpoint folder cannot be written
    done = subprocess.run(["mount", "-o", "remount,ro", disk], capture_output=True)
    if done.returncode:
        folder = scene.run_dir / "checkpoints"
        folder.mkdir(exist_ok=True)
        subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
        scene.clean_up[-1] = lambda: subprocess.run(["umount", "--lazy", str(folder)], check=True)
        remount = ["mount", "-o", "remount,ro,bind", str(folder)]
        scene.wait(lambda: subprocess.run(remount, capture_output=True).returncode == 0)  # busy while a save writes
    return Expectation(codes=(2, 4, 1), named="ead-only")
