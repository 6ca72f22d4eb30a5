"""`jp-train data verify`: every fault of the data, before training meets it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from jp_train.cli.arguments import Commands, add_command, add_config, add_json, whole_number

DETAILS = """\
Finds truncated or damaged tars, links, duplicate or interleaved keys, missing or ill-typed fields, broken JSON, text
that is not UTF-8, empty and over-long samples, images that cannot be decoded or are decompression bombs, and bad VQ
ids, with the code that training uses. A broken shard does not stop the pass. Writes verify.json (every finding: class,
source, shard, key, byte offset, reason, remedy) and lengths.png. exit status: 0 clean, 3 faults (samples that an
earlier --exclude took out no longer count).

examples:
  jp-train data verify launch/janus_pro_1b_stage1.yaml                  everything, all images decoded, all cores
  jp-train data verify launch/janus_pro_1b_stage1.yaml --fast           structure, text and image headers only
  jp-train data verify launch/janus_pro_1b_stage1.yaml --sample 10000   10,000 images of each source decoded
  jp-train data verify launch/janus_pro_1b_stage1.yaml --exclude        leave bad images out of the next index"""


def register(tools: Commands) -> None:
    parser = add_command(
        tools, "verify", "read every shard of a configuration once and name every fault in it", DETAILS
    )
    add_config(parser)
    parser.add_argument(
        "--processes",
        type=whole_number(1),
        default=os.cpu_count() or 1,
        metavar="N",
        help="shards read at a time (default: all cores)",
    )
    how_many = parser.add_mutually_exclusive_group()
    how_many.add_argument(
        "--sample", type=whole_number(0), metavar="N", help="decode N images of each source, evenly spread, not all"
    )
    how_many.add_argument(
        "--fast", action="store_true", help="decode no image, read their headers only (the same as --sample 0)"
    )
    parser.add_argument(
        "--exclude",
        action="store_true",
        help="write samples whose images cannot be used to SHARD.jp-excluded.json, so that the index leaves them out; "
        "this changes the plan",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of verify.json and lengths.png (default: RUN_DIR/verify)"
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from jp_train.config import load_config

    config = load_config(arguments.config, arguments.overrides)  # before torch: a misspelt key is answered at once

    from jp_train.tools.verify.verify import VerifyOptions, verify_command

    options = VerifyOptions(
        processes=arguments.processes,
        decode=0 if arguments.fast else arguments.sample,
        exclude=arguments.exclude,
        out=arguments.out,
    )
    document, status = verify_command(config, options, table=sys.stderr if arguments.json else sys.stdout)
    if arguments.json:
        print(json.dumps(document))
    return status
