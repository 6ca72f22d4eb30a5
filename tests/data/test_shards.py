from __future__ import annotations

import gzip
import io
import os
import re
import tarfile
import threading

import numpy as np
import pytest

from jp_train.config.schema import EngineConfig
from jp_train.data.shards import (
    Shard,
    ShardReader,
    ShardWindow,
    expand_shards,
    passed_over,
    passed_over_text,
    scan_members,
)
from jp_train.data.sidecar import load_members, store_members
from jp_train.data.tar_headers import TarFault, tar_members
from jp_train.data.tar_samples import group_members
from jp_train.errors import ConfigError, DataError
from tests.data.data_samples import generation_samples, write_shard


def _touch(folder, *names):
    for name in names:
        (folder / name).write_bytes(b"")


def test_braces_globs_and_folders_name_the_same_shards(tmp_path):
    _touch(tmp_path, "s-000.tar", "s-001.tar", "s-002.tar", "other.txt")
    expected = [str(tmp_path / f"s-00{n}.tar") for n in range(3)]
    assert expand_shards("s-{000..002}.tar", tmp_path) == expected
    assert expand_shards("s-*.tar", tmp_path) == expected
    assert expand_shards(".", tmp_path) == expected
    assert expand_shards(str(tmp_path), "/elsewhere") == expected
    assert expand_shards("s-00{2,0}.tar", tmp_path) == [expected[2], expected[0]]
    assert expand_shards("http://host/s-{0..1}.tar", tmp_path) == ["http://host/s-0.tar", "http://host/s-1.tar"]


def test_tars_of_a_folder_that_are_no_plain_ones_are_counted(tmp_path):
    _touch(tmp_path, "0.tar", "1.tar.gz", "2.tar.gz", "3.TAR", "4.tgz", "0.tar.jp-members.npz", ".5.tar.gz", "a.txt")
    (tmp_path / "none").mkdir()
    counts = passed_over("{.,none,0.tar,http://host/a.tar.gz}", tmp_path)
    assert counts == {"*.tar.gz": 2, "*.TAR": 1, "*.tgz": 1} and passed_over("*.tar", tmp_path) == {}
    assert passed_over_text(counts).startswith("2 *.tar.gz, 1 *.TAR, 1 *.tgz passed over: ")
    assert passed_over_text({}) == ""
    _touch(tmp_path / "none", "a.tar.gz")
    with pytest.raises(DataError, match=r"holds no \*.tar file \(1 \*.tar.gz passed over"):
        expand_shards("none", tmp_path)


@pytest.mark.parametrize(
    ("spec", "error", "says"),
    [
        ("none.tar", DataError, "does not exist"),
        ("none-*.tar", DataError, "no file matches"),
        ("empty", DataError, "holds no"),
        ("s-{000,000}.tar", DataError, "twice"),
        ("s-{000..", ConfigError, "s-{000.."),
        ("pipe:cat s-000.tar", ConfigError, "pipe"),
        ("swift://bucket/s.tar", ConfigError, "swift"),
    ],
)
def test_a_spec_that_names_no_readable_shards_is_one_clear_error(tmp_path, spec, error, says):
    _touch(tmp_path, "s-000.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(error) as caught:
        expand_shards(spec, tmp_path)
    assert says in str(caught.value)


def test_members_found_by_headers_are_those_that_tarfile_extracts(tmp_path):
    samples = generation_samples(5)
    samples.append(("dir/" + "x" * 150, {"txt": b"long name", "vq.npy": b"1234"}))  # needs an extended header
    path = write_shard(tmp_path / "a.tar", samples)
    reader = ShardReader()
    shard = reader.stat(str(path))
    members = scan_members(shard, reader)
    assert members.keys == tuple(key for key, _ in samples)
    for number, (_, fields) in enumerate(samples):
        span = range(members.member_start[number], members.member_start[number + 1])
        read = {
            members.extensions[members.extension[m]]: reader.read(shard, int(members.offset[m]), int(members.size[m]))
            for m in span
        }
        assert read == fields
    reader.close()


def _scan(path):
    reader = ShardReader()
    try:
        return scan_members(reader.stat(str(path)), reader)
    finally:
        reader.close()


@pytest.mark.parametrize("kept", [0.3, 0.7, 0.95])
def test_a_truncated_tar_is_an_error_that_names_shard_and_offset(tmp_path, kept):
    path = write_shard(tmp_path / "a.tar", generation_samples(6))
    data = path.read_bytes()
    end = len(data.rstrip(b"\0"))
    path.write_bytes(data[: int(end * kept)])
    with pytest.raises(DataError) as caught:
        _scan(path)
    assert str(path) in str(caught.value) and "byte" in str(caught.value)


def test_a_tar_cut_exactly_between_members_is_not_taken_for_whole(tmp_path):
    path = write_shard(tmp_path / "a.tar", [("a", {"txt": b"x" * 512}), ("b", {"txt": b"y" * 512})])
    path.write_bytes(path.read_bytes()[:1024])
    with pytest.raises(DataError, match="end-of-archive"):
        _scan(path)


def test_a_damaged_header_in_the_middle_is_not_taken_for_the_end(tmp_path):
    path = write_shard(tmp_path / "a.tar", [(name, {"txt": b"x" * 512}) for name in "abc"])
    data = bytearray(path.read_bytes())
    data[1024 + 10] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(DataError, match="1024"):
        _scan(path)


def _raw_tar(path, names, content=b"data"):
    with tarfile.open(path, "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["a.txt", "b.txt", "a.json"], "appears again"),
        (["a.txt", "a.txt"], "two .txt"),
        (["a.txt", "a.TXT"], "two .txt"),
    ],
)
def test_duplicated_or_interleaved_keys_are_errors(tmp_path, names, says):
    with pytest.raises(DataError, match=says):
        _scan(_raw_tar(tmp_path / "a.tar", names))


def test_links_concatenated_and_compressed_tars_are_refused(tmp_path):
    with tarfile.open(tmp_path / "link.tar", "w") as tar:
        info = tarfile.TarInfo("a.txt")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(DataError, match="link"):
        _scan(tmp_path / "link.tar")
    plain = _raw_tar(tmp_path / "one.tar", ["a.txt"]).read_bytes()
    (tmp_path / "two.tar").write_bytes(plain + _raw_tar(tmp_path / "b.tar", ["b.txt"]).read_bytes())
    with pytest.raises(DataError, match="after its end-of-archive"):
        _scan(tmp_path / "two.tar")
    with tarfile.open(tmp_path / "z.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    with pytest.raises(DataError, match="compressed"):
        _scan(tmp_path / "z.tar")
    (tmp_path / "garbage.tar").write_bytes(b"not a\0tar" * 200)
    with pytest.raises(DataError, match="corrupt_tar at byte 0 of 1800"):
        _scan(tmp_path / "garbage.tar")


OTHERS = {
    "Parquet": (b"PAR1\x15\x04" + bytes(range(256)) * 4, "Parquet, which `jp-train data import parquet` reads"),
    "Arrow": (b"ARROW1\0\0" + bytes(600), "Arrow IPC: write it as Parquet"),
    "Arrow stream": (b"\xff\xff\xff\xff\x10\1\0\0" + bytes(600), "an Arrow stream"),
    "JSON lines": (b'{"text": "one"}\n' * 100, "JSON or JSON lines, which `jp-train data import text`, `pairs`"),
    "short JSON lines": (b'{"text": "\xc3\xa9"}\n', "JSON or JSON lines"),
    "JSON cut inside a letter": (b'[{"text": "' + b"a" * 500 + b"\xc3\xa9" * 9, "JSON or JSON lines"),
    "text": (b"not a tar" * 200, "plain text, CSV or TSV, which `jp-train data import text`"),
    "ZIP": (b"PK\x03\x04" + bytes(600), "a ZIP archive or an Office document: unpack it"),
    "gzip of JSON lines": (gzip.compress(b'{"text": "one"}\n' * 100), "inside gzip, JSON or JSON lines"),
}


@pytest.mark.parametrize("form", OTHERS)
def test_a_file_that_is_no_tar_is_named_for_what_it_is_with_the_import_that_reads_it(tmp_path, form):
    content, what = OTHERS[form]
    (tmp_path / "a.tar").write_bytes(content)
    expected = re.escape(f"(not_a_tar at byte 0 of {len(content)}): it is no tar but") + f".*{re.escape(what)}"
    with pytest.raises(DataError, match=f"{expected}.*name the folder of shards that the import writes$"):
        _scan(tmp_path / "a.tar")


@pytest.mark.parametrize("name", ["{a.txt", "PAR1.txt", "[1].txt"])
def test_a_tar_stays_a_tar_whatever_the_name_of_its_first_file(tmp_path, name):
    path = _raw_tar(tmp_path / "a.tar", [name])
    assert _scan(path).keys == (name.partition(".")[0],)
    path.write_bytes(path.read_bytes()[:513])
    with pytest.raises(DataError, match="truncated_tar"):
        _scan(path)


def test_a_folder_without_a_tar_says_what_it_holds_instead(tmp_path):
    (tmp_path / ".hidden").write_bytes(b"PAR1")
    (tmp_path / "README.md").write_bytes(b"# Notes")
    (tmp_path / "part-0.parquet").write_bytes(b"PAR1" + bytes(99))
    with pytest.raises(DataError, match=r"holds no \*.tar file \(part-0.parquet is Parquet, which `jp-train data"):
        expand_shards(str(tmp_path))
    (tmp_path / "instruct.json").write_text('[{"id": 1, "conversations": []}]')
    with pytest.raises(DataError, match=r"\(instruct.json is JSON or JSON lines, which .*`conversations`"):
        expand_shards(str(tmp_path))


def test_names_that_climb_out_of_a_folder_are_keys_and_touch_no_file(tmp_path):
    members = _scan(_raw_tar(tmp_path / "a.tar", ["../../etc/x.txt", ".hidden", "noextension"]))
    assert members.keys == ("../../etc/x",)
    assert [name for name, _ in members.ignored] == [".hidden", "noextension"]
    assert sorted(os.listdir(tmp_path)) == ["a.tar"]


def test_a_passing_io_error_is_retried_with_back_off_and_a_lasting_one_stops(tmp_path, monkeypatch):
    path = tmp_path / "a.tar"
    path.write_bytes(bytes(range(100)))
    waits: list[float] = []
    reader = ShardReader(retries=4, sleep=waits.append)
    shard = reader.stat(str(path))
    real, failures = os.pread, [3]

    def flaky(descriptor, size, offset):
        if failures[0]:
            failures[0] -= 1
            raise OSError(5, "Input/output error")
        return real(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", flaky)
    assert reader.read(shard, 10, 5) == bytes(range(10, 15))
    assert waits == [0.1, 0.2, 0.4]
    failures[0] = 99
    with pytest.raises(DataError, match="after 4 tries.*never skipped"):
        reader.read(shard, 10, 5)


def test_a_read_outlives_the_failover_of_a_storage_server_and_says_once_that_it_waits(tmp_path, monkeypatch, capfd):
    path = tmp_path / "a.tar"
    path.write_bytes(bytes(100))
    waits: list[float] = []
    reader = ShardReader(sleep=waits.append)
    shard = reader.stat(str(path))

    def fails(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fails)
    with pytest.raises(DataError, match="after 20 tries"):
        reader.read(shard, 10, 5)
    assert sum(waits) == pytest.approx(132.7) and max(waits) == 10.0
    assert sum(waits) < EngineConfig.stall_timeout_s, "the watchdog would end the run first, and name no shard"
    printed = capfd.readouterr().err
    assert printed.count("\n") == 1 and "at most 15 times" in printed
    assert f"shard {path}: cannot read bytes 10 to 15: " in printed
    waits.clear()
    monkeypatch.setattr(os, "stat", fails)
    with pytest.raises(DataError, match="after 4 tries"):
        reader.stat(str(path))
    assert sum(waits) < 1


def test_reading_past_the_end_or_from_a_changed_file_is_an_error(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(b"x" * 50)
    reader = ShardReader()
    shard = reader.stat(str(path))
    with pytest.raises(DataError, match="truncated"):
        reader.read(shard, 40, 20)
    with pytest.raises(DataError, match="changed since"):
        ShardReader().read(Shard(path=str(path), size=51, stamp=shard.stamp), 0, 1)


def test_open_descriptors_are_bounded_and_closed(tmp_path, monkeypatch):
    monkeypatch.setattr("jp_train.data.shards.MAX_OPEN_SHARDS", 3)
    reader = ShardReader()
    before = len(os.listdir("/proc/self/fd"))
    for number in range(8):
        path = tmp_path / f"{number}.tar"
        path.write_bytes(bytes([number]) * 4)
        assert reader.read(reader.stat(str(path)), 1, 2) == bytes([number]) * 2
    assert len(os.listdir("/proc/self/fd")) == before + 3
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


HOSTILE = (
    "../../x.txt",
    "/etc/passwd.txt",
    "a\nb.txt",
    "café/ключ.txt",
    "\udcff\udcfe.txt",
    "..txt",
    "d/.hidden.txt",
    "n" * 5000 + ".txt",
    " .txt",
    "a\x1b[31m.txt",
    "%00.txt",
    "a\u2028b.txt",
    "C:\\x.txt",
)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_hostile_names_are_keys_that_survive_the_sidecar_and_touch_no_file(tmp_path, form):
    data = tmp_path / "data"
    data.mkdir()
    with tarfile.open(data / "a.tar", "w", format=form, errors="surrogateescape") as tar:
        for name in HOSTILE:
            info = tarfile.TarInfo(name)
            info.size = 4
            tar.addfile(info, io.BytesIO(b"text"))
    reader = ShardReader()
    shard = reader.stat(str(data / "a.tar"))
    members = scan_members(shard, reader)
    with tarfile.open(data / "a.tar", errors="surrogateescape") as tar:
        theirs = [(member.name, member.offset_data) for member in tar]
    named = [name for name, _ in members.ignored]
    assert [*members.keys, *named] == [name.removesuffix(".txt") for name, _ in theirs if name not in named] + named
    assert named == ["..txt", "d/.hidden.txt"]
    assert members.offset.tolist() == [offset for name, offset in theirs if name not in named]
    store_members(shard, members)
    again = load_members(shard)
    assert again is not None and again.keys == members.keys and again.ignored == members.ignored
    assert sorted(os.listdir(tmp_path)) == ["data"] and sorted(os.listdir(data)) == ["a.tar", "a.tar.jp-members.npz"]


def _random_tar(random: np.random.Generator, form: int) -> bytes:
    """Files, empty files, folders and links with short, long and foreign names, and an end marker of any number of
    blocks."""
    letters = np.array(list("ab.-_ é字" if form != tarfile.USTAR_FORMAT else "ab.-_ é"))
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=form, pax_headers={"comment": "all"} if random.integers(2) else {}
    ) as tar:
        for number in range(int(random.integers(1, 9))):
            longest = 40 if form == tarfile.USTAR_FORMAT else 130
            parts = [
                "".join(random.choice(letters, int(random.integers(1, longest))))
                for _ in range(int(random.integers(1, 4)))
            ]
            info = tarfile.TarInfo("/".join(["x", *parts, f"{number}.txt"]))
            info.type = [tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE][
                int(random.integers(5))
            ]
            if info.type == tarfile.AREGTYPE and len(info.name.encode()) > 100:
                # tarfile takes such a file for a folder when its cut-off name happens to end in a slash
                info.type = tarfile.REGTYPE
            info.mtime = float(random.uniform(0, 1e9)) if form == tarfile.PAX_FORMAT else 0
            content = b""
            if info.isfile():
                content = random.bytes(int(random.choice([0, 1, 511, 512, 513, random.integers(3000)])))
            elif info.issym():
                info.linkname = "l" * int(random.integers(1, 100 if form == tarfile.USTAR_FORMAT else 300))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        end = tar.offset
    return buffer.getvalue()[:end] + bytes(512 * int(random.integers(1, 45)))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_random_tars_have_exactly_the_members_that_tarfile_finds(form):
    random = np.random.default_rng(form)
    kinds = set()
    for _ in range(150):
        data = _random_tar(random, form)
        members = list(tar_members(lambda offset, size, data=data: data[offset : offset + size], len(data)))
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            expected = [
                (member.name, member.isfile(), member.isdir(), member.offset_data, member.size) for member in tar
            ]
        assert [
            (
                member.name.rstrip("/") if member.folder else member.name,
                member.file,
                member.folder,
                member.offset,
                member.size,
            )
            for member in members
        ] == expected
        kinds |= {(member.file, member.folder, len(member.name) > 100, member.size == 0) for member in members}
    assert len(kinds) == 8  # files with and without content, folders and links; of each, short and long names


def test_a_tar_of_nothing_but_remarks_is_empty_and_an_extension_without_its_file_is_damage():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "all"}) as tar:
        remarks = tar.offset
    data = buffer.getvalue()
    assert list(tar_members(lambda offset, size: data[offset : offset + size], len(data))) == []
    header = bytearray(data[:remarks])
    header[156:157], header[148:156] = b"x", b" " * 8
    header[148:156] = b"%06o\0 " % sum(header[:512])
    data = bytes(header) + data[remarks:]
    with pytest.raises(TarFault, match="belongs to no file"):
        list(tar_members(lambda offset, size: data[offset : offset + size], len(data)))


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 41\n", "Git LFS pointer.*git lfs pull"),
        (b"<html><body>404</body></html>" * 90, "HTML page"),
    ],
)
def test_what_a_download_left_in_place_of_a_shard_is_named(tmp_path, content, what):
    (tmp_path / "a.tar").write_bytes(content)
    reader = ShardReader()
    with pytest.raises(DataError, match=f"a.tar .*{what}"):
        scan_members(reader.stat(str(tmp_path / "a.tar")), reader)


def test_a_name_with_a_nul_belongs_to_no_sample(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("b.txt")
        info.pax_headers = {"path": "x\0y.txt"}
        tar.addfile(info)
    members = _scan(path)
    assert members.keys == () and [name for name, _ in members.ignored] == ["x\0y.txt"]


def test_headers_that_claim_gigabytes_take_no_memory_and_are_named(tmp_path):
    path = _raw_tar(tmp_path / "a.tar", ["a.txt", "b.txt"])
    whole = path.read_bytes()
    for kind, says in ((b"x", "claims"), (b"L", "claims"), (b"g", "claims"), (b"0", "runs past the end")):
        for size in (b"77777777777\0", b"\x80" + b"\x7f" * 11):
            data = bytearray(whole)
            data[1024 + 124 : 1024 + 136], data[1024 + 156 : 1024 + 157] = size, kind
            data[1024 + 148 : 1024 + 156] = b" " * 8
            data[1024 + 148 : 1024 + 156] = b"%06o\0 " % sum(data[1024:1536])
            path.write_bytes(data)
            with pytest.raises(DataError, match=says):
                _scan(path)


def test_a_tar_with_as_many_extensions_as_samples_is_read(tmp_path):
    names = [f"picture.{number:05d}.txt" for number in range(33_000)]
    with open(tmp_path / "a.tar", "wb") as file:
        header = bytearray(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT))
        for name in (f"{number:05d}.{name}" for number, name in enumerate(names)):
            header[:100] = name.encode().ljust(100, b"\0")
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
            file.write(header)
        file.write(bytes(1024))
    members = _scan(tmp_path / "a.tar")
    assert len(members.keys) == len(members.extensions) == 33_000 and members.extension[-1] == 32_999


def test_threads_share_a_reader_while_its_descriptors_come_and_go(tmp_path, monkeypatch):
    monkeypatch.setattr("jp_train.data.shards.MAX_OPEN_SHARDS", 2)
    reader = ShardReader()
    shards = []
    for number in range(6):
        (tmp_path / f"{number}.tar").write_bytes(bytes([number]) * 4096)
        shards.append(reader.stat(str(tmp_path / f"{number}.tar")))
    wrong = []

    def read(seed: int) -> None:
        for number in np.random.default_rng(seed).integers(0, 6, 400).tolist():
            if reader.read(shards[number], 7, 1000) != bytes([number]) * 1000:
                wrong.append(number)

    before = len(os.listdir("/proc/self/fd"))
    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(os.listdir("/proc/self/fd")) <= before + 2
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_window_serves_a_sequential_pass_with_each_byte_read_about_once(tmp_path):
    path = write_shard(tmp_path / "a.tar", generation_samples(60))
    reader = ShardReader()
    shard = reader.stat(str(path))
    read = []
    counting = ShardReader()
    monkey = counting.read
    counting.read = lambda shard, offset, size: read.append(size) or monkey(shard, offset, size)
    window = ShardWindow(counting, shard, 65536)
    whole = path.read_bytes()
    for sample in group_members(tar_members(window.up_to, shard.size), on_fault=pytest.fail, on_stray=pytest.fail):
        for member in sample.members.values():
            assert window.read(shard, member.offset, member.size) == whole[member.offset : member.offset + member.size]
    assert sum(read) < 1.2 * shard.size and len(read) < 2 * shard.size / 65536 + 2
