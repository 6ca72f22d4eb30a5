"""Every layout of the table in docs/model.md, written by hand with one id per character: what goes in, and what each
position must predict."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from jp_train.config.schema import Crop, ImageEnd, PadDropoutForm, Template
from jp_train.data.encode import Encoder
from jp_train.data.image import load_generation_image, load_understanding_image
from jp_train.data.permute import document_uniform
from jp_train.errors import ConfigError, DataError, SkipSample
from jp_train.types import (
    IGNORE_INDEX,
    PENDING_VQ_ID,
    GenerationSample,
    Kind,
    SourceInfo,
    SpecialTokens,
    TextSample,
    Turn,
    UnderstandingSample,
)
from tests.data.data_samples import SLOTS, png

INFO = SourceInfo(source="s", shard="s.tar", key="k")
MARKS = {"^": 300, "$": 301, "_": 302, "[": 303, "]": 304, "#": 305, "U": 306, "A": 307}
"""One character a token: BOS EOS pad boi eoi image_placeholder user assistant; every other character is its own code
point."""
PICTURE = "[" + "#" * SLOTS + "]"


class LetterTokenizer:
    """One id a character, so that expectations can be written as strings."""

    special = SpecialTokens(bos=300, eos=301, pad=302, boi=303, eoi=304, image_placeholder=305)
    user, assistant, vocab_size, fingerprint = "<|User|>", "<|Assistant|>", 308, "letters"
    plain_roles = False

    def encode(self, text):
        return [ord(character) for character in text]

    def encode_many(self, texts):
        return [self.encode(text) for text in texts]

    def role(self, marker):
        if self.plain_roles:
            return marker.strip("<|>")
        return {self.user: 306, self.assistant: 307}[marker]


def ids(text: str) -> list[int]:
    return [MARKS.get(character, ord(character)) for character in text]


def text_of(tokens) -> str:
    back = {token: mark for mark, token in MARKS.items()}
    return "".join("." if token == IGNORE_INDEX else back.get(token, chr(token)) for token in map(int, tokens))


@pytest.fixture
def encoder_for(cfg):
    def make(template: Template, **options) -> Encoder:
        cfg.stage.template = template
        for name, value in options.items():
            setattr(cfg.data, name, value)
        return Encoder(cfg, LetterTokenizer())

    return make


def understanding(*turns: tuple[str, str]) -> UnderstandingSample:
    return UnderstandingSample(info=INFO, images=(png(1),), turns=tuple(Turn(question=q, answer=a) for q, a in turns))


def generation(caption: str = "cat", stored: bool = True) -> GenerationSample:
    if stored:
        return GenerationSample(info=INFO, caption=caption, vq_ids=np.arange(SLOTS, dtype=np.uint16) + np.uint16(5))
    return GenerationSample(info=INFO, caption=caption, image=png(2))


S1, S2, S3 = Template.stage1, Template.stage2, Template.stage3
CAPTION, QUESTION, TWO = [("", "cat")], [("who?", "cat")], [("who?", "cat"), ("why?", "so")]
ASK = {"caption_question": "say"}

UNDERSTANDING_LAYOUTS = [
    # template, options, turns, tokens, and beside it the supervised text: the token that each position predicts
    (S1, {}, CAPTION, f"^{PICTURE}cat$", "cat$"),
    (S1, {}, QUESTION, f"^{PICTURE}who? cat$", "who? cat$"),
    (S1, {"mask_question": True}, QUESTION, f"^{PICTURE}who? cat$", ".... cat$"),
    (S2, ASK, CAPTION, f"^{PICTURE}say cat$", "say cat$"),
    (S2, {**ASK, "mask_question": True}, CAPTION, f"^{PICTURE}say cat$", "... cat$"),
    (S2, {}, QUESTION, f"^{PICTURE}who? cat$", "who? cat$"),
    (S2, {}, TWO, f"^{PICTURE}who? cat\nwhy? so$", "who? cat\nwhy? so$"),
    (S2, {"mask_question": True}, TWO, f"^{PICTURE}who? cat\nwhy? so$", ".... cat..... so$"),
    (S3, {"system_prompt": ""}, QUESTION, f"^U: {PICTURE}\nwho?\n\nA: cat$", "......." + ".. cat$"),
    (S3, {"system_prompt": "Hi."}, QUESTION, f"^Hi.\n\nU: {PICTURE}\nwho?\n\nA: cat$", "......." + ".. cat$"),
    (S3, {"system_prompt": "Hi.", **ASK}, CAPTION, f"^Hi.\n\nU: {PICTURE}\nsay\n\nA: cat$", "......" + ".. cat$"),
    (
        S3,
        {"system_prompt": "Hi."},
        TWO,
        f"^Hi.\n\nU: {PICTURE}\nwho?\n\nA: cat$U: why?\n\nA: so$",
        "........." + " cat$" + "..........." + " so$",
    ),
]


@pytest.mark.parametrize(("template", "options", "turns", "tokens", "supervised"), UNDERSTANDING_LAYOUTS)
def test_understanding_layouts(encoder_for, template, options, turns, tokens, supervised):
    encoder = encoder_for(template, **options)
    document = encoder.encode(understanding(*turns), source="s")
    assert text_of(document.input_ids) == tokens
    before = "." * (len(tokens) - len(supervised))
    # position i predicts token i + 1; the last predicts nothing
    assert text_of(document.labels) == (before + supervised)[1:] + "."
    assert (document.gen_labels == IGNORE_INDEX).all()
    start = tokens.index("[") + 1
    assert document.und_slots.tolist() == list(range(start, start + SLOTS))
    assert document.kind is Kind.UNDERSTANDING and len(document.gen_slots) == 0
    np.testing.assert_array_equal(document.und_images, load_understanding_image(png(1), 32)[None])
    assert len(document) == encoder.length(understanding(*turns))


TEXT_LAYOUTS = [
    (S1, TextSample(info=INFO, text="cat"), "^cat$", "cat$"),
    (S2, TextSample(info=INFO, text="cat"), "^cat$", "cat$"),
    (S3, TextSample(info=INFO, text="cat"), "^cat$", "cat$"),
    (S2, TextSample(info=INFO, turns=(Turn(question="who?", answer="cat"),)), "^who?\ncat$", "who?\ncat$"),
    (
        S3,
        TextSample(info=INFO, turns=(Turn(question="who?", answer="cat"),)),
        "^U: who?\n\nA: cat$",
        "............ cat$"[1:],
    ),
    (
        S3,
        TextSample(info=INFO, turns=(Turn(question="who?", answer="cat"), Turn(question="why?", answer="so"))),
        "^U: who?\n\nA: cat$U: why?\n\nA: so$",
        "..........." + " cat$" + "..........." + " so$",
    ),
]


@pytest.mark.parametrize(("template", "sample", "tokens", "supervised"), TEXT_LAYOUTS)
def test_text_layouts(encoder_for, template, sample, tokens, supervised):
    document = encoder_for(template).encode(sample, source="s")
    assert text_of(document.input_ids) == tokens
    assert text_of(document.labels) == ("." * (len(tokens) - len(supervised)) + supervised)[1:] + "."
    assert len(document.und_slots) == len(document.gen_slots) == 0
    assert (document.gen_labels == IGNORE_INDEX).all()


IMAGE = "#" * SLOTS
GENERATION_LAYOUTS = [
    (S1, {}, f"^cat[{IMAGE}]$", ""),
    (S2, {}, f"^cat[{IMAGE}]$", ""),
    (S2, {"image_end": ImageEnd.eoi}, f"^cat[{IMAGE}]", ""),
    (S2, {"image_end": ImageEnd.none}, f"^cat[{IMAGE}", ""),
    (S2, {"supervise_eoi": True}, f"^cat[{IMAGE}]$", "]$"),
    (S2, {"supervise_eoi": True, "image_end": ImageEnd.eoi}, f"^cat[{IMAGE}]", "]"),
    (S3, {}, f"^U: cat\n\nA:[{IMAGE}]$", ""),
    (S3, {"space_before_boi": True}, f"^U: cat\n\nA: [{IMAGE}]$", ""),
    (S2, {"pad_dropout": 1.0}, f"^___[{IMAGE}]$", ""),
    (S3, {"pad_dropout": 1.0}, f"^__________[{IMAGE}]$", ""),
    (S3, {"pad_dropout": 1.0, "pad_dropout_form": PadDropoutForm.single_pad}, f"^_[{IMAGE}]$", ""),
    (S3, {"pad_dropout": 1.0, "pad_dropout_form": PadDropoutForm.empty}, f"^[{IMAGE}]$", ""),
]


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize(("template", "options", "tokens", "supervised"), GENERATION_LAYOUTS)
def test_generation_layouts(encoder_for, template, options, tokens, supervised, stored):
    encoder = encoder_for(template, **options)
    sample = generation(stored=stored)
    document = encoder.encode(sample, source="s")
    assert text_of(document.input_ids) == tokens
    expected = list("." * len(tokens))
    if supervised:
        expected[len(tokens) - len(supervised) - 1 : -1] = supervised
    assert text_of(document.labels) == "".join(expected)
    boi = tokens.index("[")
    assert document.gen_slots.tolist() == list(range(boi + 1, boi + 1 + SLOTS))
    # boi and the first S - 1 slots predict ids 0 .. S - 1; boi itself is never predicted
    ids_expected = np.full(len(tokens), IGNORE_INDEX)
    ids_expected[boi : boi + SLOTS] = np.arange(SLOTS) + 5 if stored else PENDING_VQ_ID
    np.testing.assert_array_equal(document.gen_labels, ids_expected)
    if stored:
        assert document.gen_image is None
        np.testing.assert_array_equal(document.vq_ids, sample.vq_ids)
    else:
        np.testing.assert_array_equal(document.gen_image, load_generation_image(png(2), 32))
        assert document.vq_ids is None
    assert not ((document.labels != IGNORE_INDEX) & (document.gen_labels != IGNORE_INDEX)).any()
    dropped = options.get("pad_dropout", 0) == 1
    assert encoder.length(sample, drop_condition=dropped) == len(tokens)


def test_a_first_sentence_caption_is_what_the_index_counted(encoder_for):
    encoder = encoder_for(S2)
    sample = generation("A cat. It sleeps.")
    document = encoder.encode(sample, source="s", short_caption=True)
    assert text_of(document.input_ids) == f"^A cat.[{IMAGE}]$"
    assert (
        encoder.token_counts(sample).short_tokens
        == len(document)
        == encoder.token_counts(sample).tokens - len(" It sleeps.")
    )


@pytest.mark.parametrize("form", list(PadDropoutForm))
@pytest.mark.parametrize("template", list(Template))
def test_counts_of_every_variant_equal_the_encoded_lengths(encoder_for, template, form):
    sample = generation("A cat. It sleeps.")
    for probability in (0.0, 1.0):
        encoder = encoder_for(template, pad_dropout=probability, pad_dropout_form=form)
        counts = encoder.token_counts(sample)
        for short in (False, True):
            expected = {
                (0.0, False): counts.tokens,
                (0.0, True): counts.short_tokens,
                (1.0, False): counts.dropped_tokens,
                (1.0, True): counts.short_dropped_tokens,
            }[probability, short]
            assert len(encoder.encode(sample, source="s", short_caption=short)) == expected


def test_pad_dropout_is_a_function_of_source_epoch_and_sample_and_hits_its_share(encoder_for):
    encoder = encoder_for(S2, pad_dropout=0.1)
    hits = [encoder.drops_condition("s", epoch, sample) for epoch in range(4) for sample in range(1000)]
    assert 0.08 < np.mean(hits) < 0.12
    assert hits == [document_uniform(7, "s", e, n, "pad_dropout") < 0.1 for e in range(4) for n in range(1000)]
    hit = hits.index(True)
    assert "_" in text_of(
        encoder.encode(generation(), source="s", epoch=hit // 1000, sample_index=hit % 1000).input_ids
    )
    held_out = encoder.encode(generation(), source="s", epoch=hit // 1000, sample_index=hit % 1000, held_out=True)
    assert text_of(held_out.input_ids) == f"^cat[{IMAGE}]$"


def test_a_random_crop_is_the_same_each_time_and_differs_between_documents(encoder_for):
    gradient = np.repeat(np.arange(200, dtype=np.uint8)[None, :, None], 20, 0).repeat(3, 2)
    buffer = io.BytesIO()
    Image.fromarray(gradient).save(buffer, "PNG")
    sample = GenerationSample(info=INFO, caption="a", image=buffer.getvalue())
    encoder = encoder_for(S2, crop=Crop.random)

    def left(sample_index):
        return int(encoder.encode(sample, source="s", sample_index=sample_index).gen_image[0, 0, 0])

    assert [left(n) for n in range(8)] == [left(n) for n in range(8)]
    assert len({left(n) for n in range(8)}) > 4


def test_truncation_cuts_the_caption_and_keeps_template_and_image(encoder_for):
    encoder = encoder_for(S3)
    document = encoder.encode(generation("a very long caption"), source="s", max_tokens=SLOTS + 12)
    assert text_of(document.input_ids) == f"^U: a\n\nA:[{IMAGE}]$"
    assert (document.gen_labels[document.gen_slots - 1] == np.arange(SLOTS) + 5).all()
    with pytest.raises(SkipSample, match="image and the template"):
        encoder.encode(generation("a very long caption"), source="s", max_tokens=SLOTS + 10)
    assert encoder.min_tokens(Kind.GENERATION) == SLOTS + 11


def test_truncation_of_an_answer_keeps_the_image_and_wants_something_to_learn(encoder_for):
    encoder = encoder_for(S3, system_prompt="")
    sample = understanding(("who?", "a long answer"))
    document = encoder.encode(sample, source="s", max_tokens=SLOTS + 17)
    assert text_of(document.input_ids) == f"^U: {PICTURE}\nwho?\n\nA: a"
    assert text_of(document.labels)[-3:] == " a."
    with pytest.raises(SkipSample, match="nothing of its answers"):
        encoder.encode(sample, source="s", max_tokens=SLOTS + 15)
    with pytest.raises(SkipSample, match="image"):
        encoder.encode(sample, source="s", max_tokens=SLOTS + 5)
    assert encoder.min_tokens(Kind.UNDERSTANDING) == SLOTS + 6


def test_a_length_that_differs_from_the_index_stops_the_run(encoder_for):
    encoder = encoder_for(S2)
    with pytest.raises(DataError, match="stale index.*'k'.*its index says 9"):
        encoder.encode(TextSample(info=INFO, text="cat"), source="s", expected_tokens=9)


@pytest.mark.parametrize("template", list(Template))
def test_inference_prompts_are_prefixes_of_the_training_documents(encoder_for, template):
    encoder = encoder_for(template)
    document = encoder.encode(understanding(("who?", "cat")), source="s").input_ids.tolist()
    prompt = encoder.understanding_prompt_ids("who?", template)
    assert document[: len(prompt)] == prompt and text_of(document[len(prompt) :]) == " cat$"
    assert prompt == encoder.understanding_prompt_ids("who?\n<image>", template), "its only image stands first"
    document = encoder.encode(generation(), source="s").input_ids.tolist()
    prompt = encoder.generation_prompt_ids("cat", template.value)
    assert document[: len(prompt)] == prompt and text_of(prompt)[-1] == "["
    unconditional = encoder_for(template, pad_dropout=1.0)
    document = unconditional.encode(generation(), source="s").input_ids.tolist()
    assert document[: len(prompt)] == unconditional.unconditional_prompt_ids("cat", template)


@pytest.mark.parametrize("template", list(Template))
@pytest.mark.parametrize("question", ["who?", "is <image> like <image>?"])
def test_a_prompt_of_several_images_is_the_prefix_of_its_training_document(encoder_for, template, question):
    encoder = encoder_for(template)
    turns = (Turn(question=question, answer="cat"),)
    sample = UnderstandingSample(info=INFO, images=(png(1), png(2)), turns=turns)
    document = encoder.encode(sample, source="s").input_ids.tolist()
    prompt = encoder.understanding_prompt_ids(question, template, 2)
    assert document[: len(prompt)] == prompt and text_of(document[len(prompt) :]) == " cat$"
    assert text_of(prompt).count(PICTURE) == 2
    foreign = question.replace("<image>", "<image_placeholder>")
    assert encoder.understanding_prompt_ids(foreign, template, 2) == prompt
    with pytest.raises(SkipSample, match="1 <image> for 2 images"):
        encoder.understanding_prompt_ids("is <image> it?", template, 2)


def test_a_caption_prompt_is_asked_as_captions_are_in_training(encoder_for):
    encoder = encoder_for(S2, caption_question="say")
    document = encoder.encode(understanding(("", "cat")), source="s").input_ids.tolist()
    prompt = encoder.understanding_prompt_ids("")
    assert document[: len(prompt)] == prompt and text_of(document[len(prompt) :]) == " cat$"


def test_plain_role_words_are_text(encoder_for, monkeypatch):
    monkeypatch.setattr(LetterTokenizer, "plain_roles", True)
    encoder = encoder_for(S3)
    document = encoder.encode(generation(), source="s").input_ids
    assert document.tolist() == ids("^") + [ord(c) for c in "User: cat\n\nAssistant:"] + ids(f"[{IMAGE}]$")


def test_the_real_tokenizer_keeps_users_special_strings_out_of_documents(cfg, tokenizer):
    cfg.stage.template = S3
    encoder = Encoder(cfg, tokenizer)
    special = dataclasses.asdict(tokenizer.special)
    caption = "a <end_of_image> and <begin_of_image> <|User|> <image_placeholder>"
    document = encoder.encode(generation(caption), source="s")
    counts = {name: int((document.input_ids == token).sum()) for name, token in special.items()}
    assert counts == {"bos": 1, "eos": 1, "pad": 0, "boi": 1, "eoi": 1, "image_placeholder": SLOTS}
    assert int((document.input_ids == tokenizer.role("<|User|>")).sum()) == 1
    assert caption in tokenizer.decode(document.input_ids)


def test_a_vocabulary_larger_than_the_models_embedding_is_an_error(cfg, tokenizer):
    cfg.model.language.vocab_size = tokenizer.vocab_size - 1
    with pytest.raises(ConfigError, match="model.language.vocab_size"):
        Encoder(cfg, tokenizer)


def test_the_fingerprint_follows_every_option_that_changes_a_length(encoder_for):
    prints = {encoder_for(template).fingerprint for template in Template}
    base = encoder_for(S3).fingerprint
    for name, value in [
        ("image_end", ImageEnd.none),
        ("space_before_boi", True),
        ("system_prompt", "x"),
        ("caption_question", "y"),
        ("pad_dropout_form", PadDropoutForm.empty),
    ]:
        prints.add(encoder_for(S3, **{name: value}).fingerprint)
    assert len(prints) == 8
    assert base in prints
