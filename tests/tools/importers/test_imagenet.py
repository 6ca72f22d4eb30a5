"""Folders of class folders become generation samples whose caption is the name of the class."""

from __future__ import annotations

import pytest

from jp_train.errors import ConfigError
from jp_train.tools.importers.imagenet import ImageNetReader
from tests.tools.importers.import_layouts import dump, imagenet, notes_in, run, samples_in


def test_imagenet_takes_kaggles_names_a_file_or_the_folders(tmp_path):
    run(imagenet(tmp_path), tmp_path / "a")
    assert [note["caption"] for note in notes_in(tmp_path / "a")] == [
        f"name {n}, other name" for n in range(3) for _ in range(3)
    ]
    assert samples_in(tmp_path / "a")[4][0] == "000000004-n00000001-n00000001_4"
    assert notes_in(tmp_path / "a")[4]["source_id"] == "n00000001/n00000001_4.JPEG"
    torchvision = dump(tmp_path / "index.json", {str(n): [f"n0000000{n}", f"great_shark_{n}"] for n in range(3)})
    run(ImageNetReader(source=tmp_path / "train", class_names=torchvision), tmp_path / "b")
    assert {note["caption"] for note in notes_in(tmp_path / "b")} == {f"great shark {n}" for n in range(3)}
    (tmp_path / "LOC_synset_mapping.txt").unlink()
    with pytest.raises(ConfigError, match=r"WordNet numbers \(n00000000\).*--class-names"):
        run(ImageNetReader(source=tmp_path / "train"), tmp_path / "c")
    for number in range(3):
        (tmp_path / "train" / f"n0000000{number}").rename(tmp_path / "train" / f"red_fox_{number}")
    run(ImageNetReader(source=tmp_path / "train"), tmp_path / "c")
    assert {note["caption"] for note in notes_in(tmp_path / "c")} == {f"red fox {n}" for n in range(3)}
    with pytest.raises(ConfigError, match="names no class for 3 of the 3 folders.*red_fox_0"):
        run(ImageNetReader(source=tmp_path / "train", class_names=torchvision), tmp_path / "d")


def test_files_beside_the_class_folders_are_counted_by_their_endings(tmp_path):
    reader = imagenet(tmp_path)
    for name in ("a.jpg", "b.JPG", "README", ".DS_Store"):
        (tmp_path / "train" / name).write_bytes(b"")
    assert reader.listing().left_out == {"*.jpg": 2, "without ending": 1, "housekeeping": 1}
