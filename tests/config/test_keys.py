"""The keys of the schema, walked and explained."""

from __future__ import annotations

from jp_train.config.keys import keys
from jp_train.config.schema import RunConfig


def test_a_key_has_its_default_its_words_and_the_text_below_it_in_the_schema() -> None:
    by_name = {key.name: key for key in keys()}
    unit = by_name["stage.batch_unit"]
    assert (unit.default, unit.choices) == ("samples", ("samples", "packed"))
    assert unit.meaning == "[1] what `batch_size` counts: documents, or packed rows of `data.seq_len` tokens."
    assert by_name["optimizer.lr"].default == RunConfig().optimizer.lr and not by_name["optimizer.lr"].choices


def test_sections_come_before_their_keys_and_named_entries_stand_for_all_names() -> None:
    names = [key.name for key in keys()]
    assert len(names) == len(set(names))
    assert names.index("data.sources") < names.index("data.sources.NAME.kind") < names.index("data.seq_len")
    assert {key.name for key in keys() if key.section is not None} == {
        name.rpartition(".")[0].removesuffix(".NAME") for name in names
    } - {""}
