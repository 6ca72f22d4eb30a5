"""What `jp-train data encode-images` does: one rank's work and its report, or the launch of all ranks on the hosts
of a hostfile."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, TextIO

from jp_train.cluster.hostfile import world_size
from jp_train.cluster.options import LaunchOptions
from jp_train.config import RunConfig, load_config
from jp_train.errors import ConfigError, DataError
from jp_train.model.vq import IMAGES_AT_ONCE
from jp_train.tools.encode_images.encoder import ImageEncoder, Place, Tally, Verification
from jp_train.tools.encode_images.work import format_ranks

_NAMED = 5


def encode_images(
    cfg: RunConfig,
    place: Place,
    *,
    batch: int = IMAGES_AT_ONCE,
    verify_sample: int = 0,
    max_mismatch: float = 0.0,
    dry_run: bool = False,
    world_size: int | None = None,
    table: TextIO | None = None,
) -> tuple[dict[str, Any], int]:
    """One rank of `jp-train data encode-images`: encode what is missing, or only look (`dry_run`), or verify
    `verify_sample` samples.

    Rank 0 prints the table of all ranks to `table` (default: stdout), for `world_size` ranks when that is not the
    launch's own. Returns a JSON-able summary and the exit code: 0, or 3 when more than the share `max_mismatch` of the
    verified ids differ.

    Raises:
        ConfigError: without a generation source, or for impossible options.
        DataError: for shards that cannot be read, or ids that cannot be written.
        CheckpointError: for VQ weights that do not fit.
    """
    if not 0 <= max_mismatch <= 1:
        raise ConfigError(f"--max-mismatch {max_mismatch} must be a share between 0 and 1")
    encoder = ImageEncoder(cfg, place, batch=batch)
    table = table or sys.stdout
    summary: dict[str, Any] = {
        "fingerprint": encoder.recipe.fingerprint,
        "recipe": asdict(encoder.recipe),
        "rank": place.rank,
        "code": 0,
    }
    try:
        if verify_sample:
            verification = encoder.verify(-(-verify_sample // place.world_size), random.SystemRandom().randrange(2**32))
            summary |= {"verified": asdict(verification) | {"rate": verification.rate}}
            summary["code"] = int(bool(verification.problems) or verification.rate > max_mismatch) * DataError.exit_code
            print(_verified_text(place, verification), file=table)
            return summary, summary["code"]
        if not dry_run:
            tally = encoder.encode()
            summary |= asdict(tally) | {"pictures_per_s": tally.pictures_per_s}
            encoder.say(_tally_text(tally))
        if place.rank == 0:
            ranks = encoder.ranks(world_size)
            summary["ranks"] = [asdict(line) for line in ranks]
            print(
                f"fingerprint {encoder.recipe.fingerprint} (VQ {encoder.recipe.vq})\n{format_ranks(ranks)}",
                file=table,
                flush=True,
            )
        return summary, 0
    finally:
        encoder.close()


def _tally_text(tally: Tally) -> str:
    text = f"{tally.encoded} shards encoded, {tally.recognised} recognised, {tally.already_done} were done; "
    text += (
        f"{tally.pictures:,} images in {tally.seconds:.1f} s ({tally.pictures_per_s:.1f}/s), {len(tally.unusable)} "
        "unusable"
    )
    more = f"\n  … and {len(tally.unusable) - _NAMED} more (in the manifests)" if len(tally.unusable) > _NAMED else ""
    return "\n  unusable: ".join([text, *tally.unusable[:_NAMED]]) + more


def _verified_text(place: Place, verification: Verification) -> str:
    head = (
        f"rank {place.rank}: {verification.samples} samples encoded again (seed {verification.seed}): "
        f"{verification.different_ids} of {verification.ids:,} ids differ"
    )
    return "\n".join(
        [
            f"{head} ({verification.rate:.2e})",
            *(f"  {line}" for line in [*verification.problems, *verification.mismatches]),
        ]
    )


def encode_on_hosts(
    config: str | os.PathLike[str],
    overrides: Sequence[str],
    options: LaunchOptions,
    *,
    batch: int = IMAGES_AT_ONCE,
    verify_sample: int = 0,
    max_mismatch: float = 0.0,
    as_json: bool = False,
) -> int:
    """Start `encode-images` on every slot of a hostfile and return the ranks' exit code; `options.dry_run` prints the
    shares and the command only.

    Raises ConfigError (configuration, filter) and LaunchError (hostfile, busy port, missing pdsh, a rank killed from
    outside).
    """
    from jp_train.cluster.launch import launch_ranks

    if as_json:
        raise ConfigError(
            "--json cannot be kept apart from the launcher's own output; leave it out, and ask with `--dry-run "
            "--json` afterwards"
        )
    cfg = load_config(config, overrides)
    if options.dry_run:
        encode_images(cfg, Place.of_environment({}), dry_run=True, world_size=world_size(options.selection()))
    words = [f"--batch={batch}"]
    words += [f"--verify-sample={verify_sample}", f"--max-mismatch={max_mismatch}"] if verify_sample else []
    return launch_ranks(["data", "encode-images", str(config), *overrides, *words], options)
