"""A document's number -> its bytes: the right sample of the right shard, with a bounded memory of shards."""

from __future__ import annotations

import pytest

from jp_train.config.schema import Crop
from jp_train.data import sample_reader
from jp_train.data.index import index_sources
from jp_train.data.sample_reader import SampleReader
from jp_train.errors import DataError
from jp_train.types import DocumentRef
from tests.data.data_samples import generation_samples, stored_samples, text_samples, understanding_samples

WRITTEN = [generation_samples(25), stored_samples(9), understanding_samples(17), text_samples(21)]
"""The samples of the sources of `mixed`, in order."""


def reference(source, sample):
    return DocumentRef(source=source, epoch=0, sample=sample, start=0, length=1)


@pytest.fixture
def locators(mixed, tokenizer):
    indexes = index_sources(mixed(), tokenizer)
    return [index.locator for index in indexes]


def test_every_document_is_read_with_its_own_key_and_no_text_that_is_stored_as_ids(locators):
    reader = SampleReader(locators, Crop.centre, retries=1)
    for source, written in enumerate(WRITTEN):
        for sample, (key, fields) in enumerate(written):
            ref = reference(source, sample)
            table, (entry,) = reader.find(ref)
            raw = reader.read(ref, table, entry)
            assert raw.info.key == key == reader.info(ref, table, entry).key and raw.token_ids
            read = {name: data for name, data in raw.fields.items() if data}
            assert read == {name: data for name, data in fields.items() if name not in ("json", "txt")}
    reader.close()


def test_past_its_limit_the_memory_drops_the_oldest_shard_and_reads_it_again(locators, monkeypatch):
    monkeypatch.setattr(sample_reader, "CACHED_SAMPLES", 20)
    reader = SampleReader(locators, Crop.centre, retries=1)
    first, _ = reader.find(reference(2, 0))
    assert reader.find(reference(2, 16))[0] is first, "17 samples are within the limit"
    reader.find(reference(3, 0))
    again, (entry,) = reader.find(reference(2, 3))
    assert again is not first and reader.info(reference(2, 3), again, entry).key == "u0003"
    reader.close()


def test_a_sample_that_the_source_lacks_is_an_error_and_its_description_is_not(locators):
    reader = SampleReader(locators, Crop.centre, retries=1)
    with pytest.raises(DataError, match="has 21 samples, the plan asks for number 21"):
        reader.find(reference(3, 21))
    assert reader.describe(reference(3, 21)) == "source number 3, sample 21"
    assert "key 't0020'" in reader.describe(reference(3, 20))


def test_an_index_that_is_gone_is_named_with_the_files_to_delete(locators, tmp_path):
    for path in tmp_path.glob("text.tar.jp-tokens-*"):
        path.unlink()
    with pytest.raises(DataError, match=r"text\.tar \(source 'text'\) is gone.*delete text\.tar\.jp-members\.npz"):
        SampleReader(locators, Crop.centre, retries=1).find(reference(3, 0))
