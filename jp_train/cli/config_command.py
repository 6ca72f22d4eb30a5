"""`jp-train config`: the resolved configuration, the keys, the presets."""

from __future__ import annotations

import argparse
from pathlib import Path

from jp_train.cli.arguments import Commands, add_command, add_json, add_overrides
from jp_train.errors import ConfigError

DETAILS = """\
Prints the configuration that a run would have, as YAML that loads again: every key with its meaning above and, behind
the value, where it comes from (default, preset, recipe, file, command line).

  jp-train config launch/janus_pro_1b_stage2.yaml optimizer.lr=5e-5
  jp-train config --presets                                            what `preset:` may name
  jp-train config --keys                                               every key with its default and meaning
  jp-train config --keys lr                                            those with lr in their name"""


def register(commands: Commands) -> None:
    parser = add_command(
        commands, "config", "what a configuration resolves to, and every key with its meaning", DETAILS
    )
    parser.add_argument("config", metavar="CONFIG", type=Path, nargs="?", help="a YAML of a run")
    add_overrides(parser)
    listed = parser.add_mutually_exclusive_group()
    listed.add_argument("--keys", nargs="?", const="", metavar="PATTERN", help="list the keys, without a CONFIG")
    listed.add_argument("--presets", action="store_true", help="list the presets, without a CONFIG")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from jp_train.config import resolved

    listing = arguments.presets or arguments.keys is not None
    if listing == (arguments.config is not None):
        raise ConfigError("give a CONFIG, or --keys or --presets without one")
    if arguments.presets:
        print(resolved.presets_json() if arguments.json else resolved.presets_text())
    elif arguments.keys is not None:
        found = resolved.matching_keys(arguments.keys)
        print(resolved.keys_json(found) if arguments.json else resolved.keys_text(found))
    else:
        entries = resolved.resolved(arguments.config, arguments.overrides)
        print(resolved.as_json(entries) if arguments.json else resolved.as_yaml(entries))
    return 0
