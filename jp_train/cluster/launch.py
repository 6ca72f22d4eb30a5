"""Hostfile -> checked cluster -> the deepspeed command, watched to its end and started again where that helps.

`launch` is the whole way of a training run: configuration, preflight, command, `_start` (one start of all ranks), and
the restarts. The parts are in `jp_train/cluster/`: hostfile, options, environment, command, running (signals, and
nothing left behind), supervision (what no launcher notices), records (logs and ends of ranks), outcome (exit code and
cause) and restarts. What DeepSpeed's runner does silently is an error or repaired there. One local host needs no ssh.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

from jp_train.cluster.command import rank_variables, ranks_command
from jp_train.cluster.credentials import hand_over, take_back
from jp_train.cluster.environment import deepspeed_env_files, passed_environment, runner_environment
from jp_train.cluster.findings import Report
from jp_train.cluster.hostfile import Selection, runs_locally, world_size
from jp_train.cluster.options import PDSH_SSH_ARGS, LaunchOptions
from jp_train.cluster.outcome import Outcome, explain, judge
from jp_train.cluster.records import LAUNCHER_LOG, new_launch_id, open_logs, read_records
from jp_train.cluster.remote import first_address
from jp_train.cluster.restarts import (
    Progress,
    Restart,
    Standing,
    has_checkpoints,
    largest_usable,
    plan_restart,
    standing,
    worth_starting,
)
from jp_train.cluster.running import Run, StopSignals, say, sweep
from jp_train.cluster.supervision import Supervision, ask_hosts
from jp_train.config import RunConfig, batch_plan, load_config
from jp_train.errors import ConfigError, LaunchError
from jp_train.files import has_gpu_files
from jp_train.run.lock import LAUNCH_ID, release_dead_launch, require_free

PROGRAMS = {
    "pdsh": ("pdsh", "pdsh openssh-client"),
    "openmpi": ("mpirun", "openmpi-bin openssh-client"),
    "slurm": ("srun", "slurm-client"),
}
"""What each launcher needs on this host, and Debian's packages with it."""
KEEP_ALIVE = "-o BatchMode=yes -o ServerAliveInterval=15 -o ServerAliveCountMax=8"
UNRELIABLE_KILLS = 2
"""A host on which ranks were killed so often is left out of a restart if the run can do without it."""
SETTLE_S = 15.0
"""Killed processes give back GPU memory, ports and locks seconds after they are gone: a host is left out for a fault
that is still there then."""


LOCAL_SKIP = ("versions", "code", "config", "port", "reach", "bandwidth")
"""Preflight's checks that compare hosts, or load torch: one local host does without. Its port is asked for last."""
LOCAL_TIMEOUT_S = 60.0
"""Of a preflight question to this host, which may be busy with anything."""

Startable: TypeAlias = Callable[[RunConfig, LaunchOptions], str]
"""Raises a JpTrainError for a run that could not start; returns the sentence about a finished run, else nothing."""


def launch(
    config_path: str | os.PathLike[str],
    overrides: Sequence[str],
    options: LaunchOptions,
    require_startable: Startable = lambda cfg, options: "",
) -> int:
    """Check everything that can be known, print the batch arithmetic and the command, run it, and return the ranks'
    exit code.

    SIGTERM, SIGINT and SIGUSR1 go to every rank at once; the ranks save and exit, or are killed after `grace_s` seconds
    or by a second signal. A run that ends because of a host or a rank goes on from its newest checkpoint,
    `max_restarts` times, without the hosts that do not answer. `dry_run` stops after printing and returns 0; so does a
    finished run, at once. `require_startable` looks at the run before any host is asked. Raises what that raises,
    ConfigError (configuration, filter, ranks that do not divide the rows) and LaunchError (hostfile, preflight, busy
    port, missing program, a run folder in use, a rank that was killed, a host that is gone).
    """
    cfg = load_config(config_path, overrides)
    if finished := require_startable(cfg, options):
        say(finished)
        if not options.dry_run:
            return 0
    if not options.dry_run:
        require_free(cfg.run_dir)
    target = ["train", str(config_path), *overrides]
    with StopSignals().installed() as stop:
        return _Attempts(cfg, target, options, stop, _Preflight(config_path, overrides)).run()


def launch_ranks(target: Sequence[str], options: LaunchOptions) -> int:
    """Run `jp_train TARGET...` on every slot of a hostfile, once, and return the ranks' exit code. Signals,
    `dry_run` and errors as in `launch`."""
    with StopSignals().installed() as stop:
        return _final_code(_start(target, options, stop, launch_id=new_launch_id()), 0)


def _start(
    target: Sequence[str], options: LaunchOptions, stop: StopSignals, *,
    launch_id: str, facts: str = "", run_dir: Path | None = None, progress: Progress | None = None,
) -> Outcome:  # fmt: skip
    """One start of all ranks, to its end. `facts` is printed before the command. Without `run_dir` there are no
    logs, and all ranks write to the terminal."""
    selection = options.selection()
    local = runs_locally(selection)
    options = options.with_free_port()
    logs = None if run_dir is None or options.dry_run else _logs(run_dir, launch_id)
    if options.launcher == "pdsh" and not (local or options.dry_run or options.master_addr):
        first = first_address(next(iter(selection)), ssh_args=options.ssh_words())
        if not first.ok:
            cause = f"host {first.host} does not tell its address: {first.summary}"
            return Outcome(LaunchError.exit_code, cause, "yes", lost={first.host: first.summary})
        options = replace(options, master_addr=first.stdout)
    given = {**os.environ, LAUNCH_ID: launch_id} | rank_variables(options, str(logs or ""))
    passed = passed_environment(given, more=options.env, launcher=options.launcher)
    env = runner_environment(given, passed, local=local, launcher=options.launcher)
    command = ranks_command(target, options, passed)
    lines = [f"{world_size(selection)} ranks on {_describe(selection)}{' (this host)' if local else ''}"]
    lines += [facts] if facts else []
    unread = [f"not read, as all ranks are on this host: {path}" for path in deepspeed_env_files(os.environ)]
    lines += unread if local else passed.describe()
    lines += [f"logs of the ranks: {logs}"] if logs else []
    lines += [f"command: {shlex.join(command)}"]
    print("\n".join(lines), file=sys.stdout if options.dry_run else sys.stderr, flush=True)
    if options.dry_run:
        return Outcome(0)
    _check_ready(selection, options, local=local)
    if not local:
        env[PDSH_SSH_ARGS] = " ".join([*options.ssh_words(), KEEP_ALIVE])
    placed = [host for host, slots in selection.items() for _ in slots]
    remote = () if local else tuple(selection)
    slurm = options.launcher == "slurm" and not local
    watch = None
    if not local and not slurm:  # on this host the runner sees what happens; Slurm watches its nodes itself
        watch = Supervision(
            logs, run_dir, launch_id, placed, patience_s=options.patience_s, grace_s=options.grace_s,
            ask=partial(ask_hosts, ssh_args=options.ssh_words()),
        )  # fmt: skip
    with _credentials_on(remote if not slurm else (), launch_id, passed.credentials, options.ssh_words()) as lost:
        if lost:
            cause = (
                f"credentials of the object stores cannot be handed to {', '.join(lost)}: {next(iter(lost.values()))}"
            )
            return Outcome(LaunchError.exit_code, cause, "yes", lost=lost)
        ending = Run(
            command, env, launch_id, remote, stop, grace_s=options.grace_s,
            supervision=watch, signal_launcher=slurm, notice=lambda: _report_progress(progress, run_dir),
            output=logs and logs / LAUNCHER_LOG, ssh_args=options.ssh_words(),
        ).wait()  # fmt: skip
    records = read_records(logs)
    outcome = judge(ending, records, stop.number, _failure(progress))
    if outcome.code and stop.number is None:
        lines = explain(records, len(placed))
        # the cause of a "yes" becomes the error's message instead
        if not lines and outcome.again == "if_advanced":
            lines = [outcome.cause]
        for line in lines:
            say(line)
    return outcome


@contextmanager
def _credentials_on(
    hosts: Sequence[str], launch_id: str, credentials: Mapping[str, str], ssh_args: Sequence[str]
) -> Iterator[dict[str, str]]:
    """The credentials of object stores in the memory of `hosts`, as long as ranks may run there; gives the hosts that
    do not take them, and why."""
    if not (hosts and credentials):
        yield {}
        return
    try:
        yield hand_over(hosts, launch_id, credentials, ssh_args=ssh_args)
    finally:
        take_back(hosts, launch_id, ssh_args=ssh_args)


class _Attempts:
    """The starts of one run, until it has ended or another start would not help."""

    def __init__(
        self, cfg: RunConfig, target: Sequence[str], options: LaunchOptions, stop: StopSignals, preflight: _Preflight
    ) -> None:
        self._cfg, self._target, self._options, self._stop, self._preflight = cfg, target, options, stop, preflight
        self._run_dir = Path(cfg.run_dir)
        self._all_hosts: Selection = options.selection()
        self._launch_ids: list[str] = []
        self._kills: Counter[str] = Counter()
        """How often ranks of each host were killed."""
        self._restart: Restart | None = None
        self._furthest_step = standing(self._run_dir).checkpoint_step or 0
        self._fell_short = False

    def run(self) -> int:
        """The exit code of the last start, or 128 + n when signal n came while no rank was running. Raises as
        `launch` does."""
        batch = self._batch()  # a world size that does not fit is an error before any host is asked
        try:
            with self._stop.interrupting():
                self._preflight.require_fit(self._options, self._all_hosts)
            while True:
                launch_id, progress = new_launch_id(), Progress(self._run_dir, self._restart)
                outcome = _start(
                    self._target, self._options, self._stop, launch_id=launch_id, facts=batch, run_dir=self._run_dir,
                    progress=progress,
                )  # fmt: skip
                if not self._worth_another(outcome, progress):
                    return _final_code(outcome, self._restarts)
                self._launch_ids.append(launch_id)
                self._plan_restart(outcome, progress)
                batch = self._batch()
        except KeyboardInterrupt:
            return _stopped_before_start(self._stop)

    @property
    def _restarts(self) -> int:
        return 0 if self._restart is None else self._restart.number

    def _batch(self) -> str:
        """The batch arithmetic in words. Raises ConfigError for ranks that do not divide the rows of a step."""
        ranks = world_size(self._options.selection())
        return batch_plan(self._cfg, ranks, shrink=has_checkpoints(self._run_dir)).describe()

    def _worth_another(self, outcome: Outcome, progress: Progress) -> bool:
        """Whether to start again after the start that made this progress."""
        last = progress.now()
        advanced = progress.moved and last.step > self._furthest_step
        fell_short = not (progress.moved and last.step >= self._furthest_step)
        before, self._fell_short = self._fell_short, fell_short
        self._furthest_step = max(self._furthest_step, last.step)
        if self._stop.number is not None or self._restarts >= self._options.max_restarts:
            return False
        return worth_starting(
            outcome.again, first=self._restart is None, advanced=advanced, fell_short=fell_short, before=before
        )

    def _plan_restart(self, outcome: Outcome, progress: Progress) -> None:
        """Choose the hosts of the next start, print and store what it costs. Raises LaunchError when no host can be
        used, KeyboardInterrupt for a stop signal."""
        selection = self._options.selection()
        self._kills.update(outcome.killed_on)
        # idle, or lost before: they may have recovered
        idle = [host for host in self._all_hosts if host not in selection]
        unswept = sweep(idle, *self._launch_ids, lost=idle, ssh_args=self._options.ssh_words())
        silent = dict(outcome.lost) | {host: answer.summary for host, answer in unswept.items()}
        with self._stop.interrupting():
            usable = self._usable_hosts(silent)
        # rank 0's host has answered that nothing of the old launch is left there
        if next(iter(selection)) in usable:
            release_dead_launch(self._run_dir, self._launch_ids[-1])
        self._restart = plan_restart(
            self._restarts + 1, self._options.max_restarts, outcome.cause, self._all_hosts, selection, usable,
            progress.now(), down_s=progress.quiet_s,
        )  # fmt: skip
        say(self._restart.describe())
        _event(self._run_dir, "restart", self._restart.failed_at_step, **self._restart.event())
        self._options = self._options.restricted(usable)

    def _usable_hosts(self, silent: Mapping[str, str]) -> Selection:
        """Hosts that answer and have no fault, as many as the rows of a step divide among. `silent`: hosts that do
        not answer, and why. Raises LaunchError when that leaves none."""
        answering = {host: slots for host, slots in self._all_hosts.items() if host not in silent}
        faults = self._preflight.faulty(self._options, answering) if answering else {}
        healthy = {host: slots for host, slots in answering.items() if host not in faults}
        # a host on which ranks were killed again and again is left out, if the run can do without
        reliable = {host: slots for host, slots in healthy.items() if self._kills[host] < UNRELIABLE_KILLS}
        usable = largest_usable(reliable, self._divides) or largest_usable(healthy, self._divides)
        if not usable:
            why = "; ".join(f"{host}: {reason}" for host, reason in {**silent, **faults}.items())
            raise LaunchError(
                f"no restart: {world_size(healthy)} ranks on {_describe(healthy) if healthy else 'no host'} are left, "
                f"and no number of whole hosts among them divides the rows of a step. {why}. Mend the hosts, or give "
                "others in the hostfile, and run the same command again to resume"
            )
        return usable

    def _divides(self, ranks: int) -> bool:
        try:
            batch_plan(self._cfg, ranks, shrink=has_checkpoints(self._run_dir))
        except ConfigError:
            return False
        return True


def _stopped_before_start(stop: StopSignals) -> int:
    number = signal.Signals(stop.number or signal.SIGINT)
    say(f"{number.name}: no rank was running, and none is started")
    return 128 + number


def _final_code(outcome: Outcome, restarts: int) -> int:
    """The code of a launch that ends here. Raises LaunchError for what no rank has printed."""
    if outcome.code == LaunchError.exit_code and outcome.again == "yes":
        after = f" (after {restarts} restarts)" if restarts else ""
        raise LaunchError(f"{outcome.cause}{after}. Run the same command again to resume from the newest checkpoint")
    return outcome.code


class _Preflight:
    """The cluster's checks before a start (`preflight.py`), for one configuration."""

    def __init__(self, config_path: str | os.PathLike[str], overrides: Sequence[str]) -> None:
        self._config, self._overrides = Path(config_path), tuple(overrides)

    def require_fit(self, options: LaunchOptions, selection: Selection) -> None:
        """Print the table of facts and faults (of one local host only where there is a fault); raises
        LaunchError when there is a fault."""
        if options.skip_preflight or options.dry_run:
            return
        report = self._ask(options)
        if report.faults or not runs_locally(selection):
            print(report.table(), file=sys.stderr, flush=True)
        else:
            for found in report.warnings:
                say(f"warning: {found.check}: {found.message}; {found.remedy}")
        if report.faults:
            raise LaunchError(
                f"preflight found {len(report.faults)} faults (above), the first: {report.faults[0].host}: "
                f"{report.faults[0].message}. Nothing was started; mend them, leave hosts out with --exclude, or pass "
                "--skip-preflight"
            )

    def faulty(self, options: LaunchOptions, selection: Selection) -> dict[str, str]:
        """Hosts with a fault and what it is, before a restart: printed only where there is one."""
        if options.skip_preflight or runs_locally(selection):
            return {}
        skip = ("data", "bandwidth")  # they had no fault a while ago, and take long
        report = self._ask(options.restricted(selection), skip)
        if report.faults:
            first = report.faults[0]
            say(
                f"{len(report.faults)} faults before the restart, the first on {first.host}: {first.message}; looked "
                f"at again in {SETTLE_S:g} s"
            )
            time.sleep(SETTLE_S)
            report = self._ask(options.restricted(selection), skip)
        if report.faults:
            print(report.table(), file=sys.stderr, flush=True)
        return {fault.host: fault.message for fault in report.faults}

    def _ask(self, options: LaunchOptions, skip: Sequence[str] = ()) -> Report:
        from jp_train.cluster.preflight import DEFAULT_TIMEOUT_S, preflight

        local = runs_locally(options.selection())
        return preflight(
            options, config=self._config, overrides=self._overrides, skip=LOCAL_SKIP if local else skip,
            timeout_s=LOCAL_TIMEOUT_S if local else DEFAULT_TIMEOUT_S, progress=not local,
        )  # fmt: skip


def _report_progress(progress: Progress | None, run_dir: Path | None) -> None:
    cost = progress.look() if progress is not None else None
    if cost is not None and run_dir is not None:
        say(
            f"training again: step {cost['step']} done {cost['start_s']:.1f} s after the restart; time lost in all "
            f"{cost['lost_s']:.1f} s"
        )
        _event(run_dir, "restarted", **cost)


def _event(run_dir: Path, name: str, step: int, **details: object) -> None:
    from jp_train.run.sinks import Events

    try:
        Events(run_dir / "events.jsonl").write(name, step, **details)
    except OSError as error:
        say(f"event {name} is not in {run_dir}/events.jsonl: {error}")


def _logs(run_dir: Path, launch_id: str) -> Path | None:
    try:
        return open_logs(run_dir, launch_id)
    except OSError as error:
        say(f"no logs of the ranks are kept: {error}")
        return None


def _check_ready(selection: Selection, options: LaunchOptions, *, local: bool) -> None:
    if not local:
        program, packages = PROGRAMS[options.launcher]
        if shutil.which(program) is None:
            raise LaunchError(
                f"{program} is not installed on this host, and the hostfile names remote hosts; install it (Debian: "
                f"apt-get install {packages})"
            )
        return
    options.require_port()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    slots = ",".join(map(str, next(iter(selection.values()))))
    if visible and visible != slots and has_gpu_files():
        raise LaunchError(
            f"CUDA_VISIBLE_DEVICES={visible} is set, but the launcher would use devices {slots} of the hostfile; unset "
            "it and choose with --include, or give the hostfile as many slots as there are devices"
        )


def _describe(selection: Selection) -> str:
    if len(selection) > 4:
        counts = sorted({len(slots) for slots in selection.values()})
        return f"{len(selection)} hosts with {' or '.join(map(str, counts))} slots ({next(iter(selection))} first)"
    return ", ".join(f"{name} (slots {','.join(map(str, slots))})" for name, slots in selection.items())


def _failure(progress: Progress | None) -> str:
    """The error that this start's status.json names as its end; empty without one."""
    last = progress.now() if progress is not None else Standing()
    return last.reason if progress is not None and progress.moved and last.state == "failed" else ""
