"""Mean bytes of a document, from the sizes of the files that the shards were written from."""

from __future__ import annotations

import pytest

from jp_train.config.choices import TokenIds, VqIds
from jp_train.data.index import index_sources
from jp_train.errors import DataError
from jp_train.tools.simulate.reads import NPY_HEADER, source_reads
from tests.data.data_samples import generation_samples, stored_samples, text_samples, understanding_samples

SLOTS = 16


def mean_bytes(samples, *extensions: str) -> float:
    return sum(len(fields[extension]) for _, fields in samples for extension in extensions) / len(samples)


@pytest.fixture
def reads(mixed, tokenizer):
    def measure(**changed):
        cfg = mixed()
        cfg.data.token_ids = TokenIds.off
        for key, value in changed.items():
            setattr(cfg.data, key, value)
        return {index.name: source_reads(index, cfg.data, SLOTS) for index in index_sources(cfg, tokenizer)}

    return measure


def test_understanding_and_text_read_what_their_rows_need(reads):
    measured = reads()
    samples = understanding_samples(17)
    assert measured["und"].with_images == measured["und"].with_ids == mean_bytes(samples, "png", "json")
    assert measured["text"].with_images == measured["text"].with_ids == mean_bytes(text_samples(21), "txt")
    assert (measured["und"].samples, measured["text"].samples) == (17, 21)
    assert measured["und"].stored == measured["text"].stored == 0


def test_ids_take_two_bytes_a_slot_in_place_of_the_image(reads):
    real = reads()["real"]
    samples = generation_samples(13) + generation_samples(12, 13)
    assert real.with_images == pytest.approx(mean_bytes(samples, "png", "json"))
    assert real.with_ids == pytest.approx(mean_bytes(samples, "json") + 2 * SLOTS)
    assert (real.stored, real.samples) == (0, 25), "no image has stored ids yet"


@pytest.mark.parametrize("vq_ids", [VqIds.auto, VqIds.off])
def test_ids_inside_the_shards_are_read_with_their_header_where_there_is_no_image(reads, vq_ids):
    stored = reads(vq_ids=vq_ids)["stored"]
    expected = mean_bytes(stored_samples(9), "json") + 2 * SLOTS + NPY_HEADER
    assert stored.with_images == stored.with_ids == pytest.approx(expected)
    assert stored.stored == 1


def test_an_index_that_is_gone_is_an_error(mixed, tokenizer, tmp_path):
    cfg = mixed()
    index = next(index for index in index_sources(cfg, tokenizer) if index.name == "text")
    for path in tmp_path.glob("text.tar.*"):
        path.unlink()
    with pytest.raises(DataError, match=r"index of shard .*text\.tar is gone"):
        source_reads(index, cfg.data, SLOTS)
