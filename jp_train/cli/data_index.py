"""`jp-train data index`: byte offsets, token counts and token ids beside the shards."""

from __future__ import annotations

import argparse
import json
import os
import sys

from jp_train.cli.arguments import Commands, add_command, add_config, add_json, whole_number

DETAILS = """\
Training builds a missing index itself; for large data do it beforehand, in parallel. An index is rebuilt when the
shard, the tokenizer or the template changed.

It holds the token ids of all texts, so that training neither reads nor tokenises one (the column "id bytes/sample"
shows their size: about 2.1 bytes a token). data.token_ids=off leaves them out; rows are the same, and the loader needs
more CPU.

  jp-train data index launch/janus_pro_1b_stage1.yaml
  jp-train data index launch/janus_pro_1b_stage1.yaml --processes 16 data.token_ids=off"""


def register(tools: Commands) -> None:
    parser = add_command(
        tools,
        "index",
        "build the index of every source of a configuration: byte offsets, token counts and token ids, beside the "
        "shards",
        DETAILS,
    )
    add_config(parser)
    parser.add_argument(
        "--processes",
        type=whole_number(1),
        default=os.cpu_count() or 1,
        metavar="N",
        help="shards indexed at a time (default: all cores)",
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from jp_train.config import load_config

    config = load_config(arguments.config, arguments.overrides)  # before torch: a misspelt key is answered at once

    from jp_train.tools.index import index_command

    table = sys.stderr if arguments.json else sys.stdout
    summary = index_command(config, arguments.processes, table=table)
    if arguments.json:
        print(json.dumps(summary))
    return 0
