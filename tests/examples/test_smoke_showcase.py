"""The showcase's downloads, shards and judgement, without a network: small archives made here, a few lines of
WordNet typed in."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.showcase import sources as showcase_sources
from examples.showcase.judgement import GROUPS, NearestDrawing, contact_sheet, read_groups
from examples.showcase.run import ShowcaseOptions, main
from examples.showcase.shards import (
    ShowcaseCounts,
    build_showcase_shards,
    detail,
    link_pretraining_sources,
    read_split,
    with_article,
)
from examples.showcase.sources import STYLES, download, first_senses, read_emoji, read_wordnet, unpack_emoji
from examples.smoke.reading import image_of, note_of, read_source, texts_of
from examples.smoke.run import ROOT, STAGES, stage_overrides
from examples.smoke.shards import GENERATION_SOURCES, UNDERSTANDING_SOURCES
from jp_train.config import load_config
from jp_train.errors import ConfigError, DataError, LaunchError

NAMES = (
    "anchor",
    "beetle",
    "cow face",
    "drum",
    "eagle",
    "fish",
    "grinning face",
    "hammer",
    "ice",
    "jar",
    "kite",
    "lemon",
)
COUNTS = ShowcaseCounts(
    names=8, held_out_names=3, held_out_drawings=4, documents=50, conversations=50, held_out_texts=2
)
DATA_NOUN = """  1 This software and database is being provided to you
02190166 05 n 01 beetle 0 001 @ 02159955 n 0000 | insect having biting mouthparts and front wings \
modified to form horny covers
03481172 06 n 02 hammer 0 mallet 0 001 @ 03489162 n 0000 | a hand tool with a heavy rigid head; \
"he drove it in with a hammer"
01887787 05 n 02 cow 0 moo-cow 0 001 @ 02403454 n 0000 | female of domestic cattle: "`moo-cow' is a child's term"
10091651 18 n 01 cow 1 001 @ 09821831 n 0000 | a large unpleasant woman
02512053 05 n 01 fish 0 001 @ 01471682 n 0000 | any of various mostly cold-blooded aquatic vertebrates
07749582 13 n 01 lemon 0 001 @ 07747055 n 0000 | yellow oval fruit with juicy acidic flesh
"""
INDEX_NOUN = """  1 This software and database is being provided to you
beetle n 1 1 @ 1 0 02190166
cow n 2 1 @ 2 1 01887787 10091651
hammer n 1 1 @ 1 1 03481172
"""


def png(number: int, style: str) -> bytes:
    colour = (17 * number % 256, 90 * STYLES.index(style), 255 - 20 * number, 255)
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    image.paste(colour, (8 + number, 8, 56, 56 - number))
    buffer = io.BytesIO()
    image.save(
        buffer, format="PNG" if style != "fluent" else "WEBP", **({"lossless": True} if style == "fluent" else {})
    )
    return buffer.getvalue()


def tarball(path: Path, members: dict[str, bytes], links: dict[str, str] | None = None) -> Path:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
    path.write_bytes(gzip.compress(buffer.getvalue()))
    return path


def table() -> list[dict]:
    entries = [
        {
            "name": name.upper(),
            "category": ("Animals & Nature", "Objects")[number % 2],
            "unified": f"1F4{number:02X}" + "-FE0F" * (number == 3),
        }
        for number, name in enumerate(NAMES)
    ]
    return [*entries, {"name": "Norway Flag", "category": "Flags", "unified": "1F1F3-1F1F4"}]


def package(path: Path, style: str) -> Path:
    folder, extension = ("package/assets", "webp") if style == "fluent" else (f"package/img/{style}/64", "png")
    members = {f"{folder}/1f4{number:02x}.{extension}": png(number, style) for number in range(len(NAMES))}
    members |= {f"{folder}/1f1f3-1f1f4.{extension}": b"a flag", "package/package.json": b"{}"}
    return tarball(path, members | ({"package/emoji.json": json.dumps(table()).encode()} if style == "google" else {}))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cache")
    for style in STYLES:
        (root / f"emoji-{style}").mkdir()
        assert unpack_emoji(package(root / f"{style}.tgz", style), style, root / f"emoji-{style}") == len(NAMES)
    (root / "wordnet").mkdir()
    for name in showcase_sources.WORDNET_FILES:
        (root / "wordnet" / name).write_text({"data.noun": DATA_NOUN, "index.noun": INDEX_NOUN}.get(name, ""))
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    return build_showcase_shards(tmp_path_factory.mktemp("data"), cache, 1, COUNTS).root


def test_emoji_are_joined_with_the_commonest_meaning_of_their_name(cache: Path) -> None:
    synsets = read_wordnet(cache)
    emoji = {item.name: item for item in read_emoji(cache, first_senses(cache, synsets))}
    assert sorted(emoji) == sorted(NAMES)  # the flag has two code points
    assert emoji["hammer"].gloss == "a hand tool with a heavy rigid head"
    # not the woman; an animal's "face" is dropped
    assert emoji["cow face"].gloss.startswith("female of domestic cattle")
    assert emoji["anchor"].gloss == ""
    assert emoji["cow face"].kind == "animals and nature"
    assert synsets[1].words == ("hammer", "mallet")
    assert detail(emoji["anchor"], "google") == "an anchor, drawn in the google style"
    assert detail(emoji["hammer"], "google").endswith("style: a hand tool with a heavy rigid head")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("eagle", "an eagle"),
        ("grinning face", "a grinning face"),
        ("unicorn face", "a unicorn face"),
        ("grapes", "grapes"),
        ("bus", "a bus"),
    ],
)
def test_names_take_their_article(name: str, text: str) -> None:
    assert with_article(name) == text


@pytest.mark.parametrize(
    "name",
    ["../../evil.png", "/tmp/evil.png", "package/img/google/64/../../../../../evil.png", "package\\..\\evil.png"],
)
def test_an_archive_with_a_member_that_points_outside_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "a" / "b" / "out"
    folder.mkdir(parents=True)
    good = {"package/img/google/64/1f400.png": png(0, "google")}
    with pytest.raises(DataError, match="points outside"):
        unpack_emoji(tarball(tmp_path / "bad.tgz", {name: b"evil"} | good), "google", folder)
    assert not [path for path in tmp_path.rglob("*evil*")]


def test_links_are_never_kept_and_an_archive_without_emoji_says_so(tmp_path: Path) -> None:
    link = {"package/img/twitter/64/1f400.png": "/etc/passwd"}
    with pytest.raises(DataError, match="no twitter emoji"):
        unpack_emoji(tarball(tmp_path / "links.tgz", {"package/package.json": b"{}"}, link), "twitter", tmp_path)
    assert not list(tmp_path.glob("*.png"))


def test_a_file_that_is_no_archive_is_an_error_of_the_data(tmp_path: Path) -> None:
    (tmp_path / "x.tgz").write_bytes(b"<html>captive portal</html>")
    with pytest.raises(DataError, match="no readable archive"):
        unpack_emoji(tmp_path / "x.tgz", "google", tmp_path)
    whole = package(tmp_path / "y.tgz", "google").read_bytes()
    (tmp_path / "y.tgz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="no readable archive"):
        unpack_emoji(tmp_path / "y.tgz", "google", tmp_path)


@pytest.mark.parametrize(("tool", "present"), [("npm", ()), ("apt-get", STYLES), ("dpkg-deb", STYLES)])
def test_a_missing_tool_is_named_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool, present
) -> None:
    for style in present:
        (tmp_path / f"emoji-{style}").mkdir()
    monkeypatch.setattr(showcase_sources.shutil, "which", lambda name: None if name == tool else f"/usr/bin/{name}")
    monkeypatch.setattr(showcase_sources.subprocess, "run", lambda *_, **__: pytest.fail("nothing may run"))
    with pytest.raises(LaunchError, match=f"{tool}, which is not on PATH: install it"):
        download(tmp_path)


def test_the_command_says_what_is_missing_and_ends_with_its_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(showcase_sources.shutil, "which", lambda name: None)
    assert (
        main(["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--only-data"])
        == LaunchError.exit_code
    )
    assert "apt-get install npm" in capsys.readouterr().err


def test_downloads_appear_when_complete_and_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wordnet").mkdir()
    styles = []

    def npm_pack(command: list[str], folder: Path, hint: str = "") -> None:
        style = next(style for style, spec in showcase_sources.NPM_PACKAGES.items() if spec == command[-1])
        styles.append(style)
        package(folder / "pack.tgz", style)
        if styles == ["google", "twitter"]:
            raise LaunchError("the network is gone")

    monkeypatch.setattr(showcase_sources.shutil, "which", lambda name: name)
    monkeypatch.setattr(showcase_sources, "_run", npm_pack)
    with pytest.raises(LaunchError, match="network"):
        download(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["emoji-google", "wordnet"]
    download(tmp_path)
    download(tmp_path)
    assert styles == ["google", "twitter", "twitter", "fluent"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "emoji-fluent",
        "emoji-google",
        "emoji-twitter",
        "wordnet",
    ]


def test_held_out_names_and_drawings_never_occur_in_training(data: Path, cache: Path) -> None:
    split, _ = read_split(cache, 1, COUNTS)
    held_out = {item.name for item, _ in split.names}
    kept_back = {(item.name, style) for item, style in split.drawings}
    assert len(held_out) == 3 and len(kept_back) == 4
    trained = set()
    for folder in sorted(data.iterdir()):
        if not folder.name.startswith("emoji-") or folder.name.endswith("-val"):
            continue
        for sample in read_source(folder):
            note = note_of(sample)
            trained.add((note["name"], note["style"]))
            text = " ".join(texts_of(sample)).split(" style: ")[0]  # without the gloss
            assert not [name for name in held_out if f" {name} " in f" {text.replace(',', ' ')} "]
    assert len(trained) == 8 * 3 - 4
    assert not trained & kept_back
    assert not {name for name, _ in trained} & held_out
    assert {name for name, _ in kept_back} <= {name for name, _ in trained}
    seen = {note_of(sample)["name"] for style in STYLES for sample in read_source(data / f"emoji-{style}-gen-val")}
    assert seen == held_out
    texts, unseen = ({texts_of(sample)[0] for sample in read_source(data / name)} for name in ("text", "text-val"))
    assert texts and unseen and not texts & unseen


def test_equal_seed_and_downloads_give_equal_bytes_and_another_seed_another_split(
    data: Path, cache: Path, tmp_path: Path
) -> None:
    def digests(root: Path) -> dict[str, str]:
        return {
            str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(root.rglob("*.tar"))
        }

    assert digests(build_showcase_shards(tmp_path / "again", cache, 1, COUNTS).root) == digests(data)
    assert read_split(cache, 2, COUNTS)[0].names != read_split(cache, 1, COUNTS)[0].names


def test_too_few_emoji_are_refused(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="330 names were asked for, but there are 12"):
        build_showcase_shards(tmp_path, cache, 0)


def test_pretraining_reads_every_trained_drawing_under_its_names(data: Path, tmp_path: Path) -> None:
    folder = link_pretraining_sources(data, tmp_path / "parts")
    for names, kind in ((GENERATION_SOURCES, "gen"), (UNDERSTANDING_SOURCES, "und")):
        linked = sum(
            1 for name in names for sample in read_source(folder / name) if image_of(sample, 8).shape == (8, 8, 3)
        )
        assert linked == sum(1 for style in STYLES for _ in read_source(data / f"emoji-{style}-{kind}"))
    assert list(read_source(folder / "text"))


def test_the_judge_finds_true_drawings_and_its_chance_is_1_in_as_many(data: Path, tmp_path: Path) -> None:
    groups = read_groups(data, 32)
    assert [len(groups[name]) for name in GROUPS] == [20, 4, 9]
    nearest = NearestDrawing(groups)
    for group in groups.values():
        noisy = np.clip(
            group.images.astype(int) + np.random.default_rng(0).integers(-9, 10, group.images.shape), 0, 255
        ).astype(np.uint8)
        assert nearest.names_of(noisy, group.styles) == group.names
        assert nearest.chance(group.styles) == pytest.approx(1 / 11)
    assert Image.open(contact_sheet(data, tmp_path / "sheet.png")).width > 500


@pytest.mark.parametrize("stage", STAGES)
def test_the_stages_are_configured_on_what_the_showcase_writes(data: Path, tmp_path: Path, stage: int) -> None:
    options = ShowcaseOptions(out=tmp_path)
    config = load_config(ROOT / "examples" / "showcase" / f"stage{stage}.yaml", stage_overrides(options, stage))
    assert config.model.init_from == str(tmp_path / ("init" if stage == 1 else f"stage{stage - 1}"))
    written = {folder.name for folder in data.iterdir()}
    named = {**config.data.sources, **config.validation.sources}
    assert {source.shards for source in named.values()} <= written
    assert all(name.endswith("-val") for name in config.validation.sources)
    assert not [name for name in config.data.sources if name.endswith("-val")]
    if stage == 2:
        assert config.stage.early_stop.at_step < config.stage.training_steps
    assert options.sizes.vq.steps > options.sizes.vq.continuous_steps
