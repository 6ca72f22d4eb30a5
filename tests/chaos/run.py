"""`make chaos`: kill, stop, starve and corrupt a training run on purpose, and see whether anything is lost.

    python -m tests.chaos.run [--faults 200] [--seed 0] [--steps 22] [--minutes 30] [--out runs/chaos] [--kinds a,b]
    [--json] [--list]

The smoke model is trained by real ZeRO-3 ranks (gloo) in short runs. Every launch of them is disturbed in one way, then
the same command is given again. At the end of each run its metrics and ledger are compared with an undisturbed run's.
Exit status 1 if anything did not hold.

The faults of a full disk need a small file system: as root one of 160 MiB is mounted, in a mount namespace that ends
with this command.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import uuid
from pathlib import Path

HERE = Path(__file__).resolve().parent

SMALL_DISK = "160m"
_INSIDE = "JP_CHAOS_MOUNTS"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200, help="how many to inject (default 200)")
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
    parser.add_argument("--minutes", type=float, default=30.0, help="stop injecting after this time (default 30)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/chaos"), help="logs of every launch, and chaos.json (default runs/chaos)"
    )
    parser.add_argument("--kinds", default="", help="only these, separated by commas")
    parser.add_argument("--list", action="store_true", help="print the kinds of fault and end")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout; progress goes to stderr")
    arguments = parser.parse_args()
    from tests.chaos.faults import FAULTS

    if arguments.list:
        for fault in FAULTS.values():
            print(
                f"{fault.name:36}{'running' if fault.running else 'down':9}"
                f"{'needs a small disk' if fault.needs_small_disk else ''}"
            )
        return 0
    kinds = [name for name in arguments.kinds.split(",") if name]
    unknown = [name for name in kinds if name not in FAULTS]
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
    from tests.chaos.campaign import Campaign
    from tests.chaos.chaos_world import build_world
    from tests.distributed import Nursery

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    out = arguments.out.resolve()
    for old in (out / "logs", out / "undisturbed", *out.glob("run[0-9]*")):
        shutil.rmtree(old, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    say(
        f"chaos: {arguments.faults} faults, seed {arguments.seed}, at most {arguments.minutes:g} min; "
        f"everything under {out}"
    )
    world = build_world(out / f"world{arguments.seed}", arguments.seed)
    with Nursery(HERE / "chaos_worker.py") as nursery:
        chaos = Campaign(
            world,
            out,
            nursery,
            seed=arguments.seed,
            steps=arguments.steps,
            collective_timeout_s=arguments.collective_timeout,
            small_disk=small_disk(out / "disk", say),
            marker=marker,
            kinds=kinds,
            say=say,
        )
        outcome = chaos.run(arguments.faults, arguments.minutes * 60)
    summary = outcome.as_dict()
    (out / "chaos.json").write_text(json.dumps(summary, indent=1))
    print(json.dumps(summary) if arguments.json else table(summary), flush=True)
    return 1 if summary["problems"] else 0


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
