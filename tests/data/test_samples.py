from __future__ import annotations

import io
import json

import numpy as np
import pytest

from jp_train.config.schema import ClassPrompt, Crop, SourceConfig, SourceKind
from jp_train.data.field_map import field_map
from jp_train.data.samples import MAX_IMAGE_BYTES, MAX_TEXT_BYTES, check_field_size, first_sentence, parse_sample
from jp_train.errors import SkipSample
from jp_train.types import Kind, RawSample, SourceInfo, Turn
from tests.data.data_samples import conversation, json_bytes, npy

INFO = SourceInfo(source="s", shard="s.tar", key="k")
IDS = np.arange(16, dtype=np.uint16)


def parse(kind: Kind, fields: dict[str, bytes], source: SourceConfig | None = None):
    source = source or SourceConfig(kind=SourceKind(kind.value))
    return parse_sample(RawSample(info=INFO, fields=fields), field_map(source), image_slots=16, codebook_size=64)


def needed(kind: Kind, extensions: list[str], crop: Crop = Crop.centre) -> list[str]:
    return field_map(SourceConfig(kind=SourceKind(kind.value))).needed(extensions, crop)


def test_an_understanding_dialogue_loses_its_marker_and_keeps_its_turns():
    messages = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "Yes."},
    ]
    sample = parse(Kind.UNDERSTANDING, {"png": b"p", "json": json_bytes({"conversations": messages})})
    assert sample.turns == (Turn(question="What is it?", answer="A cat."), Turn(question="Sure?", answer="Yes."))
    assert sample.images == (b"p",)


def test_a_marker_after_the_question_and_a_bare_caption_are_understood():
    sample = parse(Kind.UNDERSTANDING, {"jpg": b"p", "json": conversation("What is it?\n<image>", "A cat.")})
    assert sample.turns == (Turn(question="What is it?", answer="A cat."),)
    sample = parse(Kind.UNDERSTANDING, {"webp": b"p", "json": json_bytes({"caption": "A cat."})})
    assert sample.turns == (Turn(question="", answer="A cat."),)


@pytest.mark.parametrize(
    ("kind", "fields", "says"),
    [
        (Kind.UNDERSTANDING, {"json": conversation("<image>", "a")}, "no image"),
        (Kind.UNDERSTANDING, {"png": b"", "jpg": b"", "json": conversation("<image>", "a")}, "several images"),
        (Kind.UNDERSTANDING, {"png": b""}, "no conversations and no caption"),
        (Kind.UNDERSTANDING, {"png": b"", "json": b"{"}, "malformed"),
        (Kind.UNDERSTANDING, {"png": b"", "json": b"\xff"}, "malformed"),
        (Kind.UNDERSTANDING, {"png": b"", "json": b"[" * 100_000}, "malformed"),
        (Kind.UNDERSTANDING, {"png": b"", "json": b"[]"}, "expected an object"),
        (Kind.UNDERSTANDING, {"png": b"", "json": b"{}"}, "no conversations and no caption"),
        (Kind.UNDERSTANDING, {"png": b"", "json": json_bytes({"conversations": []})}, "alternating"),
        (Kind.UNDERSTANDING, {"png": b"", "json": conversation("<image><image>", "a")}, "2 <image> for 1 image"),
        (
            Kind.UNDERSTANDING,
            {"0.png": b"", "1.png": b"", "json": conversation("<image>", "a")},
            "1 <image> for 2 images",
        ),
        (Kind.UNDERSTANDING, {"0.png": b"", "json": conversation("<video>\nq", "a")}, "a question has <video>"),
        (Kind.UNDERSTANDING, {"0.png": b"", "0.jpg": b"", "json": conversation("q", "a")}, "several images"),
        (Kind.UNDERSTANDING, {"0.png": b"", "jpg": b"", "json": conversation("q", "a")}, "several images"),
        (Kind.UNDERSTANDING, {"png": b"", "json": json_bytes({"text": "no marker"})}, "0 <image> for 1 images"),
        (Kind.GENERATION, {"0.png": b"", "1.png": b"", "json": json_bytes({"caption": "c"})}, "neither an image"),
        (Kind.UNDERSTANDING, {"png": b"", "json": conversation("<image>", " ")}, "empty"),
        (
            Kind.UNDERSTANDING,
            {
                "png": b"",
                "json": json_bytes({"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}]}),
            },
            "message 1",
        ),
        (Kind.GENERATION, {"png": b"", "json": b"{}"}, "no caption"),
        (Kind.GENERATION, {"png": b"", "json": b'{"caption": 3}'}, "int"),
        (Kind.GENERATION, {"png": b"", "json": b'{"caption": "\\ud800"}'}, "surrogate"),
        (Kind.GENERATION, {"png": b"", "json": b'{"caption": "  "}'}, "empty"),
        (Kind.GENERATION, {"json": b'{"caption": "a"}'}, "neither an image"),
        (Kind.TEXT, {}, "no text and no conversations"),
        (Kind.TEXT, {"txt": b"a", "json": b"{}"}, "one text or dialogue"),
        (Kind.TEXT, {"txt": b"\xff\xfe"}, "UTF-8"),
        (Kind.TEXT, {"txt": b" \n"}, "empty"),
        (Kind.TEXT, {"txt": b"a", "png": b""}, "image"),
        (Kind.TEXT, {"json": b"{}"}, "no text and no conversations"),
        (Kind.TEXT, {"json": conversation("<image>\nq", "a")}, "a question has <image>"),
        (Kind.TEXT, {"json": conversation("<video>\nq", "a")}, "a question has <video>"),
    ],
)
def test_a_malformed_sample_is_skipped_with_a_reason(kind, fields, says):
    with pytest.raises(SkipSample) as caught:
        parse(kind, fields)
    assert says in str(caught.value)


def test_stored_ids_are_taken_only_with_the_right_type_shape_and_codebook():
    caption = json_bytes({"caption": "a"})
    sample = parse(Kind.GENERATION, {"vq.npy": npy(IDS), "json": caption})
    np.testing.assert_array_equal(sample.vq_ids, IDS)
    objects = io.BytesIO()
    np.save(objects, np.array([{"a": 1}] * 16, dtype=object), allow_pickle=True)
    huge = io.BytesIO()
    np.lib.format.write_array_header_1_0(huge, {"descr": "<u2", "fortran_order": False, "shape": (10**15,)})
    for bad, says in [
        (npy(IDS.astype(np.int64)), "int64"),
        (npy(IDS[:8]), r"\[8\]"),
        (npy(IDS + np.uint16(60)), "codebook has 64"),
        (npy(IDS)[:-4], "cannot be read"),
        (b"", "cannot be read"),
        (b"junk" * 30, "cannot be read"),
        (npy(IDS).replace(b"(16,)", b"(16,"), "cannot be read"),
        (objects.getvalue(), "object"),
        (huge.getvalue(), "1000000000000000"),
    ]:
        with pytest.raises(SkipSample, match=says):
            parse(Kind.GENERATION, {"vq.npy": bad, "json": caption})


def test_text_comes_as_txt_json_or_dialogue():
    assert parse(Kind.TEXT, {"txt": "é\n".encode()}).text == "é\n"
    assert parse(Kind.TEXT, {"json": json_bytes({"text": " a "})}).text == " a "
    sample = parse(Kind.TEXT, {"json": conversation("q", "a")})
    assert sample.text is None and sample.turns == (Turn(question="q", answer="a"),)


def test_only_the_fields_a_kind_needs_are_read():
    present = ["png", "json", "vq.npy", "txt", "cls"]
    assert needed(Kind.UNDERSTANDING, present) == ["json", "txt", "png"]
    assert needed(Kind.GENERATION, present) == ["json", "txt", "vq.npy"]
    # stored ids are of the centre crop
    assert needed(Kind.GENERATION, present, Crop.random) == ["json", "txt", "png"]
    assert needed(Kind.GENERATION, ["json", "vq.npy"], Crop.random) == ["json", "vq.npy"]
    assert needed(Kind.TEXT, ["txt", "cls"]) == ["txt"]


@pytest.mark.parametrize(
    ("prompt", "caption"),
    [
        (ClassPrompt.as_is, "tench, Tinca tinca"),
        (ClassPrompt.first_lemma, "tench"),
        (ClassPrompt.template, "a photo of tench"),
    ],
)
def test_class_prompts_rewrite_the_caption(prompt, caption):
    source = SourceConfig(kind=SourceKind.generation, class_prompt=prompt)
    fields = {"png": b"", "json": json.dumps({"caption": "tench, Tinca tinca"}).encode()}
    assert parse(Kind.GENERATION, fields, source).caption == caption


@pytest.mark.parametrize(
    ("caption", "first"),
    [
        ("A cat. It sleeps.", "A cat."),
        ("No end", "No end"),
        ("3.5 apples and v1.2 fall! Then more.", "3.5 apples and v1.2 fall!"),
        ('He says "stop." Then goes.', 'He says "stop."'),
        ("一只猫。它睡觉。", "一只猫。"),
        ("What?! Yes.", "What?!"),
        (" padded. x", "padded."),
    ],
)
def test_first_sentence(caption, first):
    assert first_sentence(caption) == first


def test_pickles_and_object_arrays_are_never_decoded(tmp_path):
    """A pickle that would make a file when loaded, under every name that other loaders unpickle."""
    owned = tmp_path / "owned"
    bomb = b"cposix\nsystem\n(S'touch " + str(owned).encode() + b"'\ntR."
    for extension in ("pkl", "pyd", "pickle", "pth", "pt", "ten", "tb", "npz", "dill"):
        assert needed(Kind.GENERATION, ["png", "json", extension]) == ["json", "png"]
        assert needed(Kind.TEXT, ["txt", extension]) == ["txt"]
    array = np.empty(16, object)
    array[:] = [b"x"] * 16
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    header = buffer.getvalue()[:128]
    for data in (buffer.getvalue(), header + bomb, bomb):
        with pytest.raises(SkipSample) as caught:
            parse(Kind.GENERATION, {"json": json_bytes({"caption": "a"}), "vq.npy": data})
        assert caught.value.fault == "bad_vq_ids"
    assert not owned.exists()


def test_a_number_of_thousands_of_digits_is_a_skip_like_any_broken_json():
    with pytest.raises(SkipSample, match="malformed .json") as caught:
        parse(Kind.TEXT, {"json": b'{"text": ' + b"7" * 5000 + b"}"})
    assert caught.value.fault == "bad_json"


def test_a_member_too_large_to_be_what_it_says_is_refused_before_it_is_read():
    check_field_size("jpg", MAX_IMAGE_BYTES)
    check_field_size("json", MAX_TEXT_BYTES)
    for extension, size in (
        ("jpg", MAX_IMAGE_BYTES + 1),
        ("json", MAX_TEXT_BYTES + 1),
        ("txt", 1 << 40),
        ("vq.npy", 1 << 40),
    ):
        with pytest.raises(SkipSample, match="rejected before reading") as caught:
            check_field_size(extension, size)
        assert caught.value.fault == "field_too_large"
