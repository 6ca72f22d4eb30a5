"""More that can happen to a host of the rig while it runs: packets get lost, its clock jumps."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

from tests.multinode.cluster_rig import Cluster, _checked

CLOCK = Path(__file__).with_name("wall_clock.c")
_LOSS = """\
table inet loss {{
  chain in {{ type filter hook input priority 0; iif "eth0" numgen random mod 100 < {percent} drop; }}
  chain out {{ type filter hook output priority 0; oif "eth0" numgen random mod 100 < {percent} drop; }}
}}
"""


def lose_packets(rig: Cluster, host: str, percent: int) -> None:
    """Drop so many of the packets that a host receives and sends, at random; 0: none any more. (tc's netem would do
    the same, but few kernels for machines in clouds have it.)"""
    nft = [*rig._enter(rig.nodes[host]), "--", "nft"]
    subprocess.run([*nft, "delete", "table", "inet", "loss"], check=False, capture_output=True)
    if percent:
        _checked([*nft, _LOSS.format(percent=percent)])


def build_clock(folder: Path) -> Path | None:
    """The library of `wall_clock.c`; None where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    library = folder / "wall_clock.so"
    _checked([compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(CLOCK), "-ldl"])
    return library


def clock_environment(rig: Cluster, host: str, library: Path) -> dict[str, str]:
    """What a program needs in its environment to see the clock of a host; right at first."""
    path = rig.folder / f"{host}.clock"
    if not path.exists():
        path.write_bytes(bytes(8))
    return {"LD_PRELOAD": str(library), "FAKE_CLOCK": str(path)}


def give_clock(rig: Cluster, host: str, library: Path) -> None:
    """All that starts through ssh on this host from now on sees a clock that `set_clock` sets."""
    settings = " ".join(f"{name}={value}" for name, value in clock_environment(rig, host, library).items())
    with (rig.folder / f"{host}.sshd_config").open("a") as file:
        file.write(f"SetEnv {settings}\n")
    rig.restart_sshd(host)


def set_clock(rig: Cluster, host: str, ahead_s: float) -> None:
    """The wall clock of a host with `give_clock` is so far ahead of the machine's from now on. Monotonic clocks, and
    the times that the file system gives to files, stay."""
    with (rig.folder / f"{host}.clock").open("r+b") as file:
        file.write(struct.pack("<q", round(ahead_s * 1e9)))
