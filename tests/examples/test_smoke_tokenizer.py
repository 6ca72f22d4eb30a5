"""The smoke run's tokenizer folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from examples.smoke.shards import ShardSizes, build_shards
from examples.smoke.tokenizer import BOS, PIECES, SPECIAL_TOKENS, train_pieces, train_tokenizer, training_texts
from jp_train.errors import ConfigError

TEXTS = (
    "a red circle and a blue square. It shows",
    " leading, double  and trailing spaces ",
    "What colour\n\nis the 日本 circle? é€🎨",
    "def f(x):\n    return 1\n",
    "<|User",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tokenizer")
    sizes = ShardSizes(digits_gen=60, scenes_gen=200, digits_und=60, scenes_und=200, val_each=1)
    build_shards(root / "data", 0, sizes)
    return train_tokenizer(root / "data", root / "tokenizer")


@pytest.fixture(scope="module")
def tokenizer(folder: Path):
    return AutoTokenizer.from_pretrained(folder)


def test_every_special_token_is_a_single_id_with_its_string_and_can_be_skipped(tokenizer) -> None:
    for token in SPECIAL_TOKENS:
        ids = tokenizer.encode(token, add_special_tokens=False)
        assert len(ids) == 1
        assert tokenizer.convert_ids_to_tokens(ids) == [token]
        assert (
            tokenizer.decode([*ids, *tokenizer.encode("a circle", add_special_tokens=False)], skip_special_tokens=True)
            == "a circle"
        )


def test_the_raw_model_and_the_folder_agree_on_every_id_but_for_ties(folder: Path, tokenizer) -> None:
    raw = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert len(tokenizer) == raw.vocab_size() == PIECES + len(SPECIAL_TOKENS)
    assert [raw.piece_to_id(t) for t in SPECIAL_TOKENS] == tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    for text in (*TEXTS, *list(training_texts(folder.parent / "data"))[::23]):
        ours, theirs = tokenizer.encode(text, add_special_tokens=False), raw.encode(text)
        # two segmentations of the same score, as in runs of one character: the libraries break the tie differently
        if ours != theirs:
            assert tokenizer.decode(ours) == tokenizer.decode(theirs) == text
            assert sum(map(raw.get_score, ours)) == pytest.approx(sum(map(raw.get_score, theirs)), rel=1e-5)


@pytest.mark.parametrize("text", TEXTS)
def test_text_round_trips_exactly_even_where_no_piece_covers_it(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_no_dummy_space_is_added_so_pieces_encode_alike_after_a_special_token(tokenizer) -> None:
    plain = tokenizer.encode(": a circle", add_special_tokens=False)
    after = tokenizer.encode("<|User|>: a circle", add_special_tokens=False)
    assert after[1:] == plain


def test_bos_is_prepended_only_with_special_tokens(tokenizer) -> None:
    bare = tokenizer.encode("a circle", add_special_tokens=False)
    assert tokenizer.encode("a circle") == [tokenizer.convert_tokens_to_ids(BOS), *bare]


def test_shapes_colours_and_digit_names_take_few_tokens(tokenizer) -> None:
    words = (
        "zero one two three four five six seven eight nine circle square triangle cross "
        "red orange yellow green blue purple"
    )
    lengths = [len(tokenizer.encode(" " + word, add_special_tokens=False)) for word in words.split()]
    assert sum(lengths) / len(lengths) <= 2.5


def test_too_little_text_for_the_pieces_is_a_clear_error() -> None:
    with pytest.raises(ConfigError, match="could not train 5000 pieces"):
        train_pieces(["a circle"] * 10, pieces=5000)
