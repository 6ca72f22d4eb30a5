"""`make bench`: every benchmark in turn; each prints a table, and its JSON goes to bench/results/."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
    """Run bench/*.py one after the other; the exit status is that of the first one that fails."""
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    for script in sorted(HERE.glob("*.py")):
        if script.name.startswith("_"):
            continue
        print(f"== {script.stem}", flush=True)
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, str(script), "--save", str(results / f"{script.stem}.json")], check=False
        )
        if done.returncode:
            return done.returncode
        print(f"   {time.monotonic() - began:.0f} s\n", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
