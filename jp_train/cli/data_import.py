"""`jp-train data import FORMAT SOURCE OUT`: real-world layouts into WebDataset shards."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jp_train.cli.arguments import Commands, add_command, add_json, add_upload

if TYPE_CHECKING:
    from jp_train.tools.importers.entries import Reader
    from jp_train.tools.importers.records import Columns
    from jp_train.types import Kind

DETAILS = """\
Reads data as it is published and writes the tar shards that training reads, with a manifest.json and a skipped.jsonl
(every entry that was left out, and why) beside them. JSON lines, JSON arrays and compression (gzip, bzip2, xz, zstd)
are known by content, whatever a file's name. Run the same command again after a kill or a full disk: it goes
on, without a duplicate or a hole. The shards depend on the source and the options only, not on --processes.

  jp-train data import imagenet      ILSVRC/Data/CLS-LOC/train            shards/imagenet
  jp-train data import coco          annotations/captions_train2017.json  shards/coco --images train2017 \\
                                                                          --kind understanding
  jp-train data import conversations llava_v1_5_mix665k.json              shards/llava --images llava \\
                                                                          --text-out shards/llava_text
  jp-train data import pairs         'laion/*.jsonl'                      shards/laion --images laion \\
                                                                          --kind generation
  jp-train data import text          'c4/*.jsonl.gz'                      shards/c4
  jp-train data import parquet       llava_onevision/chartqa              shards/chartqa --kind understanding
  jp-train data import webdataset    'downloaded/{00000..00127}.tar'      shards/laion2b --kind generation

`jp-train data import FORMAT --help` describes one format. Try --dry-run first."""

KINDS = ("understanding", "generation")


def register(tools: Commands) -> None:
    parser = add_command(
        tools,
        "import",
        "turn published data into shards: folders, JSON, CSV, text, Parquet, other WebDatasets",
        DETAILS,
    )
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")
    for add_layout in LAYOUTS:
        add_layout(formats)


AddLayout = Callable[[Commands], None]
LAYOUTS: list[AddLayout] = []
"""Every layout in the order of the help: functions below that are marked with @layout."""


def layout(add_layout: AddLayout) -> AddLayout:
    """A function that adds the subparser of a layout; its reader is imported only when it runs, so that help is
    quick."""
    LAYOUTS.append(add_layout)
    return add_layout


@layout
def _imagenet(formats: Commands) -> None:
    details = """\
SOURCE/CLASS/image: each image becomes a generation sample whose caption is the name of its class. The recipe's
`class_prompt` shapes it in training (first_lemma: "tench, Tinca tinca" -> "tench")."""
    parser = _format(
        formats, "imagenet", "a folder with one folder a class -> generation", details, "folder of class folders"
    )
    parser.add_argument(
        "--class-names",
        metavar="FILE",
        type=Path,
        help="lines 'FOLDER NAME' (Kaggle's LOC_synset_mapping.txt, looked for in SOURCE or up to 4 folders above) "
        "or a .json; without one, the folders' names",
    )
    _decoding(parser)

    def reader(arguments: argparse.Namespace) -> Reader:
        from jp_train.tools.importers.imagenet import ImageNetReader

        return ImageNetReader(source=arguments.source, class_names=arguments.class_names)

    _run(parser, reader)


@layout
def _coco(formats: Commands) -> None:
    details = """\
One JSON with "images" (id, file_name) and "annotations" (image_id, caption). It is loaded whole: about 6 times its
size in memory."""
    parser = _format(formats, "coco", "COCO captions -> understanding or generation", details, "captions JSON")
    _images(parser, required=True)
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument(
        "--per",
        choices=("caption", "image"),
        default="caption",
        help="a sample for every caption (default: nothing is lost, an image with 5 captions is stored 5 times), "
        "or for every image, with its first caption",
    )
    _decoding(parser)

    def reader(arguments: argparse.Namespace) -> Reader:
        from jp_train.tools.importers.coco import CocoReader

        return CocoReader(source=arguments.source, images=arguments.images, kind=_kind(arguments), per=arguments.per)

    _run(parser, reader)


@layout
def _conversations(formats: Commands) -> None:
    details = """\
[{"id": ..., "image": "coco/000001.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
{"from": "gpt", "value": "A cat."}]}, ...] as a JSON array (read as a stream) or a record a line; also "messages" with
role and content, "texts" of user and assistant, and several images: "images": ["a.jpg", "b.jpg"], each at its <image>
or all before the first question. data_recipes/README.md lists every form that is read. Entries without an image are
skipped and counted, or with --text-out written as text shards, unless a field or a question shows that they are about
an image, a video or sound that is not read."""
    parser = _format(
        formats,
        "conversations",
        "LLaVA / ShareGPT conversations with images -> understanding",
        details,
        "JSON, JSONL, a folder or glob of them",
    )
    _images(parser, required=True)
    parser.add_argument(
        "--text-out",
        metavar="FOLDER",
        type=Path,
        help="write conversations without an image there, as shards of kind text",
    )
    _columns(parser, image="image", conversations="conversations")
    _decoding(parser)
    _run(parser, lambda a: _records(a, "conversations", "understanding"))


@layout
def _pairs(formats: Commands) -> None:
    details = """\
One image and one text a record: JSON lines, a JSON array, .csv or .tsv with a header line, also compressed. With
--question-column, understanding samples ask that column and answer with --caption-column."""
    parser = _format(
        formats, "pairs", "image-text JSONL or CSV -> understanding or generation", details, "file, folder or glob"
    )
    _images(parser, required=False, default="the folder of SOURCE")
    parser.add_argument("--kind", choices=KINDS, required=True)
    _columns(parser, image="image", caption="caption", question=None)
    _decoding(parser)
    _run(parser, lambda a: _records(a, "pairs", a.kind))


@layout
def _text(formats: Commands) -> None:
    details = """\
Records (JSON lines or a JSON array, whatever the name; .csv, .tsv): the column "text", or "conversations" of a
conversation. Any other text in UTF-8: a file is a document, or --document paragraph or line. Binary files are
refused."""
    parser = _format(formats, "text", "text JSONL or plain text files -> text", details, "file, folder or glob")
    parser.add_argument(
        "--document",
        choices=("file", "paragraph", "line"),
        default="file",
        help="what a document is in plain text (default: file)",
    )
    parser.set_defaults(shard_samples=100_000)
    _columns(parser, text="text", conversations="conversations")

    def reader(arguments: argparse.Namespace) -> Reader:
        from jp_train.tools.importers.documents import text_reader

        return text_reader(arguments.source, arguments.document, _named_columns(arguments))

    _run(parser, reader)


@layout
def _parquet(formats: Commands) -> None:
    details = """\
Rows with an image as bytes (Hugging Face's {bytes, path}, or binary) or as a path inside --images, or rows of text.
Needs pyarrow: pip install 'jp_train[parquet]'. A process reads one row group at a time."""
    parser = _format(
        formats, "parquet", "Parquet with image bytes or text -> any kind", details, ".parquet file, folder or glob"
    )
    parser.add_argument("--kind", choices=(*KINDS, "text"), required=True)
    _images(parser, required=False, default="none: images come as bytes")
    _columns(parser, image="image", caption="caption", question=None, text="text", conversations="conversations")
    _decoding(parser)

    def reader(arguments: argparse.Namespace) -> Reader:
        from jp_train.tools.importers.parquet import ParquetReader

        columns = _named_columns(arguments)
        return ParquetReader(source=arguments.source, images=arguments.images, kind=_kind(arguments), columns=columns)

    _run(parser, reader)


@layout
def _webdataset(formats: Commands) -> None:
    details = """\
Shards that already exist are validated and indexed in place; OUT gets the reports. Compressed tars (.gz, .bz2, .xz)
are written again as plain ones into OUT. 'pipe:COMMAND' (braces work: 'pipe:aws s3 cp s3://bucket/{000..127}.tar -')
needs --allow-pipe; the command runs without a shell, and its tar stream becomes a plain shard in OUT."""
    parser = add_command(formats, "webdataset", "an existing WebDataset -> validated, indexed, plain", details)
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="shards as in a recipe (braces, glob, folder, URL of http, s3, gs, az or hf), or pipe:COMMAND",
    )
    parser.add_argument(
        "out", metavar="OUT", type=Path, help="folder for reports, and for shards that must be written again"
    )
    parser.add_argument("--kind", choices=(*KINDS, "text"), required=True, help="what the samples are checked as")
    parser.add_argument("--allow-pipe", action="store_true", help="run the commands of a pipe: source")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, help="tars at a time (default: all cores)"
    )
    parser.add_argument("--dry-run", action="store_true", help="read up to 200 samples, write nothing")
    add_json(parser)
    parser.set_defaults(run=run_webdataset)


def _format(formats: Commands, name: str, summary: str, details: str, source: str) -> argparse.ArgumentParser:
    parser = add_command(formats, name, summary, details)
    parser.add_argument("source", metavar="SOURCE", type=Path, help=source)
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for the shards, manifest.json and skipped.jsonl")
    parser.add_argument(
        "--shard-size",
        metavar="MIB",
        type=float,
        default=256,
        help="a shard is closed before it grows past this (default: 256)",
    )
    parser.add_argument(
        "--shard-samples",
        metavar="N",
        type=int,
        default=10_000,
        help="... or holds more samples than this (default: %(default)s)",
    )
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, help="processes that make samples (default: all cores)"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="read the listing and up to 200 images spread over it, say what would be written, write nothing; "
        "exit status 3 where no entry would become a sample",
    )
    add_upload(parser)
    add_json(parser)
    return parser


def _images(parser: argparse.ArgumentParser, *, required: bool, default: str = "") -> None:
    note = "" if required else f" (default: {default})"
    parser.add_argument(
        "--images",
        metavar="FOLDER",
        type=Path,
        required=required,
        help=f"paths of images start here and must stay inside{note}",
    )


def _decoding(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--decode",
        action="store_true",
        help="decode every image whole: finds truncated ones, about 10 times slower (default: headers)",
    )
    parser.add_argument(
        "--max-image-pixels",
        metavar="N",
        type=int,
        default=100_000_000,
        help="reject larger images (default: 100000000)",
    )


def _columns(parser: argparse.ArgumentParser, **defaults: str | None) -> None:
    for name, default in defaults.items():
        parser.add_argument(
            f"--{name}-column",
            metavar="NAME",
            default=default,
            help=f"column that holds the {name} (default: {default or 'none'})",
        )


def _named_columns(arguments: argparse.Namespace) -> Columns:
    from jp_train.tools.importers.records import Columns

    named = {
        name.removesuffix("_column"): value
        for name, value in vars(arguments).items()
        if name.endswith("_column") and value is not None
    }
    return Columns(**named)


def _records(arguments: argparse.Namespace, name: str, kind: str) -> Reader:
    from jp_train.tools.importers.records import record_reader

    return record_reader(name, arguments.source, arguments.images, kind, _named_columns(arguments))


def _kind(arguments: argparse.Namespace) -> Kind:
    from jp_train.types import Kind

    return Kind(arguments.kind)


def _run(parser: argparse.ArgumentParser, reader: Callable[[argparse.Namespace], Reader]) -> None:
    parser.set_defaults(run=run, reader=reader, text_out=None, decode=False, max_image_pixels=100_000_000)


def run(arguments: argparse.Namespace) -> int:
    from jp_train.tools.importers.command import import_command
    from jp_train.tools.importers.run import ImportSettings

    settings = ImportSettings(
        out=arguments.out,
        text_out=arguments.text_out,
        shard_mib=arguments.shard_size,
        shard_samples=arguments.shard_samples,
        processes=arguments.processes,
        decode=arguments.decode,
        max_image_pixels=arguments.max_image_pixels,
    )
    summary, text = import_command(
        arguments.reader(arguments), settings, dry_run=arguments.dry_run, upload=arguments.upload
    )
    return _printed(summary, text, arguments)


def run_webdataset(arguments: argparse.Namespace) -> int:
    from jp_train.tools.importers.command import import_tars_command

    summary, text = import_tars_command(
        arguments.source,
        arguments.out,
        _kind(arguments),
        processes=arguments.processes,
        allow_pipe=arguments.allow_pipe,
        dry_run=arguments.dry_run,
    )
    return _printed(summary, text, arguments)


def _printed(summary: dict[str, Any], text: str, arguments: argparse.Namespace) -> int:
    print(json.dumps(summary) if arguments.json else text)
    if arguments.json and summary.get("warning"):
        print(summary["warning"], file=sys.stderr)
    return 3 if summary.get("stops") else 0
