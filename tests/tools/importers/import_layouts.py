"""Small sources in the layouts that `data import` reads, and what to do with its result."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path

from PIL import Image

from jp_train.tools.importers.coco import CocoReader
from jp_train.tools.importers.documents import text_reader
from jp_train.tools.importers.imagenet import ImageNetReader
from jp_train.tools.importers.manifest import SKIPPED, Manifest
from jp_train.tools.importers.parquet import ParquetReader
from jp_train.tools.importers.records import Columns, RecordReader, record_reader
from jp_train.tools.importers.run import ImportSettings, import_source
from jp_train.types import Kind
from tests.data.data_samples import png


def picture(seed: int, format: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png(seed, 24, 20))).save(buffer, format=format)
    return buffer.getvalue()


def image_folder(folder: Path, count: int) -> Path:
    """000.jpg, 001.png, 002.webp, 003.jpg, …"""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        format = ("JPEG", "PNG", "WEBP")[number % 3]
        (folder / image_name(number)).write_bytes(picture(number, format))
    return folder


def image_name(number: int) -> str:
    return f"{number:03d}.{('jpg', 'png', 'webp')[number % 3]}"


def coco(tmp: Path, count: int = 9, **options) -> CocoReader:
    images = image_folder(tmp / "images", count)
    value = {
        "images": [{"id": 100 + n, "file_name": image_name(n)} for n in range(count)],
        "annotations": [
            {"id": n, "image_id": 100 + n % count, "caption": f"Caption {n}. More."} for n in range(2 * count)
        ],
    }
    return CocoReader(source=dump(tmp / "captions.json", value), images=images, **{"kind": Kind.GENERATION, **options})


def turns(number: int, marker: str = "<image>\n") -> list[dict]:
    return [{"from": "human", "value": f"{marker}What is {number}?"}, {"from": "gpt", "value": f"It is {number}."}]


def conversations(tmp: Path, count: int = 9, texts: int = 4) -> RecordReader:
    """Images and text-only conversations in turns."""
    images = image_folder(tmp / "images", count)
    records: list[dict] = [{"id": f"p{n}", "image": image_name(n), "conversations": turns(n)} for n in range(count)]
    for number in range(texts):
        records.insert(1 + 3 * number, {"id": f"t{number}", "conversations": turns(number, "")})
    return record_reader("conversations", dump(tmp / "llava.json", records), images, "understanding", Columns())


def pairs_csv(tmp: Path, count: int = 9, kind: str = "generation", **columns) -> RecordReader:
    image_folder(tmp, count)
    path = tmp / "pairs.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption", "ask"])
        writer.writerows([image_name(n), f'Größe {n}, "quoted"\nsecond line', f"what {n}?"] for n in range(count))
    return record_reader("pairs", path, None, kind, Columns(**columns))


def pairs_jsonl(tmp: Path, count: int = 9, kind: str = "generation") -> RecordReader:
    images = image_folder(tmp / "images", count)
    lines = [json.dumps({"image": image_name(n), "caption": f"caption {n}"}) for n in range(count)]
    path = tmp / "pairs.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return record_reader("pairs", path, images, kind, Columns())


def imagenet(tmp: Path, count: int = 9) -> ImageNetReader:
    for number in range(count):
        folder = tmp / "train" / f"n0000000{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"n0000000{number % 3}_{number}.JPEG").write_bytes(picture(number))
    (tmp / "LOC_synset_mapping.txt").write_text("".join(f"n0000000{n} name {n}, other name\n" for n in range(4)))
    return ImageNetReader(source=tmp / "train")


def text_jsonl(tmp: Path, count: int = 9) -> RecordReader:
    tmp.mkdir(parents=True, exist_ok=True)
    path = tmp / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"Document {n} says something."}) + "\n" for n in range(count)))
    return text_reader(path, "file", Columns())


def parquet(tmp: Path, count: int = 9, kind: str = "generation", image=None) -> ParquetReader:
    """Three files' worth of rows in two files, row groups of four; `image` makes the image cell of row n."""
    import pyarrow
    from pyarrow import parquet as files

    tmp.mkdir(parents=True, exist_ok=True)
    image = image or (lambda n: {"bytes": picture(n, ("JPEG", "PNG", "WEBP")[n % 3]), "path": image_name(n)})
    for part in range(2):
        numbers = range(part * count // 2, (part + 1) * count // 2)
        table = pyarrow.table({"image": [image(n) for n in numbers], "caption": [f"caption {n}" for n in numbers]})
        files.write_table(table, tmp / f"part-{part}.parquet", row_group_size=4)
    return ParquetReader(source=tmp, images=None, kind=Kind(kind))


def dump(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def run(reader, out: Path, **settings) -> Manifest:
    return import_source(reader, ImportSettings(out=out, **settings))


def samples_in(folder: Path) -> list[tuple[str, dict[str, bytes]]]:
    """(key, {extension: bytes}) of every sample of a folder's shards, read with tarfile alone."""
    samples: list[tuple[str, dict[str, bytes]]] = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                if not samples or samples[-1][0] != key:
                    samples.append((key, {}))
                samples[-1][1][extension] = tar.extractfile(member).read()
    return samples


def notes_in(folder: Path) -> list[dict]:
    return [json.loads(fields["json"]) for _, fields in samples_in(folder)]


def skipped_in(folder: Path) -> list[tuple[str, str]]:
    """(name, reason) of every line of skipped.jsonl."""
    return [(line["name"], line["reason"]) for line in map(json.loads, (folder / SKIPPED).read_text().splitlines())]


def contents(*folders: Path) -> dict[str, bytes]:
    """Every file of the folders but the manifest, which names the folder, and indexes, which know the shards' times."""
    return {
        f"{number}/{path.name}": path.read_bytes()
        for number, folder in enumerate(folders)
        for path in sorted(folder.iterdir())
        if path.name != "manifest.json" and path.suffix != ".npz"
    }
