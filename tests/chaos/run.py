"""`make chaos`: kill, stop, starve and corrupt a training run on purpose, and see whether anything is lost.

    python -m tests.chaos.run [--faults 500] [--on-hosts 100] [--seed 0] [--steps 22] [--minutes 90]
    [--out runs/chaos] [--kinds a,b] [--json] [--list]

The smoke model is trained by real ZeRO-3 ranks (gloo) in short runs. Every launch of them is disturbed in one way, then
the same command is given again. At the end of each run its metrics and ledger are compared with an undisturbed run's.
Exit status 1 if anything did not hold.

The last `--on-hosts` faults are those of several hosts: network namespaces with real ssh servers, on which `jp-train
launch --hostfile` starts the ranks, and an object store that some of the shards come from.

The faults of a full disk need a small file system: as root one of 160 MiB is mounted, in a mount namespace that ends
with this command.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
import uuid
from pathlib import Path

HERE = Path(__file__).resolve().parent

SMALL_DISK = "160m"
HOST_DISK_BYTES = 256 << 20
HOST_STEPS_FACTOR = 2
"""Runs on several hosts are longer: a launch takes 10 s until it trains, so it is to survive several faults."""
_INSIDE = "JP_CHAOS_MOUNTS"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=500, help="how many to inject (default 500)")
    parser.add_argument("--on-hosts", type=int, help="how many of them on several hosts (default: every fifth)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the data, the order of the faults and their moments (default 0)"
    )
    parser.add_argument("--steps", type=int, default=22, help="of each run (default 22)")
    parser.add_argument(
        "--collective-timeout",
        type=float,
        default=16.0,
        help="seconds; more for a machine with other work to do (default 16)",
    )
    parser.add_argument("--minutes", type=float, default=90.0, help="stop injecting after this time (default 90)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/chaos"), help="logs of every launch, and chaos.json (default runs/chaos)"
    )
    parser.add_argument("--kinds", default="", help="only these, separated by commas")
    parser.add_argument("--list", action="store_true", help="print the kinds of fault and end")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout; progress goes to stderr")
    arguments = parser.parse_args()
    from tests.chaos.faults import FAULTS
    from tests.chaos.host_faults import HOST_FAULTS

    if arguments.list:
        for fault in (*FAULTS.values(), *HOST_FAULTS.values()):
            needs = "a small disk" if fault.needs_small_disk else fault.needs
            print(
                f"{fault.name:36}{'running' if fault.running else 'down':9}"
                f"{'several hosts' if fault.name in HOST_FAULTS else '':15}{f'needs {needs}' if needs else ''}"
            )
        return 0
    kinds = [name for name in arguments.kinds.split(",") if name]
    unknown = [name for name in kinds if name not in FAULTS | HOST_FAULTS]
    if unknown:
        parser.error(f"unknown kinds {', '.join(unknown)}; --list names all")
    if _INSIDE not in os.environ and os.geteuid() == 0 and shutil.which("unshare"):
        # a namespace of its own: whatever happens to this process, the mount goes with it
        os.environ[_INSIDE] = "1"
        os.execvp("unshare", ["unshare", "--mount", "--propagation", "private", sys.executable, *sys.orig_argv[1:]])
    return campaign(arguments, kinds)


def campaign(arguments: argparse.Namespace, kinds: list[str]) -> int:
    """Run it and print the table."""
    marker = uuid.uuid4().hex
    os.environ.update(JP_CHAOS=marker, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    from tests.chaos.campaign import Campaign, Outcome
    from tests.chaos.chaos_world import build_world
    from tests.chaos.faults import FAULTS
    from tests.chaos.host_faults import HOST_FAULTS
    from tests.distributed import Nursery

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    local = [name for name in kinds if name in FAULTS]
    on_hosts = [name for name in kinds if name in HOST_FAULTS]
    faults_on_hosts = arguments.faults // 5 if arguments.on_hosts is None else arguments.on_hosts
    if kinds and not (local and on_hosts):
        faults_on_hosts = 0 if local else arguments.faults
    out = arguments.out.resolve()
    # with the cache: another seed's shards have the same addresses
    for pattern in ("logs", "cache", "undisturbed*", "run[0-9]*", "hosts[0-9]*"):
        for old in out.glob(pattern):
            shutil.rmtree(old, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    say(
        f"chaos: {arguments.faults} faults, {faults_on_hosts} of them on several hosts, seed {arguments.seed}, at most "
        f"{arguments.minutes:g} min; everything under {out}"
    )
    world = build_world(out / f"world{arguments.seed}", arguments.seed)
    settings = {
        "seed": arguments.seed, "collective_timeout_s": arguments.collective_timeout, "marker": marker, "say": say,
    }  # fmt: skip
    began = time.monotonic()
    with Nursery(HERE / "chaos_worker.py") as nursery:
        chaos = Campaign(
            world,
            out,
            nursery,
            steps=arguments.steps,
            small_disk=small_disk(out / "disk", say),
            kinds=local,
            **settings,
        )
        here = arguments.faults - faults_on_hosts
        outcome = chaos.run(here, arguments.minutes * 60 * here / arguments.faults) if here > 0 else Outcome()
        host_steps = HOST_STEPS_FACTOR * arguments.steps
        reference = chaos.undisturbed(host_steps) if faults_on_hosts else None
    if reference is not None:
        left_s = arguments.minutes * 60 - (time.monotonic() - began)
        outcome = outcome.joined(
            campaign_on_hosts(
                world, out, faults_on_hosts, left_s, reference, steps=host_steps, kinds=on_hosts, **settings
            )
        )
    summary = outcome.as_dict()
    (out / "chaos.json").write_text(json.dumps(summary, indent=1))
    print(json.dumps(summary) if arguments.json else table(summary), flush=True)
    return 1 if summary["problems"] else 0


def campaign_on_hosts(world, out: Path, faults: int, budget_s: float, reference: Path, *, kinds: list[str], **settings):
    """The part on several hosts; all its kinds are named as not possible where this machine cannot be several."""
    from tests.chaos.campaign import Outcome
    from tests.chaos.host_campaign import HostCampaign
    from tests.chaos.host_faults import HOST_FAULTS, parts_here
    from tests.chaos.hosts import Hosts
    from tests.multinode.cluster_rig import missing_parts
    from tests.small_disk import ThrottledDisk

    say = settings["say"]
    missing = missing_parts() or ("" if _INSIDE in os.environ else "no mount namespace")
    if missing:
        say(f"chaos: no several hosts on this machine ({missing}): their faults are left out")
        return Outcome(skipped_kinds=kinds or list(HOST_FAULTS))
    disk = ThrottledDisk(out / "host_disk", out / "host_disk.img", HOST_DISK_BYTES)
    if disk.problem:
        say(f"chaos: no file system in a file ({disk.problem}): faults of a full and of a slow disk are left out")
    with Hosts(out, world) as hosts:
        parts = parts_here(clock=hosts.clock is not None, slow_disk=disk.can_be_slow)
        chaos = HostCampaign(
            hosts, world, out, None, disk=None if disk.problem else disk, parts=parts, kinds=kinds, **settings
        )
        return chaos.run(faults, budget_s, reference)


def small_disk(folder: Path, say) -> Path | None:
    """A file system of SMALL_DISK at `folder`, None where it cannot be mounted."""
    from tests.small_disk import mount

    folder.mkdir(parents=True, exist_ok=True)
    if _INSIDE not in os.environ:
        say("chaos: not root, so no small file system: faults of the disk are left out")
        return None
    if problem := mount(folder, SMALL_DISK):
        say(f"chaos: no small file system ({problem}): faults of the disk are left out")
        return None
    return folder


def table(summary: dict) -> str:
    """What was tried and what survived."""
    lines = [f"{'fault':36}{'tried':>7}{'survived':>10}"]
    lines += [f"{name:36}{kind['tried']:>7}{kind['survived']:>10}" for name, kind in summary["kinds"].items()]
    lines += [f"{'all':36}{summary['faults_tried']:>7}{summary['faults_survived']:>10}"]
    lines += [f"not possible here: {name}" for name in summary["kinds_not_possible_here"]]
    lines += [f"not tried: {name}" for name in summary["kinds_not_tried"]]
    lines.append(
        f"{summary['runs_compared']} runs of {summary['launches']} launches compared with the undisturbed one in "
        f"{summary['seconds'] / 60:.1f} min; worst "
        "relative difference after a change of the world size "
        f"{summary['worst_relative_difference_at_another_world_size']:.1e}"
    )
    lines += [f"PROBLEM {problem}" for problem in summary["problems"]] or [
        "nothing lost, nothing repeated, nothing hung"
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
