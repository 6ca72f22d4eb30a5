"""One pass over one shard."""

from __future__ import annotations

import numpy as np
import pytest

from jp_train.config.schema import SourceConfig, SourceKind
from jp_train.data.encode import Encoder
from jp_train.data.shards import ShardReader
from jp_train.tools.verify import shard as shard_module
from jp_train.tools.verify.shard import EDGES, VerifyTask, verify_shard
from tests.data.data_samples import generation_samples, text_samples, write_shard


class Counting(ShardReader):
    """Counts the bytes of every read."""

    def __init__(self):
        super().__init__(1)
        self.bytes = 0

    def read(self, shard, offset, size):
        self.bytes += size
        return super().read(shard, offset, size)


@pytest.fixture
def checked(cfg, tokenizer):
    """Verify a shard of a kind; (report, calls of `progress`, bytes read)."""

    def run(path, kind, decode=None):
        reader, calls = Counting(), []
        task = VerifyTask(
            source="s", config=SourceConfig(kind=SourceKind(kind)), shard=reader.stat(str(path)), decode=decode
        )
        report = verify_shard(task, cfg, Encoder(cfg, tokenizer), reader, lambda *at: calls.append(at))
        return report, calls, reader.bytes

    return run


def test_a_shard_is_read_once_and_progress_names_every_sample_and_byte(checked, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_module, "WINDOW_BYTES", 8192)
    path = write_shard(tmp_path / "a.tar", generation_samples(30))
    report, calls, read = checked(path, "generation")
    assert [samples for samples, _ in calls] == list(range(1, 31)) and report.samples == report.good == report.decoded
    offsets = [offset for _, offset in calls]
    assert offsets == sorted(set(offsets)) and offsets[-1] <= path.stat().st_size
    assert path.stat().st_size <= read < 1.2 * path.stat().st_size, "blocks overlap at their borders only"


def test_lengths_are_counted_in_the_bin_that_holds_them_and_longer_ones_than_a_row_are_warnings(
    checked, cfg, tmp_path, tokenizer
):
    samples = text_samples(20)
    report, _, _ = checked(write_shard(tmp_path / "a.tar", samples), "text")
    tokens = [len(tokenizer.encode(fields["txt"].decode())) + 2 for _, fields in samples]
    assert (report.tokens, report.longest) == (sum(tokens), max(tokens))
    np.testing.assert_array_equal(report.lengths, np.histogram(tokens, [*EDGES, 1 << 40])[0])
    long = [key for (key, _), count in zip(samples, tokens, strict=True) if count > cfg.data.seq_len]
    assert report.over_seq_len == len(long) > 0 and [fault.key for fault in report.faults] == long
    assert report.last_key == "t0019" and report.whole and all(fault.warning for fault in report.faults)


@pytest.mark.parametrize("decode", [0, 1, 7, 100])
def test_as_many_images_are_decoded_as_asked_for_and_all_headers_are_read(checked, tmp_path, decode):
    samples = [(key, {**fields, "png": fields["png"][:-400]}) for key, fields in generation_samples(20)]
    report, _, _ = checked(write_shard(tmp_path / "a.tar", samples), "generation", decode)
    count = min(decode, 20)
    assert report.decoded == count == len(report.faults) and report.good == 20 - count
    assert {fault.fault for fault in report.faults} <= {"picture_truncated"} and all(f.image for f in report.faults)
