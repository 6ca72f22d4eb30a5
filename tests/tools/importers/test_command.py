"""`jp-train data import` as it is typed: every format, --json alone on stdout, exit status, help."""

from __future__ import annotations

import json
import re

import pytest

from jp_train.cli.main import main
from jp_train.data.stores import StoreRanges
from tests.data.data_samples import text_samples, write_shard
from tests.data.store_server import BUCKET
from tests.tools.importers.import_layouts import (
    coco,
    conversations,
    imagenet,
    pairs_csv,
    pairs_jsonl,
    parquet,
    samples_in,
    text_jsonl,
)


def typed(*words, capsys) -> tuple[int, str, str]:
    status = main(["data", "import", *map(str, words)])
    out, err = capsys.readouterr()
    return status, out, err


CASES = {
    "imagenet": (imagenet, []),
    "coco": (coco, ["--kind", "understanding", "--per", "image"]),
    "conversations": (conversations, []),
    "pairs csv": (pairs_csv, ["--kind", "understanding", "--question-column", "ask"]),
    "pairs jsonl": (pairs_jsonl, ["--kind", "generation", "--decode"]),
    "text": (text_jsonl, []),
    "parquet": (parquet, ["--kind", "generation", "--image-column", "image"]),
}


@pytest.mark.parametrize("case", CASES)
def test_every_format_imports_from_the_command_line(case, tmp_path, capsys):
    make, options = CASES[case]
    reader = make(tmp_path / "in")
    if case in ("coco", "conversations", "pairs jsonl"):
        options = [*options, "--images", reader.images]
    words = [case.split()[0], reader.source, tmp_path / "out", *options, "--shard-samples", "4", "--processes", "1"]
    status, out, err = typed(*words, "--dry-run", "--json", capsys=capsys)
    assert status == 0 and json.loads(out)["dry_run"] is True and not (tmp_path / "out").exists()
    status, out, err = typed(*words, "--json", capsys=capsys)
    summary = json.loads(out)
    assert status == 0 and summary["samples"] == len(samples_in(tmp_path / "out")) == 9
    assert summary["entries"] == 9 + sum(summary["skipped"].values())
    status, out, err = typed(*words, capsys=capsys)
    assert status == 0 and summary["recipe"] in out and "complete already" in err


def test_a_webdataset_is_imported_from_the_command_line(tmp_path, capsys):
    path = write_shard(tmp_path / "a.tar", text_samples(4))
    status, out, _ = typed("webdataset", path, tmp_path / "out", "--kind", "text", "--json", capsys=capsys)
    assert status == 0 and json.loads(out)["samples"] == 4
    status, _, err = typed("webdataset", f"pipe:cat {path}", tmp_path / "p", "--kind", "text", capsys=capsys)
    assert status == 2 and "--allow-pipe" in err
    assert (
        typed("webdataset", f"pipe:cat {path}", tmp_path / "p", "--kind", "text", "--allow-pipe", capsys=capsys)[0] == 0
    )


def test_wrong_options_are_2_and_bad_data_is_3(tmp_path, capsys):
    reader = pairs_csv(tmp_path / "in")
    words = ["pairs", reader.source, tmp_path / "out", "--kind", "generation"]
    sizes = [["--shard-size", size] for size in ("0", "nan", "inf")]
    for extra in (["--shard-samples", "0"], *sizes, ["--processes", "0"], ["--images", tmp_path / "none"]):
        for more in ([], ["--dry-run"]):
            status, out, err = typed(*words, *extra, *more, capsys=capsys)
            assert status == 2 and not out and "ConfigError" in err
    status, out, err = typed(
        "webdataset", tmp_path, tmp_path / "out", "--kind", "text", "--processes", "0", capsys=capsys
    )
    assert status == 2 and not out and "--processes" in err
    (tmp_path / "in" / "empty.csv").write_text("image,caption\n")
    status, out, err = typed(
        "pairs", tmp_path / "in" / "empty.csv", tmp_path / "out", "--kind", "generation", capsys=capsys
    )
    assert status == 3 and not out and "no entry of" in err
    with pytest.raises(SystemExit) as caught:
        typed("pairs", reader.source, tmp_path / "out", "--kind", "text", capsys=capsys)
    assert caught.value.code == 2


@pytest.mark.parametrize("processes", ["1", "2"])
def test_the_last_progress_line_counts_the_shard_that_is_written_last(tmp_path, capsys, processes):
    for maker, extra, shards in ((text_jsonl, [], 3), (conversations, ["--text-out", tmp_path / "t"], 4)):
        reader = maker(tmp_path / maker.__name__)
        if maker is conversations:
            extra = [*extra, "--images", reader.images]
        words = [maker.__name__.split("_")[0], reader.source, tmp_path / f"out-{maker.__name__}", *extra]
        status, _, err = typed(*words, "--shard-samples", "4", "--processes", processes, capsys=capsys)
        assert status == 0 and re.search(rf"0 skipped, {shards} shards, 100%", err.splitlines()[-1])
        assert len(list(tmp_path.glob(f"out-{maker.__name__}/*.tar")) + list(tmp_path.glob("t/*.tar"))) == shards


@pytest.mark.parametrize("missing", [0, 1, 30])
def test_an_import_that_skips_more_than_training_lets_pass_says_so_in_its_last_line(tmp_path, capsys, missing):
    reader = pairs_jsonl(tmp_path / "in", 60)
    for path in sorted(reader.images.iterdir())[:missing]:
        path.unlink()
    words = ["pairs", reader.source, tmp_path / "out", "--images", reader.images, "--kind", "generation"]
    status, out, err = typed(*words, capsys=capsys)
    assert status == 0 and ("WARNING" in out) == (missing == 30) and "WARNING" not in err
    status, out, err = typed(*words, "--json", capsys=capsys)
    warning = json.loads(out)["warning"]
    assert status == 0 and (warning in err.splitlines()) == (missing == 30) == bool(warning)
    if missing == 30:
        assert warning.startswith(
            "WARNING: 30 of 60 entries (50 %) were skipped, 30 of them for image_missing (no such image in the image "
            "folder), as pairs.jsonl:1: '000.jpg' does not exist in "
        )


def test_tars_of_which_half_the_samples_are_bad_say_what_training_does_with_them(tmp_path, capsys):
    bad = [(f"b{number}", {"txt": b" "}) for number in range(4)]
    path = write_shard(tmp_path / "a.tar", [*text_samples(4), *bad])
    status, out, _ = typed("webdataset", path, tmp_path / "out", "--kind", "text", capsys=capsys)
    last = out.splitlines()[-1]
    assert status == 0 and last.startswith("WARNING: 4 of 8 entries (50 %) were skipped, 4 of them for empty_text")
    assert last.endswith("training refuses a source with a larger share than data.max_bad_share (0.05)")


@pytest.mark.parametrize("name", ["", "imagenet", "coco", "conversations", "pairs", "text", "parquet", "webdataset"])
def test_help_says_what_goes_in_and_what_comes_out(name, capsys):
    with pytest.raises(SystemExit) as caught:
        typed(*([name] if name else []), "--help", capsys=capsys)
    out = capsys.readouterr().out
    assert caught.value.code == 0
    assert ("SOURCE" in out and "OUT" in out) if name else out.count("jp-train data import ") >= 8


def test_a_webdataset_in_a_store_is_validated_where_it_is(tmp_path, capsys, store, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url = f"s3://{BUCKET}/webdataset"
    for number in range(2):
        path = write_shard(tmp_path / f"{number}.tar", text_samples(4))
        StoreRanges().write(path, f"{url}/{number}.tar")
    status, out, _ = typed("webdataset", f"{url}/*.tar", tmp_path / "out", "--kind", "text", "--json", capsys=capsys)
    summary = json.loads(out)
    (source,) = summary["sources"]
    assert status == 0 and summary["samples"] == 8
    assert (source["folder"], source["spec"]) == (url, f"{url}/*.tar") and f'"{url}/*.tar"' in summary["recipe"]
    assert not list((tmp_path / "out").glob("*.tar"))
