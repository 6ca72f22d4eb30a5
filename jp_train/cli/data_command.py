"""`jp-train data ...`: tools for shards and indexes; each module `data_TOOL` of this package adds its own."""

from __future__ import annotations

import importlib

from jp_train.cli.arguments import Commands, add_command

TOOLS = ("import", "index", "verify", "explain", "inspect", "encode-images", "simulate")


def register(commands: Commands) -> None:
    parser = add_command(commands, "data", "tools for the data of a run")
    tools = parser.add_subparsers(dest="tool", required=True, metavar="TOOL")
    for name in TOOLS:
        importlib.import_module(f"jp_train.cli.data_{name.replace('-', '_')}").register(tools)
