"""Train the smoke run's tokenizer: SentencePiece learns the pieces, a Hugging Face folder holds the result.

Two forms come out, with the same ids: ``tokenizer.model`` (SentencePiece) and the ``transformers`` files beside it,
loadable by ``AutoTokenizer.from_pretrained(folder)`` without remote code.  SentencePiece itself is trained on
ordinary pieces only; the Janus special tokens are appended afterwards, because three of them contain U+2581, which
its trainer reads as a space.  In the transformers form they match literally, before any normalization (``decode``
still shows their U+2581 as a space, as it does every piece's; ask for ids by string, or skip special tokens).
There is no dummy prefix space: equal text has equal pieces wherever it stands.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from examples.smoke.reading import read_source, texts_of
from jp_train.errors import ConfigError

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
BOI, EOI, IMAGE = "<begin_of_image>", "<end_of_image>", "<image_placeholder>"
USER, ASSISTANT = "<|User|>", "<|Assistant|>"
SPECIAL_TOKENS = (BOS, EOS, PAD, BOI, EOI, IMAGE, USER, ASSISTANT)
"""In the order of their ids, which start right after the SentencePiece pieces."""

PIECES = 1208
_SPACE = "▁"


def train_pieces(texts: Iterable[str], *, pieces: int = PIECES) -> bytes:
    """Train a SentencePiece unigram model and return the serialized model, special tokens included.

    The newline is a separate piece; spaces are kept as they are; what no piece covers falls back to bytes.
    The special tokens are appended as user-defined symbols, so the raw model alone knows their ids too.

    Raises:
        ConfigError: if SentencePiece cannot make that many pieces from the texts.
    """
    serialized = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=serialized,
            model_type="unigram",
            vocab_size=pieces,
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            user_defined_symbols=["\n"],
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
            max_sentence_length=16384,
        )
    except RuntimeError as error:
        raise ConfigError(f"SentencePiece could not train {pieces} pieces: {error}") from error
    model = sentencepiece_model_pb2.ModelProto.FromString(serialized.getvalue())
    for token in SPECIAL_TOKENS:
        model.pieces.add(piece=token, score=0.0, type=sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED)
    return model.SerializeToString()


def to_fast_tokenizer(serialized: bytes) -> PreTrainedTokenizerFast:
    """Build the equivalent Hugging Face tokenizer.  It prepends BOS by default, as the released Janus tokenizers do."""
    model = sentencepiece_model_pb2.ModelProto.FromString(serialized)
    ordinary = [(p.piece, p.score) for p in model.pieces if p.piece not in SPECIAL_TOKENS]
    tokenizer = Tokenizer(models.Unigram(ordinary, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(rf"(?={_SPACE})|(?<=\n)|(?=\n)"), behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token="<unk>",
        additional_special_tokens=[BOI, EOI, IMAGE, USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
    )


def training_texts(data_dir: Path) -> Iterable[str]:
    """Every text of the training sources under ``data_dir`` (held-out sources, ``…-val``, are left out)."""
    for folder in sorted(Path(data_dir).iterdir()):
        if folder.is_dir() and not folder.name.endswith("-val"):
            for sample in read_source(folder):
                yield from texts_of(sample)


def train_tokenizer(data_dir: Path, out_dir: Path, *, pieces: int = PIECES) -> Path:
    """Train on the shards under ``data_dir`` and write the tokenizer folder ``out_dir``; returns it.

    Raises:
        ConfigError: if there is too little text for ``pieces`` pieces.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    serialized = train_pieces(training_texts(data_dir), pieces=pieces)
    to_fast_tokenizer(serialized).save_pretrained(out_dir)
    (out_dir / "tokenizer.model").write_bytes(serialized)
    return out_dir
