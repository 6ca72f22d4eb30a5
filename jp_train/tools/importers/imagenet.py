"""A folder of class folders -> generation: the class name is the caption, the source's `class_prompt` shapes it in
training."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jp_train.errors import ConfigError, DataError
from jp_train.tools.importers.entries import CHUNK_ENTRIES, Chunk, Entry, Listing, Reader
from jp_train.tools.importers.sources import label_of
from jp_train.types import Kind

MAPPING = "LOC_synset_mapping.txt"
"""Kaggle's file of class names; looked for in SOURCE and the four folders above it (where Kaggle's archive has it)."""

_SYNSET = re.compile(r"n\d{8}")


@dataclass(frozen=True, kw_only=True)
class ImageNetReader(Reader):
    """`source/CLASS/image`: every file of every class folder is an entry, classes and files in the order of their
    names."""

    format = "imagenet"
    source: Path
    class_names: Path | None = None
    kind: Kind = Kind.GENERATION

    @property
    def images(self) -> Path:  # type: ignore[override]  # read only, as every field of a frozen reader is
        return self.source

    def options(self) -> dict[str, Any]:
        return {}

    def source_keys(self) -> dict[str, str]:
        return {"class_prompt": "first_lemma"}

    def listing(self) -> Listing:
        files, left_out = _class_files(self.source)
        names, remark = self._names(list(files))
        identity = {
            f"class folder {folder}": f"{len(members):,} files, names sha256 {_digest(members)}"
            for folder, members in files.items()
        }
        identity["class names"] = f"{len(names):,} names, sha256 {_digest(sorted(map(str, names.items())))}"

        def chunks() -> Iterator[Chunk]:
            first = 0
            for folder, members in files.items():
                for start in range(0, len(members), CHUNK_ENTRIES):
                    part = members[start : start + CHUNK_ENTRIES]
                    yield Chunk(
                        first=first, count=len(part), payload=(folder, names[folder], part), done=first + len(part)
                    )
                    first += len(part)

        return Listing(
            identity=identity, total=sum(map(len, files.values())), chunks=chunks, remarks=(remark,), left_out=left_out
        )

    def entries(self, chunk: Chunk, *, image_bytes: bool = True) -> Iterator[Entry]:
        folder, name, files = chunk.payload
        for place, file in enumerate(files):
            path = f"{folder}/{file}"
            yield Entry(
                number=chunk.first + place,
                name=path,
                note={"caption": name, "source_id": path},
                images=(path,),
                slug=f"{folder}-{file.rpartition('.')[0] or file}",
            )

    def _names(self, classes: list[str]) -> tuple[dict[str, str], str]:
        """The name of each class folder, and their origin in words. Raises ConfigError for a class without a name."""
        above = [self.source.absolute(), *self.source.absolute().parents[:4]]
        path = self.class_names or next((folder / MAPPING for folder in above if (folder / MAPPING).is_file()), None)
        if path is None:
            if any(_SYNSET.fullmatch(folder) for folder in classes):
                raise ConfigError(
                    f"the class folders of {self.source} are WordNet numbers ({classes[0]}), which are no prompts: "
                    "give --class-names "
                    f"{MAPPING} (lines 'n01440764 tench, Tinca tinca'), or put that file beside the folders"
                )
            return {
                folder: folder.replace("_", " ") for folder in classes
            }, "class names: the folder names, with spaces for _"
        names = read_class_names(path)
        missing = [folder for folder in classes if folder not in names]
        if missing:
            raise ConfigError(
                f"{path} names no class for {len(missing)} of the {len(classes)} folders of {self.source}: "
                f"{', '.join(missing[:5])}; add them, "
                "or import a folder without them"
            )
        return {folder: names[folder] for folder in classes}, f"class names: {path}"


def read_class_names(path: Path) -> dict[str, str]:
    """Folder -> class name, from lines of `FOLDER NAME` (space or tab), or JSON: `{"FOLDER": "NAME"}`, or torchvision's
    `{"0": ["FOLDER", "NAME"]}`.

    Raises:
        ConfigError: for a file that is none of these.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix != ".json":
            pairs = [line.split(None, 1) for line in text.splitlines() if line.strip()]
        else:
            value = json.loads(text)
            pairs = (
                list(value.items()) if all(isinstance(name, str) for name in value.values()) else list(value.values())
            )
        names = {
            folder: name.strip().replace("_", " ") if path.suffix == ".json" else name.strip() for folder, name in pairs
        }
    except OSError as error:
        raise ConfigError(f"--class-names {path}: {error}") from None
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"--class-names {path}: {error}; expected lines 'FOLDER NAME', or a .json of {{'FOLDER': "
            f"'NAME'}} or {{'0': ['FOLDER', 'NAME']}}"
        ) from None
    if len(names) != len(pairs):
        raise ConfigError(
            f"--class-names {path} has {len(pairs)} lines for {len(names)} classes: a class is named twice"
        )
    return names


def _class_files(source: Path) -> tuple[dict[str, list[str]], dict[str, int]]:
    """The files of every class folder, and how many files lie beside the class folders, by their endings."""
    try:
        entries = [(entry.name, entry.is_dir()) for entry in os.scandir(source)]
        folders = sorted(name for name, is_folder in entries if is_folder)
        files = {folder: sorted(os.listdir(source / folder)) for folder in folders}
    except OSError as error:
        raise (ConfigError if isinstance(error, (FileNotFoundError, NotADirectoryError)) else DataError)(
            f"SOURCE {source}: {error}; expected a folder with one folder a class"
        ) from error
    if not any(files.values()):
        raise ConfigError(f"SOURCE {source} has no class folder with files in it; expected {source}/CLASS/image.jpg")
    return files, dict(Counter(label_of(name) for name, is_folder in entries if not is_folder))


def _digest(names: list[str]) -> str:
    return hashlib.sha256("\0".join(names).encode("utf-8", "surrogateescape")).hexdigest()
