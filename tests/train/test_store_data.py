"""A run whose data lies in a real S3 store."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from jp_train.config import save_config
from jp_train.config.schema import WandbMode
from jp_train.data.stores import StoreRanges
from tests.data.store_server import BUCKET, KEY, SECRET, StoreServer
from tests.engine.tiny_run import tiny_run, write_data


def test_a_run_trains_from_a_store_and_leaves_no_credential_in_its_files(store: StoreServer, tmp_path: Path) -> None:
    cfg = tiny_run(write_data(tmp_path / "data"), tmp_path / "run", stage=2, steps=2, rows=2)
    cfg.logging.wandb.mode, cfg.data.index_dir = WandbMode.offline, str(tmp_path / "index")
    for path in (tmp_path / "data").glob("*.tar"):
        StoreRanges().write(path, f"s3://{BUCKET}/run/{path.name}")
        path.unlink()
    for source in (*cfg.data.sources.values(), *cfg.validation.sources.values()):
        source.shards = f"s3://{BUCKET}/run/{source.shards}"
    save_config(cfg, tmp_path / "run.yaml")
    done = subprocess.run(
        [sys.executable, "-m", "jp_train", "train", str(tmp_path / "run.yaml")],
        env={**os.environ, "DS_ACCELERATOR": "cpu"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") >= 2
    assert list((tmp_path / "run").rglob("*.wandb"))
    written = [path for folder in ("run", "index") for path in (tmp_path / folder).rglob("*") if path.is_file()]
    texts = [done.stdout.encode(), done.stderr.encode(), *(path.read_bytes() for path in written)]
    assert not any(secret.encode() in text for text in texts for secret in (KEY, SECRET))
