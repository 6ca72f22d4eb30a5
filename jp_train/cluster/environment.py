"""What the ranks of a launch get of this shell's environment: settings by name, never a secret, nothing that a remote
shell would change."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jp_train.run.lock import LAUNCH_ID

PASSED_PREFIXES = (
    "CUDA_",
    "DEEPSPEED_",
    "DS_",
    "FI_",
    "GLOO_",
    "HF_",
    "JP_TRAIN_",
    "NCCL_",
    "OMP_",
    "TOKENIZERS_",
    "TORCH_",
    "TRITON_",
    "WANDB_",
)
PASSED_NAMES = ("LD_LIBRARY_PATH", "XDG_CACHE_HOME")
NOT_PASSED = ("CUDA_VISIBLE_DEVICES", "DS_ENV_FILE")
"""Set per host by the launcher, or meant for the runner alone."""
SET_BY_LAUNCH = ("JP_TRAIN_LAUNCH_ID", "JP_TRAIN_WORLD", "JP_TRAIN_LOGS", "JP_TRAIN_MASTER_")
"""What the launch sets for its ranks: long, and of no interest on a terminal."""
EXPORTED_BY_DEEPSPEED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|AUTH", re.IGNORECASE)
SECRET_LOOKALIKES = ("TOKENIZERS_",)
SAFE_VALUE = re.compile(r"[\w@%+=:,./ -]*")
"""Values that an `export NAME="value"` on the remote host leaves as they are."""


@dataclass(frozen=True)
class PassedEnvironment:
    """What remote ranks get of this shell's environment, and what is held back: secrets, and values that a shell
    would change."""

    lines: tuple[str, ...]
    secrets: tuple[str, ...]
    unsafe: tuple[str, ...]

    def text(self) -> str:
        """The `.deepspeed_env` file: one NAME=value a line; a comment or a blank line would crash the runner."""
        return "".join(f"{line}\n" for line in self.lines)

    def describe(self) -> list[str]:
        """Lines for the terminal: what is passed on, and what is not and why."""
        inherited = [line for line in self.lines if not line.startswith(SET_BY_LAUNCH)]
        return [
            f"environment of the ranks: {' '.join(inherited) or 'nothing of this shell'}",
            *(f"not passed on: {name} (it looks secret; log in on the hosts instead)" for name in self.secrets),
            *(f"not passed on: {name} (a remote shell would change it)" for name in self.unsafe),
        ]


def passed_environment(environ: Mapping[str, str]) -> PassedEnvironment:
    """Choose by name what remote ranks inherit. Secrets never: the runner would show them in every process list of
    the cluster."""
    lines, secrets, unsafe = [], [], []
    for name, value in sorted(environ.items()):
        if name in NOT_PASSED or not (name.startswith(PASSED_PREFIXES) or name in PASSED_NAMES):
            continue
        if is_secret(name):
            secrets.append(name)
        elif not SAFE_VALUE.fullmatch(value) or not value:
            unsafe.append(name)
        else:
            lines.append(f"{name}={value}")
    return PassedEnvironment(tuple(lines), tuple(secrets), tuple(unsafe))


def is_secret(name: str) -> bool:
    """Whether a variable's name says that its value is one."""
    return bool(SECRET.search(name)) and not name.startswith(SECRET_LOOKALIKES)


def runner_environment(
    environ: Mapping[str, str], launch_id: str, *, local: bool, launcher: str = "pdsh"
) -> dict[str, str]:
    """The environment of the runner (and, locally, of the ranks): this one, the launch's mark, and CPU settings where
    there is no GPU.

    For remote hosts, secrets that the launcher would pass on by itself are taken out (srun passes everything), and with
    pdsh also values that a shell would change.
    """
    env = {**environ, LAUNCH_ID: launch_id}
    if local and not has_gpu():
        env.setdefault("DS_ACCELERATOR", "cpu")
        # two ranks with two threads each on two busy cores are 20 times slower (docs/zero3.md, rule 9)
        env.setdefault("OMP_NUM_THREADS", "1")
    if local:
        return env
    for name in list(env):
        exported = launcher == "slurm" or name.startswith(EXPORTED_BY_DEEPSPEED)
        if exported and (is_secret(name) or (launcher == "pdsh" and not SAFE_VALUE.fullmatch(env[name]))):
            del env[name]
    return env


def has_gpu() -> bool:
    """By the driver's device files (NVIDIA, AMD): importing torch for it takes seconds, and the ranks do that
    anyway."""
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd"))


@contextmanager
def environment_file(passed: PassedEnvironment) -> Iterator[Path]:
    """A `.deepspeed_env` for the duration of the block."""
    with tempfile.TemporaryDirectory(prefix="jp_train_launch_") as folder:
        path = Path(folder) / "deepspeed_env"
        path.write_text(passed.text(), encoding="utf-8")
        yield path
