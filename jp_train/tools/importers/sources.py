"""Which files a SOURCE names, and how many it leaves out."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from jp_train.errors import ConfigError, DataError
from jp_train.tools.importers.compression import ENDINGS
from jp_train.tools.importers.contents import PLAIN_TEXT, RECORDS, Contents, Form, contents_of, name_ending
from jp_train.tools.importers.entries import HOUSEKEEPING, left_out_text


def source_files(source: Path, taken: Callable[[Path], bool], what: str) -> tuple[list[Path], dict[str, int]]:
    """The files that SOURCE names, sorted, and how many it leaves out, by the endings of their names: SOURCE itself,
    the matches of a glob, or the files of a folder (recursively) that are `taken`.

    Raises:
        ConfigError: when there is none, or it does not exist; `what` says what was expected.
        DataError: for a folder below SOURCE that cannot be read.
    """
    if source.is_file():
        return [source], {}
    folder = source.is_dir()
    files: list[Path] = []
    others: list[Path] = []
    left_out: Counter[str] = Counter()
    for path in sorted(set(_below(source) if folder else map(Path, glob.iglob(str(source), recursive=True)))):
        label = label_of(path.name)
        if label != HOUSEKEEPING:
            if path.is_dir():
                if not folder and "**" in str(source):
                    continue  # what is below it is matched too
                label = "linked folder(s)" if path.is_symlink() else "folder(s)"
            elif not path.is_file():
                label = "irregular file(s)"
            elif not folder or taken(path):
                files.append(path)
                continue
            else:
                others.append(path)
        left_out[label] += 1
    if files:
        return files, dict(left_out)
    if not folder:
        raise ConfigError(f"SOURCE {source} does not exist, and no file matches it; expected {what}")
    there = f"; {left_out_text(left_out)}{other_files(source, others, 'name other files with a glob')}"
    raise ConfigError(f"folder {source} holds no {what}{there if left_out else ''}")


def named(endings: Collection[str]) -> Callable[[Path], bool]:
    """Whether a file of a folder is taken: those with one of the endings, and of those without any ending
    (`part-00000`) the ones whose content is JSON lines."""

    def taken(path: Path) -> bool:
        ending = name_ending(path.name)
        return ending in endings or (not ending and contents_of(path) == Contents(form=Form.lines))

    return taken


RECORD_FILES, TEXT_FILES = named(RECORDS), named((*RECORDS, *PLAIN_TEXT))
"""What a folder gives to an import of images, and to one of text."""


def other_files(source: Path, wanted: Collection[Path], what: str = "name the other files with a glob") -> str:
    """How to name only the `wanted` files of SOURCE; empty where SOURCE is a file."""
    if source.is_file():
        return ""
    pattern = _glob_of(source, wanted)
    return f"; {what}{pattern and f', for example {pattern!r}'}"


def _glob_of(source: Path, wanted: Collection[Path]) -> str:
    """A glob that matches just the `wanted` files, or just those of them with the most common ending; empty where none
    does."""
    plain = next((number for number, part in enumerate(source.parts) if glob.has_magic(part)), len(source.parts))
    folder = glob.escape(str(source if source.is_dir() else Path(*source.parts[:plain])))
    by_ending: dict[str, list[Path]] = {}
    for path in wanted:
        label = label_of(path.name)
        is_ending = label.startswith("*.") and path.name.lower().endswith(label[1:])
        by_ending.setdefault(f"*{path.name[1 - len(label) :]}" if is_ending else "", []).append(path)
    choices = [(names, files) for names, files in sorted(by_ending.items(), key=lambda each: -len(each[1])) if names]
    if len(choices) != 1:
        kinds = {name_ending(path.name) for path in wanted} - {""}
        shared = [f"*{kind}*" for kind in kinds if len(kinds) == 1]
        prefix = os.path.commonprefix([path.name for path in wanted])  # noqa: RUF071 - of characters
        choices = [(names, list(wanted)) for names in (*shared, f"{prefix}*")] + choices
    for names, files in choices:
        for levels in ("", "*/", "*/*/", "**/"):
            pattern = f"{folder}/{levels}{names}"
            if {path for path in map(Path, glob.iglob(pattern, recursive=True)) if path.is_file()} == set(files):
                return pattern
    return ""


def label_of(name: str) -> str:
    """Under what a file that is left out is counted: `*.tar.gz`, `without ending`, or housekeeping."""
    if name.startswith(".") or name == "_SUCCESS" or name.endswith(".crc"):
        return HOUSEKEEPING
    ending = name_ending(name)
    compressed = next((each for each in ENDINGS if name.lower().endswith(ending + each)), "")
    return f"*{ending}{compressed}" if ending + compressed else "without ending"


def _below(folder: Path) -> Iterator[Path]:
    """Files below a folder, links to folders (which are not followed), and hidden folders (which are not entered)."""

    def unreadable(error: OSError) -> None:
        raise DataError(f"cannot read {error.filename}: {error}") from error

    for where, folders, files in os.walk(folder, onerror=unreadable):
        here = Path(where)
        aside = [name for name in folders if label_of(name) == HOUSEKEEPING or (here / name).is_symlink()]
        folders[:] = [name for name in folders if name not in aside]
        yield from (here / name for name in (*files, *aside))
