"""Tokens as text that a person can read: special tokens named, image slots counted, and hostile text made harmless.

`pieces` cuts the ids of a document into the shortest runs of tokens that decode on their own (a character may be spread
over several byte tokens); `printable` turns control, bidirectional and other invisible characters into visible marks.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from jp_train.data.tokenizer import Tokenizer

MOST_TOKENS = 8
"""Tokens after which an undecodable run is shown as it is. A character has at most four bytes, so no decodable run is
this long."""


class Shown(Enum):
    """What a piece is: `text`; one `special` token (its text is the token's own string); a run of image `slots`."""

    text = "text"
    special = "special"
    slots = "slots"


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens [start, end) of the ids given to `pieces`, and their text (empty for slots)."""

    start: int
    end: int
    shown: Shown
    text: str


def pieces(ids: Sequence[int], tokenizer: Tokenizer, *, short: bool = False) -> list[Piece]:
    """`ids` as pieces that tile it, in order. The texts between two special tokens join to what the tokenizer decodes
    there.

    `short`: name the layout's tokens by their role (`<bos>`) instead of their own string.
    """
    names = special_names(tokenizer, short=short)
    slot = tokenizer.special.image_placeholder
    names |= {token: f"<id {token}>" for token in set(map(int, ids)) - names.keys() if _vanishes(token, tokenizer)}
    result: list[Piece] = []
    at = 0
    while at < len(ids):
        end = at + 1
        token = int(ids[at])
        if token == slot:
            while end < len(ids) and int(ids[end]) == slot:
                end += 1
            result.append(Piece(at, end, Shown.slots, ""))
        elif token in names:
            result.append(Piece(at, end, Shown.special, names[token]))
        else:
            while end < len(ids) and int(ids[end]) not in names:
                end += 1
            result += _text_pieces([int(token) for token in ids[at:end]], at, tokenizer)
        at = end
    return result


def special_names(tokenizer: Tokenizer, *, short: bool = False) -> dict[int, str]:
    """Id -> string (`short`: role, like `<bos>`) of the special tokens that layouts use, role markers included where
    they are single tokens."""
    roles = ("bos", "eos", "pad", "boi", "eoi", "image_placeholder")
    names = {getattr(tokenizer.special, role): f"<{role}>" if short else getattr(tokenizer.cfg, role) for role in roles}
    for marker in (tokenizer.user, tokenizer.assistant):
        token = tokenizer.role(marker)
        if isinstance(token, int):
            names[token] = marker
    return names


def snippet(ids: Sequence[int], tokenizer: Tokenizer, characters: int = 160) -> str:
    """One line of at most about `characters`: the text of `ids`, special tokens named by role, image slots counted,
    its middle left out."""
    line = ""
    last, times = "", 0
    for piece in [*pieces(ids, tokenizer, short=True), Piece(0, 0, Shown.text, "")]:
        if piece.shown is Shown.special and piece.text == last:
            times += 1
            continue
        line += f" x{times} " if times > 1 else ""
        last, times = (piece.text, 1) if piece.shown is Shown.special else ("", 0)
        line += f"<{piece.end - piece.start} image slots>" if piece.shown is Shown.slots else piece.text
    line = printable(line).replace("\n", "↵").replace("\t", "⇥")
    if len(line) <= characters:
        return line
    tail = characters // 3
    return f"{line[: characters - tail - 3]} … {line[-tail:]}"


def printable(text: str) -> str:
    """`text` with every character that could hide, reorder or break something shown as a mark; new lines and tabs stay.

    Control characters become their Unicode pictures (NUL: ␀), format and bidirectional controls, lone surrogates,
    private and unassigned characters `[U+202E]`. What is left can be encoded as UTF-8 and printed to a terminal.
    """
    return "".join(_mark(character) for character in text)


def _mark(character: str) -> str:
    code = ord(character)
    if 32 <= code < 127 or character in "\n\t":
        return character
    if code < 32:
        return chr(0x2400 + code)
    if code == 127:
        return "␡"
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        return f"[U+{code:04X}]"
    return character


def _vanishes(token: int, tokenizer: Tokenizer) -> bool:
    """Whether a token leaves nothing in a text, not even a space (decoders drop spaces at the start, so it is tried
    between letters)."""
    letter = tokenizer.encode("a")[-1]
    return tokenizer.decode((letter, token, letter)) == tokenizer.decode((letter, letter))


def _text_pieces(ids: list[int], offset: int, tokenizer: Tokenizer) -> list[Piece]:
    """Pieces of a run without special tokens. Each is decoded behind the last piece that is more than spaces, on
    which a decoder's treatment of spaces may depend."""
    result: list[Piece] = []
    before, start = 0, 0  # ids[before:start] are decoded already
    for end in range(1, len(ids) + 1):
        known = tokenizer.decode(ids[before:start]) if start else ""
        text = tokenizer.decode(ids[before:end])
        whole = not text.endswith("\ufffd") and text.startswith(known)
        if not whole and end < len(ids) and end - start < MOST_TOKENS:
            continue
        result.append(Piece(offset + start, offset + end, Shown.text, text[len(known) :]))
        if result[-1].text.strip():
            before = start
        start = end
    return result
