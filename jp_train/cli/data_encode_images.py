"""`jp-train data encode-images`: VQ ids of the generation images beside the shards."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from jp_train.cli.arguments import Commands, add_command, add_config, add_json, launch_options, whole_number

DETAILS = """\
Training then neither reads nor decodes a generation image. For each shard X.tar of a generation source, training and
held-out, it writes X.tar.jp-vq-PRINT.npy (ids, 16 bits each) and .json (what they were made with); PRINT is the
fingerprint of VQ weights and image transform. data.vq_ids sets what training does with them: auto (use them; ids of
another VQ are an error), require, off.

One process:      jp-train data encode-images launch/janus_pro_1b_stage1.yaml
On a cluster:     jp-train data encode-images launch/janus_pro_1b_stage1.yaml --hostfile hostfiles/a100_16x8
What is left:     jp-train data encode-images launch/janus_pro_1b_stage1.yaml --hostfile hostfiles/a100_16x8 --dry-run
Are they right:   jp-train data encode-images launch/janus_pro_1b_stage1.yaml --verify-sample 100

Run it again after an interruption: finished shards are skipped. Shards that were only copied or touched are recognised
by their images. An image that cannot be decoded is named, and skipped in training as it would be without stored ids.
Exit status 3: ids differ."""


def register(tools: Commands) -> None:
    parser = add_command(
        tools, "encode-images", "compute the VQ ids of all generation images once, beside the shards", DETAILS
    )
    add_config(parser)
    parser.add_argument(
        "--hostfile",
        type=Path,
        help="share the shards among the ranks of these hosts; prints and runs the deepspeed command",
    )
    parser.add_argument("--include", default="", help="with --hostfile: only these hosts or slots, deepspeed syntax")
    parser.add_argument("--exclude", default="", help="with --hostfile: all but these hosts or slots")
    parser.add_argument(
        "--master-port",
        type=int,
        help="with --hostfile: rendezvous port of the launcher (default 29500, or a free one)",
    )
    parser.add_argument(
        "--batch",
        type=int,
        metavar="N",
        default=8,
        help="images that go through the VQ together (default 8, as in training)",
    )
    parser.add_argument(
        "--verify-sample",
        type=whole_number(0),
        default=0,
        metavar="N",
        help="encode nothing; compute N random stored samples again and compare",
    )
    parser.add_argument(
        "--max-mismatch",
        type=float,
        default=0.0,
        metavar="RATE",
        help="share of the verified ids that may differ (default 0; other hardware: 0.001)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print what each rank has and has left (with --hostfile: and the command), and stop",
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from jp_train.config import load_config
    from jp_train.tools.encode_images.command import encode_images, encode_on_hosts
    from jp_train.tools.encode_images.encoder import Place

    work = {"batch": arguments.batch, "verify_sample": arguments.verify_sample, "max_mismatch": arguments.max_mismatch}
    if arguments.hostfile is not None:
        options = launch_options(arguments)
        return encode_on_hosts(arguments.config, arguments.overrides, options, as_json=arguments.json, **work)
    config = load_config(arguments.config, arguments.overrides)
    place = Place.of_environment()
    summary, code = encode_images(
        config, place, table=sys.stderr if arguments.json else sys.stdout, dry_run=arguments.dry_run, **work
    )
    if arguments.json and place.rank == 0:
        print(json.dumps(summary))
    return code
