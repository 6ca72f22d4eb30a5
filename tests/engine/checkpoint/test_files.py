"""Names, order and checksums of a checkpoint folder, and what all ranks hear of rank 0's failure."""

from __future__ import annotations

import errno
import hashlib
import zlib
from pathlib import Path

import pytest

from jp_train.engine.checkpoint.files import (
    SMALL_FILE,
    RankGroup,
    checkpoint_names,
    joined_errors,
    size_and_checksum,
    step_name,
    step_of,
)
from jp_train.errors import CheckpointError


def test_a_folder_name_gives_its_step_and_other_names_minus_one() -> None:
    assert [step_of(step_name(step)) for step in (0, 7, 1_234_567, 12_345_678)] == [0, 7, 1_234_567, 12_345_678]
    assert [step_of(name) for name in ("latest", ".saving_step_0000007", "step_7", "step_0000007.old")] == [-1] * 4


def test_checkpoints_are_listed_by_step_and_up_to_a_step(tmp_path: Path) -> None:
    for step in (900, 12_345_678, 20):
        (tmp_path / step_name(step)).mkdir()
    (tmp_path / "step_0000030").write_text("a file is no checkpoint")
    assert checkpoint_names(tmp_path) == ["step_0000020", "step_0000900", "step_12345678"]
    assert checkpoint_names(tmp_path, until=900) == ["step_0000020", "step_0000900"]
    assert checkpoint_names(tmp_path / "absent") == []


def test_small_files_get_a_sha256_and_large_ones_a_crc32(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"x" * 100)
    large.write_bytes(b"y" * (SMALL_FILE + 1))
    assert size_and_checksum(small) == {"size": 100, "sha256": hashlib.sha256(b"x" * 100).hexdigest()}
    assert size_and_checksum(small, crc=True) == {"size": 100, "crc32": f"{zlib.crc32(b'x' * 100):08x}"}
    assert size_and_checksum(large)["crc32"] == f"{zlib.crc32(large.read_bytes()):08x}"


def test_a_failure_of_rank_0_is_a_checkpoint_error_with_advice(tmp_path: Path) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    group = RankGroup(0, 1)
    assert group.gather("mine") == ["mine"] and group.on_main(lambda: 3, "cannot count", tmp_path) == 3
    with pytest.raises(CheckpointError, match=r"cannot start it: .*No space left.*Free space on that file system"):
        group.on_main(full, "cannot start it", tmp_path)


def test_errors_of_many_ranks_are_counted_after_two() -> None:
    assert joined_errors(["a", "b"]) == "a; b"
    assert joined_errors(["a", "b", "c", "d"]) == "a; b; and 2 more ranks"
