"""What `make showcase` downloads, and how it is read: emoji in three drawing styles (npm) and WordNet (Debian).

Everything lands in one cache folder, a subfolder a package, which appears only when it is complete; nothing is
downloaded twice.
Names inside an archive never become paths: a member is kept only if its whole name has the one form expected of it,
under a name made of that form's hexadecimal digits; an archive with a member that points outside is refused as a whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from PIL import Image

from jp_train.errors import DataError, LaunchError

STYLES = ("google", "twitter", "fluent")
NPM_PACKAGES = {
    "google": "emoji-datasource-google@16.0.0",
    "twitter": "emoji-datasource-twitter@16.0.0",
    "fluent": "@lobehub/fluent-emoji-3d@1.1.0",
}
LICENSES = {
    "google": "emoji-datasource-google 16.0.0: names MIT, art Apache-2.0 (Noto Emoji)",
    "twitter": "emoji-datasource-twitter 16.0.0: art CC-BY-4.0 (Twemoji)",
    "fluent": "@lobehub/fluent-emoji-3d 1.1.0: MIT (Microsoft Fluent Emoji)",
}
_CODE = r"(?P<code>[0-9a-f]{2,6}(?:-fe0f)?)"
_IMAGES = {
    "google": re.compile(rf"package/img/google/64/{_CODE}\.png"),
    "twitter": re.compile(rf"package/img/twitter/64/{_CODE}\.png"),
    "fluent": re.compile(rf"package/assets/{_CODE}\.webp"),
}
"""Members kept of each package: emoji of one code point (no flags, no skin tones, no families)."""
_TABLE = "package/emoji.json"
WORDNET_PACKAGE = "wordnet-base"
WORDNET_FILES = ("data.noun", "data.verb", "data.adj", "data.adv", "index.noun")
MAX_MEMBER_BYTES = 32 << 20
"""A larger member cannot be one of ours."""
INSTALL = {
    "npm": "apt-get install npm, or https://nodejs.org",
    "apt-get": "the showcase takes WordNet from the Debian archive and needs a Debian or Ubuntu system",
    "dpkg-deb": "apt-get install dpkg",
}
KINDS = ("Smileys & Emotion", "Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects")
MAX_NAME_WORDS = 3
_NAME = re.compile(r"[a-z]+(?:[ -][a-z]+)*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Emoji:
    """One name with its drawings."""

    name: str
    kind: str
    """Category in lower case, as "food and drink"."""
    gloss: str
    """WordNet's definition of the name, or empty."""
    images: dict[str, Path]
    """Style to file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Synset:
    """One meaning in WordNet."""

    key: str
    """Part of speech and offset, as "n02084071"."""
    words: tuple[str, ...]
    gloss: str
    """Definition and example sentences."""

    @property
    def definition(self) -> str:
        return self.gloss.split('; "')[0].strip().rstrip(";")


def download(cache: Path) -> None:
    """Bring what is missing into `cache`.

    Raises:
        LaunchError: if npm, apt-get or dpkg-deb is needed and missing, or fails.
        DataError: if an archive holds members that point outside, or lacks what it should hold.
    """
    emoji = [style for style in STYLES if not (cache / f"emoji-{style}").is_dir()]
    wordnet = not (cache / "wordnet").is_dir()
    _check_tools((["npm"] if emoji else []) + (["apt-get", "dpkg-deb"] if wordnet else []))
    for style in emoji:
        with _appearing(cache / f"emoji-{style}") as folder, _scratch(cache / f".{style}.download") as scratch:
            _run(["npm", "pack", "--silent", "--ignore-scripts", NPM_PACKAGES[style]], scratch)
            unpack_emoji(_only(scratch, "*.tgz"), style, folder)
    if wordnet:
        with _appearing(cache / "wordnet") as folder, _scratch(cache / ".wordnet.download") as scratch:
            _run(
                ["apt-get", "download", "-q", WORDNET_PACKAGE],
                scratch,
                hint="(`apt-get update` brings the package lists)",
            )
            unpack_wordnet(_only(scratch, "*.deb"), folder)


def unpack_emoji(tarball: Path, style: str, folder: Path) -> int:
    """Keep `emoji.json` (google's) and the drawings of one code point under `folder`; returns the number of
    drawings. Raises DataError."""
    drawings = 0
    try:
        with tarfile.open(tarball, "r|gz") as archive:
            for member, stream in _members(archive, tarball):
                match = _IMAGES[style].fullmatch(member.name)
                if match:
                    (folder / f"{match['code']}{PurePosixPath(member.name).suffix}").write_bytes(stream().read())
                    drawings += 1
                elif style == "google" and member.name == _TABLE:
                    (folder / "emoji.json").write_bytes(stream().read())
    except tarfile.TarError as error:
        raise DataError(f"{tarball} is no readable archive: {error}") from error
    if not drawings or (style == "google" and not (folder / "emoji.json").is_file()):
        raise DataError(f"{tarball} holds no {style} emoji where {NPM_PACKAGES[style]} has them")
    return drawings


def unpack_wordnet(package: Path, folder: Path) -> None:
    """Keep WordNet's data files under `folder`; the package is never unpacked onto the disk. Raises
    DataError, LaunchError."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                for member, stream in _members(archive, package):
                    if (
                        name := PurePosixPath(member.name).name
                    ) in WORDNET_FILES and member.name == f"./usr/share/wordnet/{name}":
                        (folder / name).write_bytes(stream().read())
            process.stdout.read()
        except tarfile.TarError as error:
            raise DataError(f"{package} is no readable archive: {error}") from error
    if process.returncode:
        raise LaunchError(f"dpkg-deb could not read {package} (status {process.returncode})")
    missing = [name for name in WORDNET_FILES if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{package} lacks {', '.join(missing)} under usr/share/wordnet")


def _members(archive: tarfile.TarFile, source: Path) -> Iterator[tuple[tarfile.TarInfo, Callable[[], IO[bytes]]]]:
    """Plain files of the archive with a function that opens each; a name that leaves the archive's own tree raises
    DataError."""
    for member in archive:
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts or "\\" in member.name:
            raise DataError(f"{source} is refused: its member {member.name!r} points outside the archive")
        if member.isfile() and member.size <= MAX_MEMBER_BYTES:

            def stream(member: tarfile.TarInfo = member) -> IO[bytes]:
                file = archive.extractfile(member)
                assert file is not None  # a plain file
                return file

            yield member, stream


def _check_tools(tools: list[str]) -> None:
    for tool in tools:
        if shutil.which(tool) is None:
            raise LaunchError(
                f"make showcase downloads with {tool}, which is not on PATH: install it ({INSTALL[tool]})"
            )


def _run(command: list[str], folder: Path, hint: str = "") -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        output = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise LaunchError(f"`{' '.join(command)}` ended with status {done.returncode} {hint}\n{output}")


def _only(folder: Path, pattern: str) -> Path:
    matches = sorted(folder.glob(pattern))
    if len(matches) != 1:
        raise LaunchError(f"expected one {pattern} in {folder}, found {len(matches)}")
    return matches[0]


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """An empty folder that is gone afterwards."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """Work in a scratch folder that takes the name `folder` at the end, if nothing failed."""
    with _scratch(folder.with_name(f".{folder.name}.partial")) as partial:
        yield partial
        os.rename(partial, folder)


def read_wordnet(cache: Path) -> list[Synset]:
    """Every synset of the data files, nouns first. Raises DataError for a file that is not WordNet's."""
    synsets = []
    for name in WORDNET_FILES[:4]:
        file = cache / "wordnet" / name
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("  "):  # the licence
                continue
            head, _, gloss = line.partition(" | ")
            fields = head.split(" ")
            try:
                words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            except (IndexError, ValueError) as error:
                raise DataError(f"{file}: not a line of WordNet: {line[:80]!r}") from error
            words = [re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in words]
            synsets.append(Synset(key=f"{fields[2]}{fields[0]}", words=tuple(words), gloss=gloss.strip()))
    return synsets


def first_senses(cache: Path, synsets: list[Synset]) -> dict[str, Synset]:
    """Noun, with spaces, to its commonest meaning (WordNet's index lists senses by frequency)."""
    by_key = {synset.key: synset for synset in synsets}
    senses = {}
    for line in (cache / "wordnet" / "index.noun").read_text(encoding="utf-8", errors="replace").splitlines():
        fields = line.split()
        if not line.startswith("  ") and len(fields) > 6 and (synset := by_key.get(f"n{fields[-int(fields[2])]}")):
            senses[fields[0].replace("_", " ")] = synset
    return senses


def read_emoji(cache: Path, senses: dict[str, Synset]) -> list[Emoji]:
    """Emoji that have one code point, a plain name of at most three words, a kind of `KINDS` and a drawing in every
    style, by name."""
    table = json.loads((cache / "emoji-google" / "emoji.json").read_text())
    emoji_by_name: dict[str, Emoji] = {}
    for entry in table:
        name, kind = entry["name"].lower(), entry["category"]
        if (
            kind not in KINDS
            or not _NAME.fullmatch(name)
            or len(name.split()) > MAX_NAME_WORDS
            or name.startswith("clock face")
        ):
            continue
        code = entry["unified"].lower()
        images = {style: image for style in STYLES if (image := _image_file(cache / f"emoji-{style}", code))}
        if len(images) == len(STYLES):
            animal = name.removesuffix(" face") if kind == "Animals & Nature" else name
            sense = senses.get(name) or senses.get(animal)
            emoji_by_name[name] = Emoji(
                name=name, kind=kind.lower().replace("&", "and"), gloss=sense.definition if sense else "", images=images
            )
    if not emoji_by_name:
        raise DataError(f"{cache} holds no emoji that all of {', '.join(STYLES)} draw")
    return [emoji_by_name[name] for name in sorted(emoji_by_name)]


def _image_file(folder: Path, code: str) -> Path | None:
    if not re.fullmatch(_CODE, code):
        return None
    names = [
        f"{c}.{extension}" for c in (code, code.removesuffix("-fe0f"), f"{code}-fe0f") for extension in ("png", "webp")
    ]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def open_drawing(file: Path, side: int) -> Image.Image:
    """The drawing on white, RGB, `side` x `side`. Raises DataError."""
    try:
        drawing = Image.open(file).convert("RGBA").resize((side, side), Image.Resampling.LANCZOS)
    except OSError as error:
        raise DataError(f"{file} is no image: {error}") from error
    paper = Image.new("RGB", drawing.size, (255, 255, 255))
    paper.paste(drawing, mask=drawing.getchannel("A"))
    return paper
