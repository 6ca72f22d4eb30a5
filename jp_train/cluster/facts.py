"""What one host is, without importing torch: versions, code, configuration, devices, disks, left-over processes and
locks.

Facts only: `host_checks.py` decides what is wrong with them, from those of all hosts together. Linux; standard library
and, for the configuration, `jp_train.config`. Each fact fails alone: its value is then {"error": reason}.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import pwd
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jp_train.cluster.command import LOGS
from jp_train.cluster.signals import read_proc
from jp_train.files import file_system_time
from jp_train.run.lock import LAUNCH_ID

if TYPE_CHECKING:
    from jp_train.config import RunConfig

PACKAGES = ("torch", "deepspeed", "transformers", "numpy")
NCCL_PACKAGES = ("nvidia-nccl-cu13", "nvidia-nccl-cu12", "nvidia-nccl-cu11")
RUNNERS = (b"deepspeed.launcher.runner", b"pdsh", b"mpirun", b"srun")
"""Arguments (or programs) by which the one process that keeps a launch together is known."""
NVIDIA_SMI_S = 5.0
GPU_FREE_MIB = 1024
"""MiB in use up to which a GPU counts as free: the driver alone takes up to some hundred."""
GPU_REST_S = 3.0
"""The driver may take so long to free what a process that was just killed had."""
WRITTEN_BYTES = 64 << 10
"""Written and synced to find out whether a folder takes data: a disk may be full though it lists free inodes."""


@dataclass(frozen=True)
class Query:
    """What the launching host wants to know, and where this host looks it up."""

    config: str | None = None
    overrides: tuple[str, ...] = ()
    run_dir: str = ""
    """Empty without a configuration."""
    expected_launches: tuple[str, ...] = ()
    """Ids of launches whose processes are no fault."""
    proc: Path = Path("/proc")
    devices: Path = Path("/dev")

    def folders(self) -> dict[str, str]:
        """{what it is for: path} of all folders that a rank writes."""
        folders = cache_folders(os.environ) | ({"run folder": self.run_dir} if self.run_dir else {})
        index_dir = loaded_config(self.config, self.overrides).data.index_dir if self.config else ""
        return folders | ({"index cache": os.path.abspath(os.path.expanduser(index_dir))} if index_dir else {})


@dataclass(frozen=True)
class Fact:
    """`look_up` finds the value on this host, JSON-able; the checks get `harmless` where that failed. None: the checks
    get the error and report it."""

    look_up: Callable[[Query], Any]
    harmless: Any = None


FACTS = {
    "host_name": Fact(lambda query: socket.gethostname(), harmless=""),
    "python": Fact(lambda query: platform.python_version(), harmless="unknown"),
    "packages": Fact(lambda query: packages(), harmless={}),
    "driver": Fact(lambda query: driver_version(query.proc), harmless=""),
    "devices": Fact(lambda query: device_count(query.devices), harmless=0),
    "gpu_memory": Fact(lambda query: gpu_memory_at_rest() if device_count(query.devices) else [], harmless=[]),
    "cores": Fact(lambda query: len(os.sched_getaffinity(0)), harmless=1 << 20),
    "addresses": Fact(lambda query: host_addresses(), harmless=[]),
    "code": Fact(lambda query: code_digests()),
    "config": Fact(lambda query: config_text(query.config, query.overrides)),
    "disks": Fact(lambda query: {name: disk(Path(path)) for name, path in query.folders().items()}, harmless={}),
    "locks": Fact(lambda query: build_locks(Path(query.folders()["torch extensions"])), harmless=[]),
    "jobs": Fact(lambda query: launched_jobs(query.expected_launches, proc=query.proc), harmless=[]),
}
"""All facts of a host by name, in the order in which they are looked up. The checks of `checks.CHECKS` judge them."""


def host_facts(query: Query) -> dict[str, Any]:
    """{name: value} of FACTS on this host; {"error": reason} for one that could not be looked up."""
    return {name: _attempt(fact, query) for name, fact in FACTS.items()}


def packages() -> dict[str, str]:
    """Installed versions of what ranks must agree on, from the packages' metadata; `nccl` is that of torch's wheel."""
    versions = {name: _version(name) or "not installed" for name in PACKAGES}
    nccl = next(filter(None, map(_version, NCCL_PACKAGES)), None)
    return versions | ({"nccl": nccl} if nccl else {})


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def driver_version(proc: Path = Path("/proc")) -> str:
    """Version of the NVIDIA kernel driver; empty without one."""
    try:
        text = (proc / "driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    match = re.search(r"Kernel Module.*?\s(\d+\.\d+[\d.]*)", text)
    return match[1] if match else "unreadable"


def device_count(devices: Path = Path("/dev")) -> int:
    """GPUs by the driver's device files, as NVIDIA (nvidia0, nvidia1, ...) and AMD (one render node each, beside kfd)
    make them; 0 on a CPU host.

    torch would give the same number, but seconds later and only when its build fits the driver.
    """
    nvidia = [path for path in devices.iterdir() if re.fullmatch(r"nvidia\d+", path.name)]
    if nvidia or not (devices / "kfd").exists():
        return len(nvidia)
    return len(list((devices / "dri").glob("renderD*")))


def gpu_memory(command: Sequence[str] = ("nvidia-smi",)) -> list[list[int]]:
    """[index, MiB in use, MiB in all] of each GPU according to nvidia-smi; empty where there is no nvidia-smi.

    Raises RuntimeError when it fails or hangs, which is what it does on a host with a broken GPU.
    """
    columns = ["--query-gpu=index,memory.used,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            [*command, *columns], capture_output=True, text=True, errors="replace", timeout=NVIDIA_SMI_S, check=False
        )
    except FileNotFoundError:
        return []
    except subprocess.TimeoutExpired:
        raise RuntimeError(
            f"nvidia-smi gave no answer within {NVIDIA_SMI_S:g} s: a GPU hangs, or persistence mode is off "
            "(`nvidia-smi -pm 1`)"
        ) from None
    if done.returncode:
        raise RuntimeError(
            f"nvidia-smi ended with code {done.returncode}: {(done.stdout + done.stderr).strip()[-200:]}"
        )
    rows = [[field.strip() for field in line.split(",")] for line in done.stdout.splitlines()]
    # MIG: [N/A]
    return [[int(field) for field in row] for row in rows if len(row) == 3 and all(field.isdigit() for field in row)]


def gpu_memory_at_rest(read: Callable[[], list[list[int]]] = gpu_memory) -> list[list[int]]:
    """`gpu_memory`, read again while a GPU is in use, for GPU_REST_S: a restart examines hosts whose ranks have only
    just been killed."""
    deadline = time.monotonic() + GPU_REST_S
    memory = read()
    while any(used > GPU_FREE_MIB for _, used, _ in memory) and time.monotonic() < deadline:
        time.sleep(GPU_REST_S / 10)
        memory = read()
    return memory


def host_addresses() -> list[str]:
    """All addresses of the host as `hostname -I` lists them: the first host's first one is the rendezvous."""
    done = subprocess.run(["hostname", "-I"], capture_output=True, text=True, timeout=5, check=True)
    return done.stdout.split()


def code_digests(package: Path | None = None) -> dict[str, str]:
    """{path inside the package: digest} of the jp_train that this process has imported."""
    root = package or Path(__file__).resolve().parent.parent
    files = [
        path for path in sorted(root.rglob("*")) if path.suffix in (".py", ".yaml") and "__pycache__" not in path.parts
    ]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in files}


def config_text(config: str | None, overrides: Sequence[str]) -> str | None:
    """The resolved configuration as this host reads it; None without `config`. Raises ConfigError."""
    if config is None:
        return None
    from jp_train.config import dump_config

    return dump_config(loaded_config(config, tuple(overrides)))


@lru_cache(maxsize=1)
def loaded_config(config: str, overrides: tuple[str, ...]) -> RunConfig:
    """The configuration, read once for all questions: resolving it takes longer than most of them need. Raises
    ConfigError."""
    from jp_train.config import load_config

    return load_config(config, overrides)


def cache_folders(environ: Mapping[str, str]) -> dict[str, str]:
    """{what it is for: path} of the folders that a rank writes besides the run folder, as the libraries choose them
    from their variables."""
    cache = environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return {
        "torch extensions": environ.get("TORCH_EXTENSIONS_DIR") or os.path.join(cache, "torch_extensions"),
        "Hugging Face cache": environ.get("HF_HOME") or os.path.join(cache, "huggingface"),
        "index cache": os.path.join(cache, "jp_train"),
        "temporary files": environ.get("TMPDIR") or "/tmp",  # tempfile.gettempdir() goes elsewhere when that is full
        "shared memory": "/dev/shm",
    }


def disk(folder: Path) -> dict[str, Any]:
    """The disk of `folder`: `path`; `there`, the nearest folder that exists; `free` and `size` in bytes; `device`; and
    `error` with `errno` if no file could be written."""
    facts: dict[str, Any] = {"path": str(folder), "there": str(folder)}
    try:
        there = nearest(folder)
        facts["there"] = str(there)
        about = os.statvfs(there)
        facts |= {
            "free": about.f_bavail * about.f_frsize,
            "size": about.f_blocks * about.f_frsize,
            "device": os.stat(there).st_dev,
        }
        with tempfile.NamedTemporaryFile(dir=there, prefix=".jp_train_preflight_") as file:
            file.write(b"\0" * WRITTEN_BYTES)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        facts |= {"error": error.strerror or str(error), "errno": error.errno}
    return facts


def nearest(folder: Path) -> Path:
    """The folder, or its nearest parent that exists. Raises OSError when that cannot be decided: no permission, a
    stale file handle, a link to nowhere."""
    while True:
        try:
            folder.stat()
            return folder
        except (FileNotFoundError, NotADirectoryError):
            if folder.is_symlink() or folder == folder.parent:
                raise
            folder = folder.parent


def build_locks(folder: Path) -> list[dict[str, Any]]:
    """Lock files of torch's extension builder, with their age in seconds: a process that loads the extension waits
    until the file is gone."""
    locks = sorted({*folder.glob("*/lock"), *folder.glob("*/*/lock")})
    return [
        {"path": str(path), "age_s": max(0.0, file_system_time(path.parent) - path.stat().st_mtime)} for path in locks
    ]


def launched_jobs(expected: Collection[str], *, proc: Path = Path("/proc")) -> list[dict[str, Any]]:
    """Processes of launches that are not `expected` on this host, by the mark in their environment: `launch`, `pid`,
    `command`, whether it is the launch's `runner`, the `user` it runs as, whether that is ours (`own`; of root, whom
    several people may be, nobody's), and the `run_dir` of the launch, empty where it keeps no logs."""
    jobs = []
    for entry in proc.iterdir():
        if not entry.name.isdigit():
            continue
        pairs = (item.decode(errors="replace").partition("=") for item in read_proc(entry / "environ").split(b"\0"))
        variables = {name: value for name, _, value in pairs if name in (LAUNCH_ID, LOGS)}
        launch, logs = variables.get(LAUNCH_ID, ""), variables.get(LOGS, "")
        words = read_proc(entry / "cmdline").split(b"\0")
        if launch and launch not in expected and words != [b""]:  # a zombie has no command line
            command = b" ".join(words).decode(errors="replace").strip()
            job = {"launch": launch, "pid": int(entry.name), "command": command[:200], "runner": _is_runner(words)}
            run_dir = str(Path(logs).parent.parent) if logs else ""  # RUN_DIR/logs/LAUNCH
            jobs.append(job | _owner(entry) | {"run_dir": run_dir})
    return sorted(jobs, key=lambda job: job["pid"])


def _owner(process: Path) -> dict[str, Any]:
    """`user` and `own` of a process of /proc; nobody's where it has ended meanwhile."""
    try:
        number = process.stat().st_uid
        user = pwd.getpwuid(number).pw_name
    except OSError:
        return {"user": "?", "own": False}
    except KeyError:  # of a container, without a name
        user = str(number)
    return {"user": user, "own": number != 0 and number == os.geteuid()}


def _is_runner(words: Sequence[bytes]) -> bool:
    return RUNNERS[0] in words or os.path.basename(words[0]) in RUNNERS[1:]


def port_holder(port: int, *, proc: Path = Path("/proc")) -> str:
    """`pid 12 (python -m ...)` that listens on a TCP port of this host; empty when it cannot be found (a
    process of another user)."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        for line in read_proc(proc / "net" / table).decode().splitlines()[1:]:
            fields = line.split()
            if len(fields) > 9 and fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{fields[9]}]")
    for entry in proc.iterdir():
        if entry.name.isdigit() and inodes & _open_files(entry):
            command = read_proc(entry / "cmdline").replace(b"\0", b" ").decode(errors="replace").strip()
            return f"pid {entry.name} ({command[:120]})"
    return ""


def _open_files(process: Path) -> set[str]:
    """What a process of /proc has open; empty for a process of another user."""
    targets = set()
    with contextlib.suppress(OSError):
        for link in (process / "fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                targets.add(os.readlink(link))
    return targets


def write_marker(folder: Path, name: str, text: str) -> str:
    """Write a file that other hosts are to see into the folder, or its nearest parent that exists. Returns that folder.
    Raises OSError.

    No folder is made: an NFS client that has just looked up a folder in vain believes for up to a minute that it is not
    there, whatever another host makes. A name that nobody has looked up before is looked up on the server at once.
    """
    there = nearest(folder)
    (there / name).write_text(text, encoding="utf-8")
    return str(there)


def has_marker(folder: Path, name: str, text: str, *, wait_s: float) -> bool:
    """Whether the file is here too, with this text. A network file system may show it a few seconds late."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            os.listdir(folder)  # makes NFS query its server again
            if (folder / name).read_text(encoding="utf-8") == text:
                return True
        except (OSError, UnicodeDecodeError):
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.25)


def remove_marker(folder: Path, name: str) -> None:
    """Undo `write_marker` in the folder that it returned."""
    (folder / name).unlink(missing_ok=True)


def _attempt(fact: Fact, query: Query) -> Any:
    try:
        return fact.look_up(query)
    except Exception as error:  # one fact that cannot be had must not hide the others
        return {"error": f"{type(error).__name__}: {error}"}
