"""Curves at wandb: what rank 0 knows of the process that hands them over, and when a run is online at all."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.util import find_spec
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any, Literal, TypeAlias

import jp_train
from jp_train.config.choices import WandbMode
from jp_train.config.schema import RunConfig, WandbConfig
from jp_train.engine.checkpoint.identity import plain
from jp_train.errors import ConfigError
from jp_train.files import write_atomically
from jp_train.run.wandb_process import GRACE_S, Task
from jp_train.terminal import shortened

OpenMode: TypeAlias = Literal["online", "offline"]
MODES: tuple[OpenMode | Literal["disabled"], ...] = ("online", "offline", "disabled")

HOSTS = ("api.forge.coreweave.com", "api.wandb.ai")
"""Where `wandb login` logs in unless told otherwise: since wandb 0.31, and before."""
INIT_S = 20
FINISH_S = 30
"""Seconds that wandb may take to start and to end; see `Task`."""
MAX_REASON = 240
"""Characters."""


class Wandb:
    """One wandb run per run folder: its id is kept in `wandb/run_id`, so a resumed run continues the same curves. Where
    there is no id (a run that went back to a checkpoint, or had wandb disabled) the new run gets all steps before, too.

    A process of its own reads metrics.jsonl and hands it to wandb, so that no step and no start waits for a server.
    When wandb cannot be reached, refuses the run, or dies, the same values are written offline under the same id.

    `step` is an ordinary value with which every curve is plotted: wandb's own counter would refuse the steps that are
    trained again after a kill.
    """

    essential = False

    def __init__(
        self, run_dir: Path, cfg: WandbConfig, *, mode: OpenMode, config: Mapping[str, Any], name: str
    ) -> None:
        if find_spec("wandb") is None:
            raise ConfigError("wandb is not installed; pip install wandb, or set logging.wandb.mode: disabled")
        self._folder = run_dir / "wandb"
        self._folder.mkdir(parents=True, exist_ok=True)
        metrics = (run_dir / "metrics.jsonl").resolve()
        has_earlier_steps = (self._folder / "run_id").exists()
        self._task = Task(
            metrics=str(metrics),
            offset=metrics.stat().st_size if has_earlier_steps else 0,
            init={
                "dir": str(run_dir.resolve()),
                "project": cfg.project,
                "entity": cfg.entity,
                "group": cfg.group,
                "name": cfg.name or name,
                "tags": list(cfg.tags) or None,
                "id": kept_run_id(self._folder / "run_id", lambda: secrets.token_hex(4)),
                "config": without_secrets(config),
            },
            init_s=INIT_S,
            finish_s=FINISH_S,
        )
        self._reason = ""
        self._ending = False
        self._start(mode)

    @classmethod
    def opened(cls, cfg: RunConfig, resumed_step: int | None) -> Wandb | None:
        mode = wandb_mode(cfg.logging.wandb)
        if mode == "disabled":
            return None
        folder = Path(cfg.run_dir)
        name = f"{folder.resolve().parent.name}/{folder.resolve().name}"
        return cls(folder, cfg.logging.wandb, mode=mode, config=plain(asdict(cfg)), name=name)

    def log(self, step: int, values: Mapping[str, float]) -> str | None:
        """The process reads the values in metrics.jsonl; here is only looked after it."""
        return self._watch()

    def close(self) -> str | None:
        """Wait until wandb has everything, at most for a server that does not answer, and the same offline. Raises
        RuntimeError when wandb fails offline, too."""
        self._ending = True
        self._order("end")
        limit = INIT_S + FINISH_S + 3 * GRACE_S
        deadline = time.monotonic() + limit
        said = []
        while not self._over and (left := deadline - time.monotonic()) > 0:
            select.select([self._answers], [], [], left)
            said.append(self._watch())
        if not self._over:
            if self._pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._pid, signal.SIGKILL)
            said.append(self._unfinished(f"no end within {limit} s"))
        return "; ".join(filter(None, said)) or None

    def _start(self, mode: OpenMode) -> None:
        self._mode = mode
        self._pid: int | None = None
        self._run: str | None = None
        self._over = False
        self._unread = b""
        self._last: dict[str, Any] = {}
        paths = [str(Path(jp_train.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "WANDB_ERROR_REPORTING": "false"}
        environment["WANDB_SILENT"] = "false"  # into process.log, where `gave_up` reads
        with (self._folder / "process.log").open("a+b") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "jp_train.run.wandb_process"],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                env=os.environ | environment,
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._orders, self._answers = self._process.stdin, self._process.stdout.fileno()
        os.set_blocking(self._answers, False)
        init = self._task["init"] | {"mode": mode, "resume": "allow" if mode == "online" else None}
        self._order(json.dumps({**self._task, "init": init}))
        if self._ending:
            self._order("end")

    def _order(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # `_ended` says why
            self._orders.write(line.encode() + b"\n")

    def _watch(self) -> str | None:
        """Take what the process has answered by now. Returns what the user has to know; raises RuntimeError when wandb
        works not even offline."""
        trouble = None
        ended = False
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._answers, 1 << 16):
                self._unread += data
            ended = True
        *lines, self._unread = self._unread.split(b"\n")
        for line in lines:
            self._last = json.loads(line)
            self._pid = self._last.get("pid", self._pid)
            if "refused" in self._last:
                trouble = self._unfinished(self._last["refused"])
            if "started" in self._last:
                self._run = self._last["started"]
                if self._reason:
                    trouble = f"wandb is offline ({self._reason}); to upload later: {self._sync()}"
        return self._ended() or trouble if ended else trouble

    def _ended(self) -> str | None:
        """After the process: all is well, or something is left to upload, or the same begins offline."""
        self._process.wait()
        self._over = True
        if "finished" in self._last:
            return None
        reason = short(self._last.get("failed") or self._last.get("unsent") or "no answer")
        if self._mode == "offline":
            raise RuntimeError(reason)
        if self._ending and self._run is not None:
            return self._unfinished(reason)
        self._reason = reason
        self._start("offline")
        return None

    def _unfinished(self, reason: str) -> str:
        command = self._sync("--include-online")
        return f"wandb has not got all ({reason}); to upload the rest when the run has ended: {command}"

    def _sync(self, *options: str) -> str:
        """The command that uploads this attempt to the run that the others are in: `wandb sync` takes no notice of
        what a run already has unless it is told to resume."""
        folder = Path(self._run or self._folder)
        near = self._folder / folder.name
        return "WANDB_RESUME=allow " + shlex.join(["wandb", "sync", *options, str(near if near.exists() else folder)])


def wandb_mode(cfg: WandbConfig, environment: Mapping[str, str] = os.environ) -> OpenMode | Literal["disabled"]:
    """`online`, `offline` or `disabled`: `auto` is online when an API key is in the environment or ~/.netrc, and
    obeys WANDB_MODE."""
    configured = cfg.mode.value if cfg.mode is not WandbMode.auto else environment.get("WANDB_MODE", "").lower()
    for mode in MODES:
        if configured == mode:
            return mode
    if environment.get("WANDB_API_KEY"):
        return "online"
    url = environment.get("WANDB_BASE_URL")
    hosts = [url.split("://")[-1].split("/")[0]] if url else list(HOSTS)
    path = environment.get("NETRC") or str(Path(environment.get("HOME", "~")).expanduser() / ".netrc")
    try:
        known = any(netrc(path).authenticators(host) for host in hosts)
    except (OSError, NetrcParseError):
        known = False
    return "online" if known else "offline"


def short(reason: str) -> str:
    """One line of what wandb says, which may be a page of a proxy."""
    return shortened(without_secrets(reason), MAX_REASON)


def kept_run_id(path: Path, make: Callable[[], str]) -> str:
    """The id in `path`, made and stored on the first call."""
    if path.exists() and (kept := path.read_text(encoding="utf-8").strip()):
        return kept
    made = make()
    write_atomically(path, made + "\n")
    return made


_SECRET_KEY = re.compile(
    r"(^|[_-])(token|secret|password|passwd|credential|api_?key|access_?key)s?($|[_-])", re.IGNORECASE
)
_URL_SECRET = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*://)(?P<user>[^/@\s]*@)?(?P<rest>[^?\s]*)(?P<query>\?\S*)?", re.IGNORECASE
)


def without_secrets(config: Any) -> Any:
    """A copy of a configuration that may leave the machine: passwords and query strings of URLs and values of
    secret-looking keys are gone."""
    if isinstance(config, Mapping):
        return {key: "***" if _secret_key(str(key), value) else without_secrets(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [without_secrets(value) for value in config]
    if isinstance(config, str):
        return _URL_SECRET.sub(_scrub_url, config)
    return config


def _secret_key(key: str, value: Any) -> bool:
    return isinstance(value, str) and bool(_SECRET_KEY.search(key))


def _scrub_url(match: re.Match[str]) -> str:
    user = "***@" if match["user"] else ""
    query = "?***" if match["query"] else ""
    return f"{match['scheme']}{user}{match['rest']}{query}"
