"""Of a folder or glob, what is not read is counted by the ending of its name: on the console, and in the manifest."""

from __future__ import annotations

import gzip
import json
from fnmatch import fnmatch

import pytest
import zstandard

from jp_train.cli.main import main
from jp_train.errors import ConfigError, DataError
from jp_train.tools.importers.contents import PLAIN_TEXT
from jp_train.tools.importers.sources import RECORD_FILES, TEXT_FILES, named, other_files, source_files
from tests.tools.importers.import_layouts import image_folder, image_name, notes_in


def line(text: str) -> bytes:
    return json.dumps({"text": text, "image": image_name(0), "caption": text}).encode() + b"\n"


@pytest.fixture
def folder(tmp_path):
    """What a mirror, a Spark job and a clone leave in one folder: five files of records, and much else."""
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for name, text in (("a.jsonl", "a"), ("b.JSONL", "b"), ("part-00001", "c"), ("sub/e.jl", "e")):
        (folder / name).write_bytes(line(text))
    (folder / "d.jsonl.zst").write_bytes(zstandard.compress(line("d")))
    for name in ("x.parquet", "y.PARQUET", "photo.jpg", "data.tar.gz", "LICENSE", "sub/empty", ".part-00001.crc"):
        (folder / name).write_bytes(b"" if name == "sub/empty" else b"Some words.\n")
    (folder / "_SUCCESS").touch()
    (folder / ".git").mkdir()
    (folder / ".git" / "a.jsonl").write_bytes(line("hidden"))
    (tmp_path / "elsewhere").mkdir()
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "gone.jsonl").symlink_to(tmp_path / "nothing")
    return folder


LEFT_OUT = {
    "*.parquet": 2,
    "*.jpg": 1,
    "*.tar.gz": 1,
    "without ending": 2,
    "housekeeping": 3,
    "linked folder(s)": 1,
    "irregular file(s)": 1,
}


def test_a_folder_gives_its_records_and_every_other_file_is_counted(folder, tmp_path, capsys):
    words = ["data", "import", "text", str(folder), str(tmp_path / "out"), "--processes", "1"]
    assert main([*words, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["left_out"] == LEFT_OUT
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert [note["text"] for note in notes_in(tmp_path / "out")] == ["a", "b", "d", "c", "e"]
    text = "left out: 1 *.jpg, 2 *.parquet, 1 *.tar.gz, 1 irregular file(s), 1 linked folder(s), 2 without ending"
    assert f"{text} (and 3 of housekeeping: " in out and text in err
    assert "5 files as JSON lines (by content)" in err
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["left_out"] == LEFT_OUT


def test_images_beside_the_records_that_name_them_are_not_left_out(folder, tmp_path, capsys):
    image_folder(folder, 3)
    words = ["data", "import", "pairs", str(folder), str(tmp_path / "out"), "--kind", "generation", "--processes", "1"]
    assert main([*words, "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["left_out"]) == set(LEFT_OUT) - {"*.jpg"}


def test_captions_beside_images_are_no_records(tmp_path):
    image_folder(tmp_path, 1)
    (tmp_path / "000.txt").write_bytes(line("a caption"))
    (tmp_path / "list.csv").write_text("image,caption\n000.jpg,c\n")
    assert source_files(tmp_path, RECORD_FILES, "records") == ([tmp_path / "list.csv"], {"*.jpg": 1, "*.txt": 1})
    assert source_files(tmp_path, TEXT_FILES, "text")[0] == [tmp_path / "000.txt", tmp_path / "list.csv"]


def test_a_folder_without_anything_to_read_says_what_it_holds_and_how_to_name_it(folder):
    with pytest.raises(
        ConfigError, match=r"holds no poems; left out: 1 \*\.jl, 1 \*\.jpg.*; name other files with a glob"
    ):
        source_files(folder, lambda path: False, "poems")
    (folder.parent / "elsewhere").rmdir()
    with pytest.raises(ConfigError, match="elsewhere does not exist, and no file matches it; expected poems"):
        source_files(folder.parent / "elsewhere", lambda path: True, "poems")


def test_a_glob_takes_what_it_matches_and_counts_folders(folder):
    files, left_out = source_files(folder / "*", RECORD_FILES, "records")
    assert {path.name for path in files} >= {"LICENSE", "x.parquet", "part-00001"} and "_SUCCESS" not in str(files)
    assert left_out == {"folder(s)": 1, "housekeeping": 1, "linked folder(s)": 1, "irregular file(s)": 1}
    files, left_out = source_files(folder / "**" / "*.j*", RECORD_FILES, "records")
    assert [path.name for path in files] == ["a.jsonl", "d.jsonl.zst", "photo.jpg", "e.jl"]
    assert source_files(folder / "LICENSE", RECORD_FILES, "records") == ([folder / "LICENSE"], {})


LEVELS = {
    "one level": (["a.jsonl", "b.jsonl"], "*.jsonl"),
    "two levels": (["x/a.jsonl", "y/b.jsonl"], "*/*.jsonl"),
    "three levels": (["x/y/a.jsonl.gz", "y/z/b.jsonl.gz"], "*/*/*.jsonl.gz"),
    "both": (["a.jsonl", "x/b.jsonl"], "**/*.jsonl"),
    "the most common ending": (["a.csv", "b.jsonl", "c.jsonl"], "*.jsonl"),
    "upper case": (["a.JSONL"], "*.JSONL"),
    "plain and compressed": (["c4.0.json", "c4.1.json.gz"], "*.json*"),
    "endings that share a prefix": (["c4.json", "c4.csv", "c4"], "c4*"),
    "no ending": (["part-00000", "part-00001"], "part-0000*"),
}


@pytest.mark.parametrize("pattern", ["", "**/*"])
@pytest.mark.parametrize("levels", LEVELS)
def test_the_glob_that_is_suggested_takes_the_good_files_at_their_level(tmp_path, levels, pattern):
    names, suggested = LEVELS[levels]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        content = line(name)
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1" + bytes(9))
    text = other_files(tmp_path / pattern, [tmp_path / name for name in names])
    assert text == f"; name the other files with a glob, for example '{tmp_path}/{suggested}'"
    files, _ = source_files(tmp_path / suggested, RECORD_FILES, "records")
    taken = [name for name in names if fnmatch(name, suggested.replace("**/", "*"))]
    assert files == sorted(tmp_path / name for name in taken)


def test_no_glob_is_suggested_where_none_would_do(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_bytes(b"a")
    assert other_files(tmp_path, [tmp_path / "a.txt"]) == "; name the other files with a glob"
    assert other_files(tmp_path / "a.txt", []) == ""


@pytest.mark.parametrize("depth", ["", "sub"])
def test_every_refusal_of_a_mixed_source_names_a_glob_that_works(tmp_path, capsys, depth):
    inside = tmp_path / "in" / depth
    inside.mkdir(parents=True)
    good = f"{tmp_path}/in/{'*/' * bool(depth)}*.jsonl"
    for number in range(2):
        (inside / f"{number}.jsonl").write_bytes(line("a"))
    source = f"{tmp_path}/in/{'*/' * bool(depth)}*"
    for name, content, options in (
        ("p.parquet", b"PAR1" + bytes(9), ["pairs", "--kind", "generation"]),
        ("p.parquet", b"PAR1" + bytes(9), ["text"]),
        ("t.csv", b"text\nb\n", ["text"]),
        ("p.txt", b"plain text", ["text"]),
    ):
        (inside / name).write_bytes(content)
        assert main(["data", "import", options[0], source, str(tmp_path / "out"), *options[1:]]) == 2
        assert f"with a glob, for example '{good}'" in capsys.readouterr().err, name
        (inside / name).unlink()
    assert main(["data", "import", "parquet", f"{tmp_path}/in", str(tmp_path / "out"), "--kind", "text"]) == 2
    assert f"name other files with a glob, for example '{good}'" in capsys.readouterr().err


def test_names_without_an_ending_are_taken_by_their_content_only(folder):
    taken = named(PLAIN_TEXT)
    assert taken(folder / "part-00001") and not taken(folder / "LICENSE") and not taken(folder / "sub" / "empty")


def test_a_folder_below_that_cannot_be_read_stops(folder, monkeypatch):
    def scandir(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", scandir)
    with pytest.raises(DataError, match="cannot read .*in: .*Permission denied"):
        source_files(folder, TEXT_FILES, "text")
