"""One interface for two tokenizers: a Hugging Face folder (Janus-Pro's own) or a SentencePiece model.

Users' text never becomes a special token: a caption that contains `<end_of_image>` is encoded as the characters it is
made of. Special ids are looked up by their string; Janus and Janus-Pro number them differently (docs/model.md). Texts
are encoded piece by piece between special tokens, so a SentencePiece model should be trained with add_dummy_prefix off,
remove_extra_whitespaces off and normalization_rule_name identity, and with byte_fallback on: then nothing of a text is
lost.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jp_train.config.schema import TokenizerConfig
from jp_train.errors import ConfigError, absent, named
from jp_train.files import stand_in_at
from jp_train.types import SpecialTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

STRINGS_FILE = "jp_train_tokenizer.json"
"""Written beside an exported tokenizer: which string plays which role."""


class Tokenizer(ABC):
    """Text <-> ids. Made by `load_tokenizer`; pickles as its content, so that a worker process has the same tokenizer
    even if the files change, and need not import transformers."""

    def __init__(self, cfg: TokenizerConfig) -> None:
        self.cfg = cfg
        self.user = cfg.user
        """The role markers as configured."""
        self.assistant = cfg.assistant
        strings = {name: getattr(cfg, name) for name in ("bos", "eos", "pad", "boi", "eoi", "image_placeholder")}
        known = {name: self._special_id(string) for name, string in strings.items()}
        ids = {name: token for name, token in known.items() if token is not None}
        if missing := [f"{string!r} (tokenizer.{name})" for name, string in strings.items() if name not in ids]:
            raise ConfigError(
                f"tokenizer {cfg.path}: the special token{'s' * (len(missing) > 1)} {', '.join(missing)} "
                f"{'are' if len(missing) > 1 else 'is'} not in its vocabulary; add them to the tokenizer as special "
                "tokens, or set those keys in the configuration to the strings that this tokenizer uses"
            )
        if len(set(ids.values())) != len(ids):
            raise ConfigError(
                f"tokenizer {cfg.path}: two of the special tokens have the same id: {ids}; each needs its own"
            )
        self.special = SpecialTokens(**ids)
        self._roles: dict[str, int] = {}
        for name in ("user", "assistant"):
            string = getattr(cfg, name)
            token = self._special_id(string)
            if token is not None:
                self._roles[string] = token
            elif string.startswith("<"):
                raise ConfigError(
                    f"tokenizer {cfg.path}: the role marker {string!r} (tokenizer.{name}) is not one token of its "
                    "vocabulary; add it, or use a plain word like Janus did (tokenizer.user=User "
                    "tokenizer.assistant=Assistant)"
                )
        reserved = self._reserved()
        reserved.update({string: ids[name] for name, string in strings.items()}, **self._roles)
        self._reserved_ids = frozenset(reserved.values())
        self._reserved_pattern = re.compile("|".join(re.escape(s) for s in sorted(reserved, key=len, reverse=True)))

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: no special token is added, and none can appear, whatever the text contains."""
        if not text:
            return []
        if self._reserved_pattern.search(text) is None:
            ids = self._encode(text)
        else:  # cut each special string after its first character: the parts cannot match
            ids, start = [], 0
            for match in self._reserved_pattern.finditer(text):
                ids += self._encode(text[start : match.start() + 1])
                start = match.start() + 1
            ids += self._encode(text[start:])
        if self._reserved_ids.isdisjoint(ids):
            return ids
        # Only when normalisation made a special string out of look-alike characters: spell the text out.
        return [token for character in text for token in self._encode(character) if token not in self._reserved_ids]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text; what is plain goes through the tokenizer in one call."""
        search = self._reserved_pattern.search
        if not all(texts) or any(map(search, texts)):
            return [self.encode(text) for text in texts]
        encoded = self._encode_many(texts)
        for number, ids in enumerate(encoded):
            if not self._reserved_ids.isdisjoint(ids):
                encoded[number] = self.encode(texts[number])
        return encoded

    def role(self, marker: str) -> int | str:
        """The id of a role marker, or the marker itself where it is ordinary text (the predecessor's `User`)."""
        return self._roles.get(marker, marker)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; special tokens and ids past the vocabulary (spare rows of the model's embedding) leave
        nothing."""
        return self._decode(
            [int(token) for token in ids if int(token) not in self._reserved_ids and 0 <= int(token) < self.vocab_size]
        )

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer into `folder` so that `load_saved_tokenizer` (and transformers, for a Hugging Face
        one) can read it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._save(folder)
        strings = {key: value for key, value in asdict(self.cfg).items() if key != "path"}
        (folder / STRINGS_FILE).write_text(json.dumps(strings, ensure_ascii=False, indent=1), encoding="utf-8")

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def fingerprint(self) -> str:
        """Hex digest of everything that decides the ids of a text."""
        strings = json.dumps({key: value for key, value in asdict(self.cfg).items() if key != "path"}, sort_keys=True)
        return hashlib.sha256(strings.encode() + b"\0" + self._content()).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        return (_restored, (type(self), self.cfg, self._content()))

    @abstractmethod
    def _special_id(self, string: str) -> int | None: ...

    @abstractmethod
    def _reserved(self) -> dict[str, int]:
        """Further strings that text must not turn into single tokens."""

    @abstractmethod
    def _encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def _encode_many(self, texts: Sequence[str]) -> list[list[int]]: ...

    @abstractmethod
    def _decode(self, ids: list[int]) -> str: ...

    @abstractmethod
    def _content(self) -> bytes: ...

    @abstractmethod
    def _save(self, folder: Path) -> None: ...


def load_tokenizer(cfg: TokenizerConfig) -> Tokenizer:
    """The tokenizer at `cfg.path`: a folder with tokenizer.json (or with one *.model file), or a SentencePiece .model
    file.

    Raises ConfigError when it is missing, cannot be read, or lacks a special token. Nothing is downloaded and no remote
    code is run.
    """
    path = tokenizer_place(cfg)
    return _SentencePiece(cfg, path) if path.is_file() else _HuggingFace(cfg, path)


def tokenizer_place(cfg: TokenizerConfig) -> Path:
    """The SentencePiece file, or the folder with tokenizer.json, that `cfg.path` leads to; nothing is loaded. Raises
    ConfigError when there is neither."""
    if not cfg.path:
        raise ConfigError(
            "tokenizer.path is not set: give a folder with a Hugging Face tokenizer, or a SentencePiece .model file"
        )
    path = Path(cfg.path).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        with named("tokenizer.path"):
            raise absent(ConfigError, path, "give a Hugging Face tokenizer folder, or a SentencePiece .model file")
    if (path / "tokenizer.json").exists():
        return path
    models = sorted(path.glob("*.model"))
    if len(models) == 1:
        return models[0]
    raise ConfigError(
        f"tokenizer.path {path} holds neither tokenizer.json nor exactly one *.model file (found {len(models)})"
    )


def load_saved_tokenizer(folder: str | Path) -> Tokenizer:
    """A tokenizer that `Tokenizer.save` wrote, e.g. in an export; other Hugging Face folders are taken to use
    Janus-Pro's strings."""
    strings = Path(folder) / STRINGS_FILE
    known = json.loads(strings.read_text(encoding="utf-8")) if strings.exists() else {}
    return load_tokenizer(TokenizerConfig(path=str(folder), **known))


def _restored(kind: type[_SentencePiece] | type[_HuggingFace], cfg: TokenizerConfig, content: bytes) -> Tokenizer:
    return kind(cfg, content)


class _SentencePiece(Tokenizer):
    """`source`: the model file, or its content."""

    def __init__(self, cfg: TokenizerConfig, source: Path | bytes) -> None:
        import sentencepiece

        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(source if isinstance(source, bytes) else source.read_bytes())
        except (OSError, RuntimeError) as error:
            what = stand_in_at(source) if isinstance(source, Path) else ""
            raise ConfigError(
                f"tokenizer.path {source!s:.200} {what or f'is not a SentencePiece model: {error}'}"
            ) from error
        super().__init__(cfg)

    @property
    def vocab_size(self) -> int:
        return self._model.get_piece_size()

    def _special_id(self, string: str) -> int | None:
        token = self._model.piece_to_id(string)
        if token == self._model.unk_id() or self._model.id_to_piece(token) != string:
            return None
        # A user-defined piece cannot be told from an ordinary one: a marker in angle brackets is taken to be one.
        return token if self._model.is_control(token) or (string.startswith("<") and string.endswith(">")) else None

    def _reserved(self) -> dict[str, int]:
        return {
            self._model.id_to_piece(token): token for token in range(self.vocab_size) if self._model.is_control(token)
        }

    def _encode(self, text: str) -> list[int]:
        return self._model.encode(text, out_type=int)

    def _encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        return self._model.encode(list(texts), out_type=int, num_threads=1)

    def _decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)

    def _content(self) -> bytes:
        return self._model.serialized_model_proto()

    def _save(self, folder: Path) -> None:
        (folder / "tokenizer.model").write_bytes(self._content())


class _HuggingFace(Tokenizer):
    """`source`: a folder, read with transformers, or the content of its fast tokenizer, for which transformers is
    not imported."""

    def __init__(self, cfg: TokenizerConfig, source: Path | bytes) -> None:
        # A batch is one row's texts: rows are built in parallel by processes, and threads of each would only fight for
        # the same cores.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        if isinstance(source, bytes):
            import tokenizers

            self._backend = tokenizers.Tokenizer.from_str(source.decode())
        else:
            self._backend = _pretrained(source).backend_tokenizer
        # ids may have gaps
        self._vocab_size = 1 + max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)
        self._added_tokens = self._backend.get_added_tokens_decoder()
        self._added = {added.content: token for token, added in self._added_tokens.items()}
        super().__init__(cfg)

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    def _special_id(self, string: str) -> int | None:
        return self._added.get(string)

    def _reserved(self) -> dict[str, int]:
        # An added token that is plain text to its tokenizer (special=False, e.g. an added word) may appear in text;
        # ours may not.
        return {added.content: token for token, added in self._added_tokens.items() if added.special}

    def _encode(self, text: str) -> list[int]:
        return self._encode_many([text])[0]

    def _encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=True)

    def _content(self) -> bytes:
        return self._backend.to_str().encode()

    def _save(self, folder: Path) -> None:
        assert self.cfg.path is not None
        _pretrained(Path(self.cfg.path).expanduser()).save_pretrained(str(folder))


def _pretrained(folder: Path) -> PreTrainedTokenizerFast:
    from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast

    try:
        try:
            config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError):  # no model beside it, or the released Janus-Pro, which transformers warns about
            config = PreTrainedConfig()
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), config=config, local_files_only=True, trust_remote_code=False
        )
        assert isinstance(tokenizer, PreTrainedTokenizerFast), "it is a slow one"
        return tokenizer
    except Exception as error:  # transformers raises many kinds for a folder it cannot read
        for file in sorted(folder.glob("*.json")):
            if what := stand_in_at(file):
                raise ConfigError(f"tokenizer.path: {file} {what}") from error
        raise ConfigError(f"tokenizer.path {folder} is not a fast Hugging Face tokenizer: {error}") from error
