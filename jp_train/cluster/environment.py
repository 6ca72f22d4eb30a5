"""What the ranks of a launch get of this shell's environment and of a `.deepspeed_env`: settings by name, never a
secret, and every value as it is.

Values reach remote ranks by the words of one quoted command (`remote.shell_text`, which preflight's probes use too),
by `mpirun -x NAME`, or with srun's whole environment: no shell changes them on the way.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jp_train.errors import ConfigError, LaunchError
from jp_train.files import has_gpu_files
from jp_train.run.lock import LAUNCH_ID

PASSED_PREFIXES = (
    "AWS_",
    "AZURE_",
    "CLOUDSDK_",
    "CUBLAS_",
    "CUDA_",
    "DEEPSPEED_",
    "DS_",
    "FI_",
    "GLOO_",
    "GOOGLE_",
    "HF_",
    "JP_TRAIN_",
    "MKL_",
    "MLFLOW",
    "MV2",
    "NCCL",
    "NVTE_",
    "OFI_",
    "OMP_",
    "PYTHON",
    "PYTORCH_",
    "TOKENIZERS_",
    "TORCH_",
    "TRITON_",
    "UCX",
    "WANDB_",
)
"""Those without an underscore are what DeepSpeed's runner exports by itself."""
PASSED_NAMES = (
    "CURL_CA_BUNDLE",
    "LD_LIBRARY_PATH",
    "REQUESTS_CA_BUNDLE",
    "SSL_CERT_DIR",
    "SSL_CERT_FILE",
    "TMPDIR",
    "XDG_CACHE_HOME",
    *(case(name) for name in ("http_proxy", "https_proxy", "no_proxy", "all_proxy") for case in (str, str.upper)),
)
ENV_FILE = "DS_ENV_FILE"
"""The variable by which DeepSpeed's users name another file than `.deepspeed_env`."""
SET_BY_LAUNCH = (LAUNCH_ID, "JP_TRAIN_WORLD", "JP_TRAIN_LOGS", "JP_TRAIN_MASTER_")
"""What the launch sets for its ranks: long, and of no interest on a terminal."""
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|AUTH|CONNECTION_STRING", re.IGNORECASE)
NO_SECRET = re.compile(
    r"TOKENIZERS_.*|(NCCL|UCX)_IB_PKEY|(AWS|AZURE|HF)_\w+_(FILE|PATH)|GOOGLE_APPLICATION_CREDENTIALS|"
    "AZURE_AUTHORITY_HOST"
)
"""The clouds' are places where the secrets lie."""
STORES = re.compile(r"(AWS|AZURE|GOOGLE)_.*|HF_TOKEN")
"""Whose secrets ranks need to read their data, and which go to them by another way than a command line."""
PASSWORD = re.compile(r"://[^/\s@]*:[^/\s@]+@")
"""In a URL, as in `http://user:password@proxy:3128`."""
CONTROL = re.compile("[\0-\x08\n-\x1f\x7f\ud800-\udfff]")
"""Control characters but the tab, and bytes that are no UTF-8: an environment can have them, a command line or a file
of one variable a line cannot."""
CHANGED_BY_SHELL = re.compile(r'["$`\\]')


@dataclass(frozen=True)
class PassedEnvironment:
    """What remote ranks get of this shell's environment, and the names that are held back, each with the reason."""

    variables: Mapping[str, str]
    held_back: Mapping[str, str]
    files: Mapping[str, Path]
    """Of the variables that a `.deepspeed_env` has set: which one."""
    credentials: Mapping[str, str] = field(default_factory=dict)
    """Of object stores: never on a command line, see credentials.py; srun passes them with its environment."""

    def describe(self) -> list[str]:
        """Lines for the terminal: what is passed on and from which file, and what is not and why."""
        shown = {name: value for name, value in self.variables.items() if not name.startswith(SET_BY_LAUNCH)}
        words = [f"{name}={shlex.quote(value)}" for name, value in shown.items()]
        lines = [f"environment of the ranks: {' '.join(words) or 'nothing of this shell'}"]
        for file in dict.fromkeys(self.files.values()):
            names = [name for name, source in self.files.items() if source == file and name in shown]
            lines += [f"of these from {file}: {' '.join(names) or 'none'}"]
        if self.credentials:
            lines.append(f"handed to the ranks unseen: {' '.join(self.credentials)}")
        for reason in dict.fromkeys(self.held_back.values()):
            names = [
                f"{name} of {self.files[name]}" if name in self.files else name
                for name, why in self.held_back.items()
                if why == reason
            ]
            lines.append(f"not passed on: {', '.join(names)} ({reason})")
        return lines


def passed_environment(
    environ: Mapping[str, str], *, more: Collection[str] = (), launcher: str = "pdsh"
) -> PassedEnvironment:
    """Choose by name what remote ranks inherit of `environ`, with `more` names, and add the `.deepspeed_env`, whose
    values come before the shell's.

    Secrets never, as they would be in every process list of the cluster: those of object stores are `credentials`, the
    others are held back. Raises LaunchError for a line of the file that is
    no NAME=value, ConfigError for a name of `more` that is not set.
    """
    if absent := [name for name in more if name not in environ]:
        raise ConfigError(f"--env {absent[0]}: it is not set in this shell (`export {absent[0]}=...` first)")
    slurm = launcher == "slurm"  # it passes on everything, so that all secrets are taken out
    chosen = {
        name: value
        for name, value in environ.items()
        if name.startswith(PASSED_PREFIXES) or name in PASSED_NAMES or name in more or (slurm and is_secret(name))
    }
    from_files = deepspeed_env(environ)
    chosen |= {name: value for name, (value, _) in from_files.items()}
    chosen.pop(ENV_FILE, None)  # meant for the launch, which has read it
    held_back, credentials = {}, {}
    for name, value in sorted(chosen.items()):
        reason = _why_not(name, value)
        if name in from_files and name.startswith(SET_BY_LAUNCH):
            reason = "the launch sets it"
        elif name == "CUDA_VISIBLE_DEVICES" and not slurm:
            reason = "the launcher sets it on every host; choose with --include or the hostfile's slots"
        if is_secret(name) and STORES.fullmatch(name):
            credentials[name] = value
        elif reason:
            held_back[name] = reason
    variables = {name: value for name, value in sorted(chosen.items()) if name not in {*held_back, *credentials}}
    return PassedEnvironment(variables, held_back, {name: path for name, (_, path) in from_files.items()}, credentials)


def _why_not(name: str, value: str) -> str:
    if not NAME.fullmatch(name):
        return "not a name of letters, digits and underscores"
    if is_secret(name):
        return "it looks secret, and would be in the process lists of all hosts; log in on the hosts instead"
    if PASSWORD.search(value):
        return "its URL has a password, which would be in the process lists of all hosts"
    if CONTROL.search(value):
        return "it has a line break, another control character or bytes that are no UTF-8"
    return ""


def is_secret(name: str) -> bool:
    """Whether a variable's name says that its value is one."""
    return bool(SECRET.search(name)) and not NO_SECRET.fullmatch(name)


def deepspeed_env_files(environ: Mapping[str, str]) -> list[Path]:
    """Where DeepSpeed's runner looks for a `.deepspeed_env` (or what DS_ENV_FILE names): the home folder, then this
    folder, whose values come last. Those that are there; raises LaunchError when DS_ENV_FILE names none."""
    named = environ.get(ENV_FILE, "")
    folders = (environ.get("HOME") or os.path.expanduser("~"), ".")
    places = dict.fromkeys(Path(folder).resolve() / (named or ".deepspeed_env") for folder in folders)
    there = [path for path in places if path.is_file()]
    if named and not there:
        raise LaunchError(f"{ENV_FILE}={named}: there is no {' and no '.join(map(str, places))}; correct or unset it")
    return there


def deepspeed_env(environ: Mapping[str, str]) -> dict[str, tuple[str, Path]]:
    """The variables of the `.deepspeed_env` files, with the file of each. Comments and blank lines, on which DeepSpeed
    fails, are left out.

    A value is taken as it is written. Raises LaunchError with file and line for a line that is no NAME=value, and for a
    value that DeepSpeed's pdsh launcher would have the remote shells change (it puts it between double quotes).
    """
    variables = {}
    for path in deepspeed_env_files(environ):
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="surrogateescape").split("\n"), start=1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            name, equals, value = (part.strip() for part in line.partition("="))
            if not equals or not NAME.fullmatch(name):
                shown = f" ({name[:40]!r} is no name)" if equals else ""
                raise LaunchError(f"{path}, line {number}: expected NAME=value, without export or quotes{shown}")
            if changed := CHANGED_BY_SHELL.search(value):
                raise LaunchError(
                    f"{path}, line {number}: the value of {name} has a {changed[0]}, which remote shells would change "
                    "under DeepSpeed's launcher; write the plain value without quotes, or set the variable in this "
                    f"shell and launch with --env {name}"
                )
            variables[name] = (value, path)
    return variables


def runner_environment(
    environ: Mapping[str, str], passed: PassedEnvironment, *, local: bool, launcher: str = "pdsh"
) -> dict[str, str]:
    """The environment of the launcher's process (and, locally, of the ranks): this one, with CPU settings where there
    is no GPU; for remote hosts with what the ranks get, and without what srun would pass on to all of them, and mpirun
    to those on this host."""
    env = dict(environ)
    if local:
        if not has_gpu_files():
            env.setdefault("DS_ACCELERATOR", "cpu")
            # two ranks with two threads each on two busy cores are 20 times slower (docs/zero3.md, rule 9)
            env.setdefault("OMP_NUM_THREADS", "1")
        return env
    if launcher != "pdsh":
        env = {name: value for name, value in env.items() if name not in passed.held_back}
    return {**env, **passed.variables}
