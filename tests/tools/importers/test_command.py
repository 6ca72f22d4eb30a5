"""`jp-train data import` as it is typed: every format, --json alone on stdout, exit status, help."""

from __future__ import annotations

import json

import pytest

from jp_train.cli.main import main
from tests.data.data_samples import text_samples, write_shard
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


@pytest.mark.parametrize("name", ["", "imagenet", "coco", "conversations", "pairs", "text", "parquet", "webdataset"])
def test_help_says_what_goes_in_and_what_comes_out(name, capsys):
    with pytest.raises(SystemExit) as caught:
        typed(*([name] if name else []), "--help", capsys=capsys)
    out = capsys.readouterr().out
    assert caught.value.code == 0
    assert ("SOURCE" in out and "OUT" in out) if name else out.count("jp-train data import ") >= 8
