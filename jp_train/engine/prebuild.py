"""Compile DeepSpeed's shared-memory CPU operator once (`make setup`), so that no training run waits for it or compiles it twice.

`python -m jp_train.engine.prebuild`. A process killed while torch loads the operator leaves a `lock` file behind on which every later
run waits forever without a message; `remove_stale_lock` clears it and is called before every CPU run.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

OPERATOR = "deepspeed_shm_comm"


def remove_stale_lock(older_than_s: float = 300.0) -> bool:
    """Delete torch's build lock of the operator when it is older than `older_than_s` seconds. Returns whether one was removed."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    folders = [Path(root)] if root else list((Path.home() / ".cache" / "torch_extensions").glob("*"))
    removed = False
    for folder in folders:
        lock = folder / OPERATOR / "lock"
        try:
            if time.time() - lock.stat().st_mtime > older_than_s:
                lock.unlink()
                removed = True
        except FileNotFoundError:
            continue
    return removed


def main() -> int:
    """Build the operator and say how long it took."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    remove_stale_lock(older_than_s=0.0)
    from deepspeed.accelerator import get_accelerator

    started = time.monotonic()
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None:
        print("prebuild: this accelerator needs no shared-memory operator", file=sys.stderr)
        return 0
    builder.load(verbose=False)
    print(f"prebuild: {OPERATOR} is ready after {time.monotonic() - started:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
