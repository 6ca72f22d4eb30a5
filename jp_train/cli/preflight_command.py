"""`jp-train preflight`: is every host of a hostfile fit to train?"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path

from jp_train.cli.arguments import Commands, add_command, add_hosts, add_json, launch_options
from jp_train.cluster.checks import CHECK_NAMES, CHECKS

DETAILS = """\
Logs in to every host at once (ssh, by key), compares what must be equal, looks at disks, devices, ports and left-over
processes, connects every host with every other one, and measures an all-reduce. Faults come first, each with host,
cause and remedy; then warnings; then a table of the hosts. With CONFIG the run folder, the configuration and the data
are examined on every host too. `launch` does this before it starts the ranks.

checks, besides whether the host answers over ssh:
{checks}

  jp-train preflight --hostfile hostfiles/a100_16x8                                   the cluster alone
  jp-train preflight launch/janus_pro_1b_stage1.yaml --hostfile hostfiles/a100_16x8   and all that this run needs

exit status 0 when there is no fault (warnings do not count), 5 when there is one, 2 for a wrong configuration or
command line."""


def register(commands: Commands) -> None:
    listed = "\n".join(
        textwrap.fill(f"{check.name:<10}{check.question}", 120, initial_indent="  ", subsequent_indent=" " * 12)
        for check in CHECKS
    )
    parser = add_command(
        commands, "preflight", "examine every host of a hostfile before a run", DETAILS.format(checks=listed)
    )
    parser.add_argument(
        "config", metavar="CONFIG", type=Path, nargs="?", help="a YAML of launch/: look at what this run needs"
    )
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="override any key, as for the run itself")
    add_hosts(parser)
    parser.add_argument(
        "--timeout",
        type=float,
        default=10.0,
        metavar="S",
        help="seconds that a host may take for one answer (default 10; more for slow file servers)",
    )
    parser.add_argument("--skip", default="", metavar="CHECK,...", help=f"leave these out: {', '.join(CHECK_NAMES)}")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from jp_train.cluster.preflight import preflight

    report = preflight(
        launch_options(arguments),
        config=arguments.config,
        overrides=arguments.overrides,
        timeout_s=arguments.timeout,
        skip=[name for name in arguments.skip.split(",") if name],
    )
    print(json.dumps(report.as_json()) if arguments.json else report.table())
    return report.exit_code
