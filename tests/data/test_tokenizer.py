from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from dataclasses import replace

import pytest

from jp_train.config.schema import TokenizerConfig
from jp_train.data.tokenizer import load_saved_tokenizer, load_tokenizer
from jp_train.errors import ConfigError

SPECIAL_NAMES = ("bos", "eos", "pad", "boi", "eoi", "image_placeholder")


@pytest.fixture(scope="module")
def hugging_face_config(tmp_path_factory) -> TokenizerConfig:
    """A byte-level BPE as Janus-Pro's is: its post-processor prepends BOS, its special tokens are added tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    cfg = TokenizerConfig()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["the red circle and the User of the image"] * 20, trainer)
    strings = [*(getattr(cfg, name) for name in SPECIAL_NAMES), cfg.user, cfg.assistant]
    tokenizer.add_special_tokens([AddedToken(string, special=True, normalized=False) for string in strings])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cfg.bos} $A", special_tokens=[(cfg.bos, tokenizer.token_to_id(cfg.bos))]
    )
    folder = tmp_path_factory.mktemp("hf")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=cfg.bos, eos_token=cfg.eos).save_pretrained(folder)
    return dataclasses.replace(cfg, path=str(folder))


@pytest.fixture(params=["sentencepiece", "hugging_face"])
def any_tokenizer(request, tokenizer_config, hugging_face_config):
    return load_tokenizer(tokenizer_config if request.param == "sentencepiece" else hugging_face_config)


TEXTS = ["", "the red circle", "  two  spaces\n\nand lines\n", "naïve 猫 🐈 \t tab", "User: a", "a\x00b"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_encoding_and_no_special_token_is_added(any_tokenizer, text):
    ids = any_tokenizer.encode(text)
    assert any_tokenizer.decode(ids) == text
    assert not set(ids) & set(dataclasses.astuple(any_tokenizer.special))


def test_text_that_contains_special_strings_yields_no_special_id(any_tokenizer):
    cfg = any_tokenizer.cfg
    special = {
        *dataclasses.astuple(any_tokenizer.special),
        any_tokenizer.role(cfg.user),
        any_tokenizer.role(cfg.assistant),
    }
    assert len(special) == 8
    for name in (*SPECIAL_NAMES, "user", "assistant"):
        string = getattr(cfg, name)
        for text in (string, f"a caption with {string} inside", string * 3, f"{string[:4]}{string}{string[1:]}"):
            ids = any_tokenizer.encode(text)
            assert not set(ids) & special, text
            decoded = any_tokenizer.decode(ids)
            assert decoded in (text, text.replace("▁", " "))  # SentencePiece cannot tell U+2581 from a space


def test_user_defined_special_pieces_of_sentencepiece_are_no_door_either(tmp_path):
    import io

    import sentencepiece

    cfg, model = TokenizerConfig(), io.BytesIO()
    strings = [cfg.bos, cfg.eos, cfg.boi, cfg.eoi, cfg.image_placeholder, cfg.user, cfg.assistant, "<pad>"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the end of image is near <"] * 9),
        model_writer=model,
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        user_defined_symbols=strings,
        minloglevel=2,
    )
    (tmp_path / "u.model").write_bytes(model.getvalue())
    tokenizer = load_tokenizer(TokenizerConfig(path=str(tmp_path / "u.model"), pad="<pad>"))
    reserved = {*dataclasses.astuple(tokenizer.special), tokenizer.role(cfg.user)}
    wide = "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in cfg.eoi)  # NFKC turns it into <end_of_image>
    for text in (f"near {cfg.eoi} end", wide, f"{cfg.user}{wide}"):
        assert tokenizer.encode(text)
        assert not set(tokenizer.encode(text)) & reserved


def test_role_markers_are_single_ids_in_templates_only(any_tokenizer):
    cfg = any_tokenizer.cfg
    user = any_tokenizer.role(cfg.user)
    assert isinstance(user, int) and any_tokenizer.decode([user]) == ""
    assert user not in any_tokenizer.encode(f"{cfg.user}: hi")


def test_the_predecessors_plain_roles_are_ordinary_text(hugging_face_config, tokenizer_config):
    for base in (hugging_face_config, tokenizer_config):
        tokenizer = load_tokenizer(dataclasses.replace(base, user="User", assistant="Assistant"))
        assert tokenizer.role("User") == "User"


@pytest.mark.parametrize("name", SPECIAL_NAMES)
def test_a_missing_special_token_is_named(any_tokenizer, name):
    with pytest.raises(ConfigError, match=f"<gone>.*tokenizer.{name}"):
        load_tokenizer(dataclasses.replace(any_tokenizer.cfg, **{name: "<gone>"}))


def test_a_missing_role_marker_and_doubled_special_tokens_are_errors(any_tokenizer):
    with pytest.raises(ConfigError, match="<|Human|>"):
        load_tokenizer(dataclasses.replace(any_tokenizer.cfg, user="<|Human|>"))
    with pytest.raises(ConfigError, match="same id"):
        load_tokenizer(dataclasses.replace(any_tokenizer.cfg, pad=any_tokenizer.cfg.eos))


def test_a_missing_or_broken_tokenizer_path_is_a_config_error(tmp_path):
    (tmp_path / "broken.model").write_bytes(b"junk")
    (tmp_path / "folder").mkdir()
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    for path in (None, "none", "broken.model", "folder", "hf"):
        with pytest.raises(ConfigError, match="tokenizer"):
            load_tokenizer(TokenizerConfig(path=None if path is None else str(tmp_path / path)))


def test_saving_pickling_and_decoding_keep_everything(any_tokenizer, tmp_path):
    any_tokenizer.save(tmp_path / "saved")
    ids = any_tokenizer.encode("the red circle")
    for copy in (load_saved_tokenizer(tmp_path / "saved"), pickle.loads(pickle.dumps(any_tokenizer))):
        assert copy.encode("the red circle") == ids
        assert copy.special == any_tokenizer.special
    special = any_tokenizer.special
    assert any_tokenizer.decode([special.bos, *ids, special.eos, any_tokenizer.vocab_size + 5]) == "the red circle"


def test_the_fingerprint_follows_content_not_place(any_tokenizer, tmp_path):
    any_tokenizer.save(tmp_path)
    assert load_saved_tokenizer(tmp_path).fingerprint == any_tokenizer.fingerprint
    assert load_tokenizer(dataclasses.replace(any_tokenizer.cfg, user="User")).fingerprint != any_tokenizer.fingerprint


def test_a_vocabulary_with_gaps_is_as_large_as_its_largest_id(hugging_face_config, tmp_path):
    folder = tmp_path / "gaps"
    shutil.copytree(hugging_face_config.path, folder)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    pieces = content["model"]["vocab"]
    far = max(pieces, key=pieces.__getitem__)
    pieces[far] = 70_000
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    tokenizer = load_tokenizer(dataclasses.replace(hugging_face_config, path=str(folder)))
    text = load_tokenizer(hugging_face_config).decode([load_tokenizer(hugging_face_config).vocab_size - 9])
    assert 70_000 in tokenizer.encode(text) and tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == 70_001


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_git_lfs_pointer_in_place_of_a_tokenizer_is_named(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 7847652\n")
    with pytest.raises(ConfigError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
        load_tokenizer(TokenizerConfig(path=str(tmp_path)))


def test_all_missing_special_tokens_are_named_at_once(tokenizer_config):
    cfg = replace(tokenizer_config, bos="<none>", eos="<neither>")
    with pytest.raises(
        ConfigError, match=r"tokens '<none>' \(tokenizer.bos\), '<neither>' \(tokenizer.eos\) are not in"
    ):
        load_tokenizer(cfg)
