"""The summary of an import: a table, skipped entries by reason, the lines for a recipe, and the next commands."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jp_train.config.schema import DataConfig
from jp_train.files import read_json_lines
from jp_train.terminal import aligned, printable
from jp_train.tools.importers.entries import REASONS, REJECTED, left_out_text
from jp_train.tools.importers.manifest import SKIPPED, Manifest, OutputState
from jp_train.tools.importers.samples import MAIN

LOUD_SHARE = DataConfig.max_bad_share
"""An import that skips more of its entries than this says so in its last line."""
_EXAMPLES = 2
_WIDTH = 160


def summarise(manifest: Manifest, kind: str, source_keys: dict[str, Any], out: Path, seconds: float) -> dict[str, Any]:
    """The JSON object of an import that is complete."""
    sources = [
        {
            "name": Path(output.folder).name,
            "folder": output.folder,
            "spec": shard_spec(output),
            "samples": output.samples,
            "shards": len(output.shards),
            "bytes": output.size,
            **({"kind": kind, **source_keys} if name == MAIN else {"kind": "text"}),
        }
        for name, output in manifest.outputs.items()
        if output.shards
    ]
    return {
        "format": manifest.format,
        "source": manifest.source,
        "out": str(out.absolute()),
        "entries": manifest.counts["entries"],
        "samples": sum(source["samples"] for source in sources),
        "converted": manifest.counts["converted"],
        "skipped": manifest.skipped,
        "left_out": dict(manifest.left_out),
        "skipped_file": str(out.absolute() / SKIPPED),
        "sources": sources,
        "recipe": "\n".join(recipe_lines(sources)),
        "seconds": round(seconds, 1),
    }


def loss_text(summary: Mapping[str, Any], examples: Mapping[str, Sequence[str]]) -> str:
    """A warning where a larger share of the entries was skipped than training lets pass as bad by default
    (`data.max_bad_share`), with the most common reason; empty otherwise."""
    lost, entries = sum(summary["skipped"].values()), summary["entries"]
    if lost <= LOUD_SHARE * entries:
        return ""
    reason, count = max(summary["skipped"].items(), key=lambda item: item[1])
    example = f", as {examples[reason][0]}" if examples.get(reason) else ""
    then = (
        "the index leaves them out, and training refuses a source with a larger share than data.max_bad_share "
        f"({LOUD_SHARE:g})"
        if summary["format"] == "webdataset"
        else "the shards hold the rest only. If you need them, correct the source or the options and import into "
        "another folder"
    )
    return printable(
        f"WARNING: {lost:,} of {entries:,} entries ({100 * lost / entries:.3g} %) were skipped, {count:,} of them "
        f"for {reason} ({REASONS.get(reason, REJECTED)}){example}: {then}"
    )


def format_summary(summary: dict[str, Any], examples: dict[str, list[str]]) -> str:
    """The summary as text: in, out, skipped by reason with examples, recipe lines, next commands."""
    lost = sum(summary["skipped"].values())
    converted = f"{summary['converted']:,} images converted to PNG, " if summary["converted"] else ""
    lines = [
        f"import {summary['format']}: {summary['entries']:,} entries in, {summary['samples']:,} samples out, "
        f"{lost:,} skipped, "
        f"{converted}{summary['seconds']:.1f} s",
        *filter(None, [left_out_text(summary["left_out"])]),
        "",
        *aligned(
            [
                ("folder", "kind", "samples", "shards", "MiB"),
                *(
                    (
                        source["folder"],
                        source["kind"],
                        f"{source['samples']:,}",
                        f"{source['shards']:,}",
                        f"{source['bytes'] / 2**20:,.1f}",
                    )
                    for source in summary["sources"]
                ),
            ]
        ),
    ]
    if summary.get("taken"):
        places = ", ".join(f"{place} ({count:,})" for place, count in summary["taken"].items())
        lines += ["", f"texts: {places}"]
    if lost:
        lines += ["", f"skipped ({summary['skipped_file']} names every one):"]
        lines += skipped_lines(summary["skipped"], examples)
    lines += ["", "for the recipe:", summary["recipe"], "", "next, with a configuration that names this recipe:"]
    return "\n".join(
        [
            *lines,
            "  jp-train data index CONFIG     token counts beside the shards",
            "  jp-train data verify CONFIG    every sample, once",
            *(["", summary["warning"]] if summary.get("warning") else []),
        ]
    )


def skipped_lines(skipped: dict[str, int], examples: dict[str, list[str]]) -> list[str]:
    """One line a reason with its count and meaning, and its examples below it."""
    lines = []
    for reason, count in sorted(skipped.items(), key=lambda item: -item[1]):
        lines.append(f"  {count:>9,}  {reason}: {REASONS.get(reason, REJECTED)}")
        lines += [f"             e.g. {printable(example)}"[:_WIDTH] for example in examples.get(reason, [])]
    return lines


def skipped_examples(path: Path) -> dict[str, list[str]]:
    """The first entries of every reason in a skipped.jsonl."""
    examples: dict[str, list[str]] = {}
    if path.is_file():
        with open(path, encoding="utf-8") as file:
            for line in filter(None, read_json_lines(file)):
                messages = examples.setdefault(line["reason"], [])
                if len(messages) < _EXAMPLES:
                    messages.append(f"{line['name']}: {line['message']}")
    return examples


def recipe_lines(sources: Sequence[dict[str, Any]]) -> list[str]:
    """`data:` of a recipe with the given sources (`name`, `spec` as absolute shards, `kind`, perhaps
    `class_prompt` and `fields`), ready to paste."""
    lines = ["data:", "  sources:"]
    for source in sources:
        more = f", class_prompt: {source['class_prompt']}" if "class_prompt" in source else ""
        more += f", fields: {json.dumps(source['fields'])}" if source.get("fields") else ""
        lines.append(
            f"    {quoted(source['name'])}: {{kind: {source['kind']}, shards: "
            f'{json.dumps(source["spec"])}{more}, license: ""}}'
        )
    return lines


def shard_spec(output: OutputState) -> str:
    """The shards of a folder as a recipe names them: absolute, with a range in braces."""
    last = output.shards[-1].name.removesuffix(".tar")
    names = f"{{000000..{last}}}.tar" if len(output.shards) > 1 else output.shards[0].name
    return re.sub(r"([{}\\])", r"\\\1", output.folder) + "/" + names


def quoted(text: str) -> str:
    """Text as a YAML scalar."""
    return (
        text
        if re.fullmatch(r"[A-Za-z_/][A-Za-z0-9_./-]*", text) and text.lower() not in _WORDS
        else json.dumps(text, ensure_ascii=False)
    )


_WORDS = {"yes", "no", "on", "off", "true", "false", "null", "y", "n"}
