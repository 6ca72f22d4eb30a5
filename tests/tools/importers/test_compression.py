"""Compressed files are read whole, or not at all: one that is cut short anywhere is damaged, not shorter."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma

import pytest
import zstandard

from jp_train.tools.importers.compression import DAMAGE, compression, decompressed, plain_file

TEXT = b"".join(b"line %d of a text\n" % n for n in range(3000))
COMPRESS = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress, "zstd": zstandard.compress}


@pytest.mark.parametrize("kind", COMPRESS)
def test_the_plain_bytes_of_every_compression_by_its_first_bytes(tmp_path, kind):
    packed = COMPRESS[kind](TEXT)
    assert compression(packed[:4]) == kind
    (tmp_path / "a").write_bytes(packed + COMPRESS[kind](b"and a second part\n"))
    with plain_file(tmp_path / "a") as (file, stream):
        assert stream.readline() == b"line 0 of a text\n" and file.tell() > 0
        assert stream.read() == TEXT[17:] + b"and a second part\n" and file.read() == b""


@pytest.mark.parametrize("kind", COMPRESS)
def test_a_stream_that_is_cut_short_or_damaged_raises_wherever(kind):
    packed = COMPRESS[kind](TEXT)
    for size in {*range(5, 60, 6), len(packed) // 2, len(packed) - 1}:
        with pytest.raises(DAMAGE):
            decompressed(io.BytesIO(packed[:size]), kind).read()
    with pytest.raises(DAMAGE):
        decompressed(io.BytesIO(packed[: len(packed) // 2] + b"\0\xff" * 40), kind).read()


def test_zstd_frames_are_read_across_the_ends_of_blocks_and_frames_to_skip():
    skipped = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"abcd"
    checked = zstandard.ZstdCompressor(write_checksum=True)
    frames = b"".join(checked.compress(TEXT[start : start + 300]) + skipped for start in range(0, len(TEXT), 300))
    assert len(frames) > 16 << 10 and decompressed(io.BytesIO(frames), "zstd").read() == TEXT
    assert decompressed(io.BytesIO(zstandard.compress(bytes(20 << 20))), "zstd").read() == bytes(20 << 20)
    assert decompressed(io.BytesIO(b"plain"), compression(b"plain")).read() == b"plain"
