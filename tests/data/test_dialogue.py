"""Every form of a conversation that public sets have, as a sample in place."""

from __future__ import annotations

import pytest

from jp_train.config.schema import SourceConfig, SourceKind
from jp_train.data.dialogue import Dialogue, parse_dialogue
from jp_train.data.field_map import Fields, field_map
from jp_train.data.samples import parse_variants
from jp_train.errors import SkipSample
from jp_train.types import RawSample, SourceInfo
from tests.data.data_samples import json_bytes
from tests.data.dialogue_forms import FORMS, PICTURES

INFO = SourceInfo(source="s", shard="s.tar", key="k")


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if not form.path_only])
def test_a_conversation_of_this_form_is_read_in_place_or_refused_with_its_sentence(name):
    form = FORMS[name]
    files = {"json": json_bytes(form.record)}
    files |= {"png": PICTURES[0]} if form.images == 1 else {f"{n}.png": PICTURES[n] for n in range(form.images)}
    kind = SourceKind.understanding if form.images else SourceKind.text
    texts = Fields(RawSample(info=INFO, fields=files), field_map(SourceConfig(kind=kind)))
    if form.says:
        with pytest.raises(SkipSample) as caught:
            parse_variants(texts, image_slots=16, codebook_size=64)
        assert form.says in str(caught.value) and caught.value.fault in ("bad_dialogue", "bad_type", "empty_text")
        return
    (sample,) = parse_variants(texts, image_slots=16, codebook_size=64)
    assert tuple((turn.question, turn.answer) for turn in sample.turns) == form.turns
    assert sample.system == form.system and texts.notes == form.notes
    assert not form.images or sample.images == PICTURES[: form.images]


def test_other_words_for_a_marker_mean_one_only_where_a_conversation_has_none():
    messages = [{"from": "human", "value": "<image> What is <|image|>?"}, {"from": "gpt", "value": "A tag."}]
    assert parse_dialogue(messages).questions == ("<image> What is <|image|>?",)
    messages[0]["value"] = "What is <|image|>?"
    assert parse_dialogue(messages).questions == ("What is <image>?",)


def test_a_question_may_name_a_tag_where_the_markers_stand_for_all_images():
    dialogue = Dialogue(("<image> What does <video> do in it?",), ("It shows one.",))
    assert dialogue.with_images(1).questions == ("What does <video> do in it?",)


def test_images_without_a_marker_stand_first_whatever_their_number():
    dialogue = Dialogue(("What?", "Why?"), ("A.", "B."))
    assert dialogue.with_images(3).questions == ("What?", "Why?")
    assert dialogue.with_images(3).notes == ("image put first, as no <image> says where",)


def test_text_that_looks_like_json_and_is_none_is_refused_for_that():
    with pytest.raises(SkipSample, match="text that is no JSON"):
        parse_dialogue("[{'from': 'human'")
    with pytest.raises(SkipSample, match="the conversation is a str"):
        parse_dialogue("Human: what?")
