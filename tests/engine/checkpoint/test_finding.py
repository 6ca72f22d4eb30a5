"""Looking for a checkpoint without reading its contents, as `jp-train check` does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from jp_train.engine.checkpoint.files import RankGroup
from jp_train.engine.checkpoint.finding import CheckpointFinder
from jp_train.model.partition_files import rank_file
from tests.engine.checkpoint.test_store import save, store


def finder(run_dir: Path) -> CheckpointFinder:
    return CheckpointFinder(run_dir / "checkpoints", RankGroup(0, 1), contents=False)


def test_without_contents_the_newest_whole_one_is_found_by_sizes_and_nothing_is_written(tmp_path: Path) -> None:
    made = store(tmp_path)
    save(made, 100)
    newest = save(made, 200)
    before = sorted(tmp_path.rglob("*"))
    found = finder(tmp_path).newest()
    assert found.step == 200 and found.state == {"step": 200}
    (newest / rank_file(0)).write_bytes((newest / rank_file(0)).read_bytes()[:-1])
    told: list[str] = []
    assert finder(tmp_path).newest(on_damage=told.append).step == 100
    assert "step_0000200" in told[0] and sorted(tmp_path.rglob("*")) == before


def test_looking_needs_no_torch() -> None:
    script = "import sys, jp_train.engine.checkpoint.resume\nprint({'torch', 'deepspeed'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
