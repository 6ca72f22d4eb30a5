"""`jp-train launch`: a run on the hosts of a hostfile."""

from __future__ import annotations

import argparse

from jp_train.cli.arguments import Commands, add_command, add_config, add_hosts, launch_options, whole_number
from jp_train.cluster.options import DEFAULT_GRACE_S, DEFAULT_PATIENCE_S, LAUNCHERS

DETAILS = """\
Makes the quick checks of `jp-train check`, examines the hosts (`jp-train preflight`), prints the batch arithmetic and
the exact command, then runs it and watches it to its end. `--dry-run` asks no host and stops after printing; files that
are not on this host are named and left to the hosts. Run the same command again to resume.

Stopping: SIGTERM, SIGUSR1 or Ctrl-C reaches all ranks at once: they finish the step, save and exit; a second signal
kills. Before the ranks run it ends the launch at once. A terminal that goes away (SIGHUP) stops nothing.
Faults: a rank that dies, or a host that no longer answers, is named with the cause; nothing of the run is left on any
host that answers. With --max-restarts N the run then goes on from its newest checkpoint, without the hosts that do not
answer, on as many of the others as the rows of a step divide among; the time lost is printed and kept in
RUN_DIR/events.jsonl (`restart`, `restarted`).
Logs: RUN_DIR/logs/LAUNCH/HOST_rankN.log; the terminal shows rank 0, and at the end the last lines of the rank that
failed first.

examples:
  jp-train launch launch/janus_pro_7b_stage2.yaml --hostfile hostfiles/a100_32x8 --max-restarts 5
  jp-train launch launch/janus_pro_1b_stage1.yaml --hostfile hostfiles/a100_16x8 --exclude node07@node03:0,1 --dry-run
  jp-train launch my_run.yaml --hostfile hosts --launcher openmpi --launcher-args "--mca btl_tcp_if_include ib0"

exit status: 0 done, 1 an exception in a rank, 2 configuration, 3 data, 4 checkpoint, 5 hosts, launcher or a killed
rank, 130/138/143 stopped by a signal after saving"""


def register(commands: Commands) -> None:
    parser = add_command(commands, "launch", "start a training run on every host of a hostfile", DETAILS)
    add_config(parser)
    add_hosts(parser)
    parser.add_argument("--launcher", choices=LAUNCHERS, default="pdsh", help="what starts remote ranks (default pdsh)")
    parser.add_argument("--launcher-args", default="", help="more words for mpirun or srun")
    parser.add_argument("--skip-preflight", action="store_true", help="start without checking the hosts")
    parser.add_argument(
        "--max-restarts",
        type=whole_number(0),
        default=0,
        help="start again so often after a fault of a host or a rank (default 0)",
    )
    parser.add_argument(
        "--patience", dest="patience_s", type=float, default=DEFAULT_PATIENCE_S, metavar="SECONDS",
        help="how long a host may give no sign of life before it is queried, and ranks may outlive one that failed "
        f"(default {DEFAULT_PATIENCE_S:g})",
    )  # fmt: skip
    parser.add_argument(
        "--grace", dest="grace_s", type=float, default=DEFAULT_GRACE_S, metavar="SECONDS",
        help=f"how long the ranks have to save after a stop signal (default {DEFAULT_GRACE_S:g})",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print what would run and stop")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from jp_train.cluster.launch import launch
    from jp_train.tools.check.check import require_startable

    return launch(arguments.config, arguments.overrides, launch_options(arguments), require_startable)
