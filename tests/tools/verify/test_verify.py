from __future__ import annotations

import io
import json
import multiprocessing
import os
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jp_train.cli.main import main
from jp_train.config.load import save_config
from jp_train.config.schema import BatchUnit, OverLong, RunConfig, SourceConfig, SourceKind, Template, ValidationConfig
from jp_train.data.index import index_sources
from jp_train.data.ledger import Ledger
from jp_train.errors import ConfigError, DataError
from jp_train.tools.verify import verify
from jp_train.tools.verify.faults import REMEDIES
from jp_train.tools.verify.verify import VerifyOptions, verify_command, verify_sources
from tests.data.data_samples import (
    conversation,
    generation_samples,
    json_bytes,
    npy,
    text_samples,
    understanding_samples,
    words,
    write_shard,
)
from tests.data.faulty_shards import object_npy, picture, raw_tar, sound


@pytest.fixture
def sources(cfg, tmp_path):
    """Sets one source of each given kind over the shards KIND*.tar of tmp_path."""

    def make(*kinds: str) -> RunConfig:
        cfg.data.root, cfg.run_dir = str(tmp_path), str(tmp_path / "run")
        cfg.data.sources = {kind: SourceConfig(kind=SourceKind(kind), shards=f"{kind}*.tar") for kind in kinds}
        return cfg

    return make


def fault_classes(cfg, tokenizer, **options) -> dict[str | None, str]:
    """{key: class} of the findings."""
    return {fault.key: fault.fault for fault in verify_sources(cfg, tokenizer, VerifyOptions(**options)).findings}


CAPTION = json_bytes({"caption": "a red square"})


def solid() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (300, 300)).save(buffer, format="PNG")
    return buffer.getvalue()


SOLID = solid()
"""A small file of 90,000 pixels."""

PLANTED = {
    "generation": {
        "no_json": ({"png": picture(1)}, "missing_field"),
        "no_picture": ({"json": CAPTION}, "missing_field"),
        "no_caption": ({"png": picture(1), "json": b'{"text": "a"}'}, "missing_field"),
        "two_pictures": ({"png": picture(1), "jpg": picture(1, "JPEG"), "json": CAPTION}, "extra_field"),
        "typed": ({"png": picture(1), "json": b'{"caption": 7}'}, "bad_type"),
        "list": ({"png": picture(1), "json": b"[1]"}, "bad_type"),
        "json": ({"png": picture(1), "json": b'{"caption": '}, "bad_json"),
        "digits": ({"png": picture(1), "json": b'{"caption": ' + b"1" * 5000 + b"}"}, "bad_json"),
        "deep": ({"png": picture(1), "json": b"[" * 100_000}, "bad_json"),
        "latin": ({"png": picture(1), "json": b'{"caption": "caf\xe9"}'}, "not_utf8"),
        "surrogate": ({"png": picture(1), "json": b'{"caption": "a \\ud800"}'}, "lone_surrogate"),
        "blank": ({"png": picture(1), "json": b'{"caption": " \\n"}'}, "empty_text"),
        "cut": ({"png": picture(1, width=40, height=40)[:900], "json": CAPTION}, "picture_truncated"),
        "cut_jpeg": ({"jpg": picture(1, "JPEG", 40, 40)[:-200], "json": CAPTION}, "picture_truncated"),
        "junk": ({"png": b"\x89PNG\r\n\x1a\n" + bytes(80), "json": CAPTION}, "picture_undecodable"),
        "gif": ({"jpg": picture(1, "GIF"), "json": CAPTION}, "picture_format"),
        "nothing": ({"jpg": b"", "json": CAPTION}, "picture_format"),
        "bomb": ({"png": picture(1, width=101, height=100), "json": CAPTION}, "picture_too_large"),
        "long": ({"png": picture(1, width=1000, height=2), "json": CAPTION}, "picture_too_long"),
        "ids_shape": ({"vq.npy": npy(np.zeros(3, np.uint16)), "json": CAPTION}, "bad_vq_ids"),
        "ids_high": ({"vq.npy": npy(np.full(16, 64, np.uint16)), "json": CAPTION}, "bad_vq_ids"),
        "ids_pickle": ({"vq.npy": object_npy(), "json": CAPTION}, "bad_vq_ids"),
    },
    "understanding": {
        "unmarked": ({"png": picture(1), "json": conversation("<image> or <image>?", "this")}, "bad_dialogue"),
        "odd": (
            {"png": picture(1), "json": b'{"conversations": [{"from": "human", "value": "<image>"}]}'},
            "bad_dialogue",
        ),
        "speaker": ({"png": picture(1), "json": conversation("<image>", "a").replace(b"gpt", b"cat")}, "bad_dialogue"),
        "answer": ({"png": picture(1), "json": conversation("<image>\nwhat?", " ")}, "empty_text"),
        "broken": (
            {"webp": picture(1, "WEBP", 40, 40)[:-300], "json": conversation("<image>", "a")},
            "picture_undecodable",
        ),
    },
    "text": {
        "both": ({"txt": b"a", "json": b'{"text": "a"}'}, "extra_field"),
        "neither": ({"cls": b"3"}, "missing_field"),
        "pictured": ({"txt": b"a", "png": picture(1)}, "extra_field"),
        "bytes": ({"txt": b"\xff\xfe"}, "not_utf8"),
        "spaces": ({"txt": b"  \n "}, "empty_text"),
    },
}


@pytest.mark.parametrize("kind", PLANTED)
def test_every_planted_fault_of_a_sample_is_named_once_with_its_class_and_its_byte(sources, tokenizer, tmp_path, kind):
    cfg = sources(kind)
    cfg.data.max_image_pixels = 10_000
    members = [(f"good{n}", sound(kind, n)) for n in range(3)] + [
        (key, fields) for key, (fields, _) in PLANTED[kind].items()
    ]
    members.append(("last", sound(kind, 5)))
    path = write_shard(tmp_path / f"{kind}.tar", members)
    report = verify_sources(cfg, tokenizer, VerifyOptions())
    faults = list(report.findings)
    assert {fault.key: fault.fault for fault in faults} == {key: fault for key, (_, fault) in PLANTED[kind].items()}
    assert len(faults) == len(PLANTED[kind]) and not report.clean
    assert all(fault.source == kind and fault.shard == str(path) and fault.reason for fault in faults)
    with tarfile.open(path) as tar:
        headers = {member.offset for member in tar} | {member.offset_data for member in tar}
    assert all(fault.offset in headers for fault in faults)
    (shard,) = report.shards
    assert shard.whole and shard.samples == len(members) and shard.good == 4


def test_sound_data_is_clean_exits_with_0_and_counts_what_the_index_counts(mixed, tokenizer, tmp_path):
    cfg = mixed()
    cfg.run_dir = str(tmp_path / "run")
    cfg.validation = ValidationConfig(sources={"text": SourceConfig(kind=SourceKind.text, shards="text.tar")})
    document, status = verify_command(cfg, VerifyOptions(), progress=io.StringIO())
    assert status == 0 and document["clean"] and not document["findings"]
    indexes = index_sources(cfg, tokenizer)
    for index, source in zip(indexes, document["sources"], strict=False):
        assert (source["name"], source["samples"], source["usable"]) == (index.name, len(index), len(index))
        assert source["tokens"] == int(index.tokens.sum()) and source["longest"] == int(index.tokens.max())
        counts, edges = document["lengths"]["documents"][index.name], [*document["lengths"]["edges"], 1 << 40]
        np.testing.assert_array_equal(counts, np.histogram(index.tokens, edges)[0])
    assert document["sources"][-1]["name"] == "validation/text"
    assert json.loads((tmp_path / "run/verify/verify.json").read_text()) == document
    with Image.open(tmp_path / "run/verify/lengths.png") as histogram:
        assert histogram.format == "PNG" and min(histogram.size) > 300


TAR_FAULTS = (
    "truncated_tar",
    "corrupt_tar",
    "data_after_end",
    "compressed_tar",
    "link_or_device",
    "interleaved_key",
    "duplicate_key",
    "duplicate_field",
    "not_a_tar",
)


def broken_tar(fault: str, path: Path) -> None:
    three = [(f"{key}.txt", words(number, 5).encode()) for number, key in enumerate("abc")]
    data = raw_tar(path, three).read_bytes()
    end = len(data.rstrip(b"\0"))
    if fault == "truncated_tar":
        path.write_bytes(data[: end - 3])
    elif fault == "corrupt_tar":
        path.write_bytes(data[:2048] + b"\x07" * 512 + data[2560:])
    elif fault == "data_after_end":
        path.write_bytes(data + data)
    elif fault == "compressed_tar":
        with tarfile.open(path, "w:gz") as tar:
            tar.addfile(tarfile.TarInfo("a.txt"))
    elif fault == "not_a_tar":
        path.write_bytes(b'{"text": "a"}\n' * 99)
    elif fault == "link_or_device":
        with tarfile.open(path, "a") as tar:
            info = tarfile.TarInfo("d.txt")
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(info)
    else:
        again = {"interleaved_key": "a.json", "duplicate_key": "a.txt", "duplicate_field": "c.TXT"}[fault]
        raw_tar(path, [*three, (again, b"{}")])


@pytest.mark.parametrize("processes", [1, 2])
def test_a_broken_tar_is_named_with_what_is_readable_and_the_pass_goes_on(sources, tokenizer, tmp_path, processes):
    sources("text").stage.batch_unit = BatchUnit.packed
    for number, fault in enumerate(TAR_FAULTS):
        broken_tar(fault, tmp_path / f"text{number}-{fault}.tar")
    write_shard(tmp_path / "text9.tar", [("bad", {"txt": b""}), *text_samples(4)])
    report = verify_sources(sources("text"), tokenizer, VerifyOptions(processes=processes))
    faults = {Path(fault.shard).name: fault for fault in report.findings}
    assert len(faults) == len(list(report.findings)) == len(TAR_FAULTS) + 1
    for name, fault in faults.items():
        assert fault.fault == (name[6:-4] if "-" in name else "empty_text") and fault.fault in REMEDIES
    assert "readable up to sample 1 (key 'a')" in faults["text0-truncated_tar.tar"].reason
    assert "readable up to sample 3 (key 'c')" in faults["text2-data_after_end.tar"].reason
    assert (faults["text1-corrupt_tar.tar"].offset, faults["text2-data_after_end.tar"].offset) == (2048, 10240)
    assert faults["text5-interleaved_key.tar"].key == faults["text6-duplicate_key.tar"].key == "a"
    by_name = {Path(shard.shard.path).name: shard for shard in report.shards}
    assert [shard.whole for shard in by_name.values()] == [False] * len(TAR_FAULTS) + [True]
    assert by_name["text9.tar"].good == 4 and by_name["text0-truncated_tar.tar"].samples == 1
    for name in list(by_name)[:-1]:  # training refuses exactly these
        cfg = sources("text")
        cfg.data.sources["text"].shards = name
        with pytest.raises(DataError, match=name):
            index_sources(cfg, tokenizer)


def test_a_missing_shard_or_source_is_a_finding_and_the_others_are_read(sources, tokenizer, tmp_path):
    write_shard(tmp_path / "text0.tar", text_samples(3))
    cfg = sources("text", "generation")
    cfg.data.sources["text"].shards = "text{0..1}.tar"
    report = verify_sources(cfg, tokenizer, VerifyOptions())
    assert {fault.source: fault.fault for fault in report.findings} == {
        "text": "unreadable",
        "generation": "unreadable",
    }
    cfg.data.sources = {"empty": SourceConfig(kind=SourceKind.text, shards="text0.tar")}
    (tmp_path / "text0.tar").chmod(0)
    cfg.data.sources = {}
    with pytest.raises(ConfigError, match="no data.sources"):
        verify_sources(cfg, tokenizer, VerifyOptions())


@pytest.mark.parametrize(
    ("shards", "classes"),
    [
        ({"text0.tar": "empty"}, ["no_usable_sample", "empty_shard"]),
        ({"text0.tar": "zeros", "text1.tar": "empty"}, ["no_usable_sample", "empty_shard", "empty_shard"]),
        ({"text0.tar": "sound", "text1.tar": "zeros"}, ["empty_shard"]),
        ({"text0.tar": "sound", "text1.tar.gz": "sound", "text2.TAR": "sound"}, ["passed_over"]),
    ],
)
def test_shards_without_samples_and_tars_that_are_no_shards_are_named_and_verify_agrees_with_the_index(
    sources, tokenizer, tmp_path, shards, classes
):
    cfg = sources("text")
    cfg.data.sources["text"].shards = str(tmp_path / "folder")
    for name, content in shards.items():
        write_shard(tmp_path / "folder" / name, text_samples(2) if content == "sound" else [])
        if content == "zeros":
            (tmp_path / "folder" / name).write_bytes(bytes(10240))
    out = io.StringIO()
    document, status = verify_command(cfg, VerifyOptions(), table=out, progress=io.StringIO())
    assert [finding["fault"] for finding in document["findings"]] == classes
    if "no_usable_sample" in classes:
        assert status == 3 and "fault no_usable_sample in text" in out.getvalue()
        with pytest.raises(DataError, match="no usable text sample: the shards are empty"):
            index_sources(cfg, tokenizer)
    else:
        (index,) = index_sources(cfg, tokenizer)
        over = "1 *.tar.gz, 1 *.TAR passed over: " if "passed_over" in classes else ""
        assert status == 0 and index.passed_over.startswith(over) and bool(index.passed_over) == bool(over)
        assert over in out.getvalue()


def test_a_source_of_which_every_sample_is_excluded_is_not_clean(sources, tokenizer, tmp_path):
    write_shard(tmp_path / "generation.tar", [("a", {"png": picture(1)[:-200], "json": CAPTION})])
    cfg = sources("generation")
    assert verify_command(cfg, VerifyOptions(exclude=True), table=io.StringIO(), progress=io.StringIO())[1] == 3
    document, status = verify_command(cfg, VerifyOptions(), table=io.StringIO(), progress=io.StringIO())
    assert status == 3 and document["findings"][0]["fault"] == "no_usable_sample"
    with pytest.raises(DataError, match="no usable generation sample"):
        index_sources(cfg, tokenizer)


def test_over_long_samples_are_warnings_that_state_the_policy_and_text_that_goes_on_is_none(
    sources, tokenizer, tmp_path
):
    long = json_bytes({"caption": words(3, 400)})
    write_shard(tmp_path / "generation.tar", [("long", {"png": picture(1), "json": long}), *generation_samples(2)])
    write_shard(tmp_path / "text.tar", [("longtext", {"txt": words(3, 900).encode()})])
    cfg = sources("generation", "text")
    # where rows count samples, no text is continued
    assert fault_classes(cfg, tokenizer) == {"long": "over_long", "longtext": "over_long"}
    cfg.stage.batch_unit = BatchUnit.packed
    report = verify_sources(cfg, tokenizer, VerifyOptions())
    (fault,) = report.findings
    assert (fault.key, fault.fault, fault.warning) == (
        "long",
        "over_long",
        True,
    ) and "cut off (data.over_long=truncate)" in fault.reason
    assert report.clean and [shard.over_seq_len for shard in report.shards] == [1, 1]
    cfg.data.over_long = OverLong.drop
    assert "dropped" in next(verify_sources(cfg, tokenizer, VerifyOptions()).findings).reason


def test_a_question_that_leaves_no_room_for_its_answer_is_a_fault_where_it_is_cut_and_none_where_it_is_dropped(
    sources, tokenizer, tmp_path
):
    write_shard(
        tmp_path / "understanding.tar",
        [("q", {"png": picture(1), "json": conversation("<image>\n" + words(1, 300), "yes")})],
    )
    cfg = sources("understanding")
    cfg.stage.template, cfg.data.mask_question = Template.stage3, True
    assert fault_classes(cfg, tokenizer) == {"q": "nothing_to_learn"}
    cfg.data.over_long = OverLong.drop
    assert fault_classes(cfg, tokenizer) == {"q": "over_long"}


def test_fast_reads_headers_only_and_sample_decodes_that_many_evenly(sources, tokenizer, tmp_path):
    for number in range(2):
        samples = [
            (f"{number}{key}", {**fields, "png": fields["png"][:-400]}) for key, fields in generation_samples(20)
        ]
        samples.append((f"{number}bomb", {"png": SOLID, "json": CAPTION}))
        write_shard(tmp_path / f"generation{number}.tar", samples)
    cfg = sources("generation")
    cfg.data.max_image_pixels = 50_000
    assert fault_classes(cfg, tokenizer, decode=0) == {"0bomb": "picture_too_large", "1bomb": "picture_too_large"}
    report = verify_sources(cfg, tokenizer, VerifyOptions(decode=7))
    assert [shard.decoded for shard in report.shards] == [3, 4]
    caught = [fault.key for fault in report.findings if fault.fault == "picture_truncated"]
    assert len(caught) == 7 and caught[0] == "0g0000" and caught[2] > "0g0010"
    assert len(fault_classes(cfg, tokenizer)) == 42


def test_exclusions_outlive_a_rebuild_of_the_index_are_named_by_the_ledger_and_end_with_the_shard(
    mixed, tokenizer, tmp_path
):
    cfg = mixed(frozenset({"g0003", "u0005"}))
    cfg.run_dir = str(tmp_path / "run")
    before = {index.name: len(index) for index in index_sources(cfg, tokenizer)}
    report = verify_sources(cfg, tokenizer, VerifyOptions(exclude=True))
    assert {Path(path).name for path in report.exclusion_files} == {
        "real-0.tar.jp-excluded.json",
        "und.tar.jp-excluded.json",
    }
    assert not report.clean and verify_sources(cfg, tokenizer, VerifyOptions()).clean
    for _ in range(2):
        indexes = {index.name: index for index in index_sources(cfg, tokenizer)}
        assert len(indexes["real"]) == before["real"] - 1 and len(indexes["und"]) == before["und"] - 1
        assert len(indexes["stored"]) == before["stored"]
        (bad,) = indexes["und"].bad
        assert bad.info.key == "u0005" and bad.reason.startswith("excluded by data verify (picture_")
        for sidecar in tmp_path.glob("*.jp-*.npz"):
            sidecar.unlink()
    Ledger(tmp_path / "run", cfg, write=True).record_index(list(indexes.values()))
    lines = [json.loads(line) for line in (tmp_path / "run/ledger.jsonl").read_text().splitlines()]
    assert {(line["source"], line["key"]) for line in lines} == {("real", "g0003"), ("und", "u0005")}
    write_shard(tmp_path / "und.tar", understanding_samples(17))
    assert len({index.name: index for index in index_sources(cfg, tokenizer)}["und"]) == 17


def test_with_index_dir_verify_excludes_and_the_index_follows_without_a_file_beside_the_data(
    mixed, tokenizer, tmp_path
):
    cfg = mixed(frozenset({"u0005"}))
    cfg.data.index_dir = str(tmp_path / "index")
    beside = sorted(os.listdir(tmp_path))
    report = verify_sources(cfg, tokenizer, VerifyOptions(exclude=True))
    assert all(Path(path).is_relative_to(tmp_path / "index") for path in report.exclusion_files)
    assert [len(index) for index in index_sources(cfg, tokenizer) if index.name == "und"] == [16]
    assert verify_sources(cfg, tokenizer, VerifyOptions()).clean
    assert sorted(os.listdir(tmp_path)) == sorted([*beside, "index"])


def test_a_run_under_way_keeps_the_table_it_began_with_when_samples_are_excluded(mixed, tokenizer, tmp_path):
    from jp_train.data.rows import RowBuilder
    from jp_train.types import DocumentRef, RowSpec

    cfg = mixed(frozenset({"u0005"}))
    cfg.run_dir = str(tmp_path / "run")
    indexes = index_sources(cfg, tokenizer)
    verify_sources(cfg, tokenizer, VerifyOptions(exclude=True))
    index_sources(cfg, tokenizer)  # another run, or the next start, builds its own
    builder = RowBuilder(cfg, [index.locator for index in indexes], tokenizer)
    ref = DocumentRef(source=2, epoch=0, sample=16, start=0, length=int(indexes[2].tokens[16]))
    row = builder.build(RowSpec(step=0, row=0, documents=(ref,)))
    assert row.provenance[0].key == "u0016"


def test_a_pass_over_everything_replaces_old_exclusions_and_a_sampled_one_only_adds(sources, tokenizer, tmp_path):
    write_shard(tmp_path / "generation.tar", [("bomb", {"png": SOLID, "json": CAPTION}), *generation_samples(2)])
    cfg = sources("generation")
    cfg.data.max_image_pixels = 50_000
    verify_sources(cfg, tokenizer, VerifyOptions(exclude=True, decode=0))
    assert [len(index) for index in index_sources(cfg, tokenizer)] == [2]
    cfg.data.max_image_pixels = 500_000
    verify_sources(cfg, tokenizer, VerifyOptions(exclude=True, decode=0))
    assert [len(index) for index in index_sources(cfg, tokenizer)] == [2]
    verify_sources(cfg, tokenizer, VerifyOptions(exclude=True))
    assert [len(index) for index in index_sources(cfg, tokenizer)] == [3]


def test_a_process_that_dies_on_a_shard_is_a_finding_of_that_shard_only(sources, tokenizer, tmp_path, monkeypatch):
    for number in range(3):
        write_shard(tmp_path / f"text{number}.tar", text_samples(3))
    cfg = sources("text")
    monkeypatch.setattr(verify, "_verify", _dies_at_text1)
    report = verify_sources(cfg, tokenizer, VerifyOptions(processes=2))
    assert [(Path(fault.shard).name, fault.fault) for fault in report.findings] == [("text1.tar", "process_died")]
    assert [shard.good for shard in report.shards] == [3, 0, 3]


def _dies_at_text1(task, **options):
    if task.shard.path.endswith("text1.tar"):
        os._exit(9)
    return verify._verify(task, **options)


def _never_ends(task, **_):
    time.sleep(300)


class _Interrupted(io.StringIO):
    def write(self, text: str) -> int:
        raise KeyboardInterrupt


def test_an_interrupted_pass_does_not_wait_for_the_shards_under_way(sources, tokenizer, tmp_path, monkeypatch):
    for number in range(2):
        write_shard(tmp_path / f"text{number}.tar", text_samples(3))
    monkeypatch.setattr(verify, "_verify", _never_ends)
    with pytest.raises(KeyboardInterrupt):
        verify_sources(sources("text"), tokenizer, VerifyOptions(processes=2), progress=_Interrupted())
    assert not multiprocessing.active_children()


def test_a_report_that_cannot_be_written_and_damaged_exclusions_are_told_before_the_pass(
    sources, tokenizer, tmp_path, monkeypatch
):
    path = write_shard(tmp_path / "text.tar", text_samples(3))
    monkeypatch.setattr(verify, "verify_shard", lambda *_: pytest.fail("read a shard"))
    cfg = sources("text")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--out"):
        verify_command(cfg, VerifyOptions(out=tmp_path / "file" / "out"))
    Path(f"{path}.jp-excluded.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="not ignored"):
        verify_sources(cfg, tokenizer, VerifyOptions())


def test_the_command_prints_one_json_object_and_exits_with_3(mixed, tmp_path, capsys):
    cfg = mixed(frozenset({"g0003"}))
    cfg.run_dir = str(tmp_path / "run")
    save_config(cfg, tmp_path / "config.yaml")
    path = tmp_path / "text.tar"
    path.write_bytes(path.read_bytes()[:5000])
    command = ["data", "verify", str(tmp_path / "config.yaml"), "--processes", "1"]
    assert main([*command, "--json", "--out", str(tmp_path / "out")]) == 3
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert not document["clean"]
    assert [(finding["fault"], finding["shard"], finding["key"]) for finding in document["findings"]] == [
        ("picture_truncated", str(tmp_path / "real-0.tar"), "g0003"),
        ("truncated_tar", str(path), None),
    ]
    assert sorted(child.name for child in (tmp_path / "out").iterdir()) == ["lengths.png", "verify.json"]
    assert main([*command, "--fast"]) == 3
    text = capsys.readouterr()
    assert "remedy: copy or write the shard again" in text.out and "g0003" not in text.out
    *_, last = text.err.splitlines()
    assert last.startswith("verify: shard 5/5, 54 samples, ") and text.err.count("shard 5/5") == 1
    assert "only 0 images were decoded" in text.out and "never a whole shard" not in text.out
    assert main([*command, "--exclude"]) == 3
    text = capsys.readouterr().out
    assert f"--exclude leaves out samples, never a whole shard, and did nothing about {path}: copy or" in text
    assert "excluded 1 samples" in text and not list(tmp_path.glob("text*excluded*"))
