"""What one host sees of a run's data: names and sizes of the shards, what is indexed, one sample of every source read,
tokenizer and starting weights.

A digest is equal on two hosts when they see the same files; times are left out, because copies have their own. Large
files count with name and size.
"""

from __future__ import annotations

import glob
import hashlib
import os
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jp_train.cluster.facts import loaded_config
from jp_train.config import RunConfig
from jp_train.config.schema import SourceConfig
from jp_train.data.shards import Shard, ShardReader, ShardWindow, expand_shards, is_url
from jp_train.data.sidecar import sidecar_places
from jp_train.data.tar_headers import TarFault, tar_members
from jp_train.errors import DataError, JpTrainError

READ_WHOLE = 32 << 20
"""Bytes of a tokenizer's file up to which its contents count too; weights count with names and sizes."""
LOOKED_AT = 64
"""Shards of a source whose size and index are looked at, evenly spread; the names of all count."""
HEADERS_READ = 64
TABLE = ".jp-tokens-"


def data_facts(config: str, overrides: Sequence[str], number: int) -> dict[str, Any]:
    """`sources`: {name: facts} and `files`: {config key: facts}, each with `digest`, or `error`. Host `number` reads
    a sample of another shard than its neighbours. Raises ConfigError."""
    cfg = loaded_config(config, tuple(overrides))
    sources = {**cfg.data.sources, **{f"{name} (held out)": source for name, source in cfg.validation.sources.items()}}
    # one try: a source that answers only now and then is worth knowing beforehand
    reader = ShardReader(1, index_dir=cfg.data.index_dir)
    try:
        return {
            "sources": {
                name: _attempt(partial(source_facts, source, cfg.data.root, number, reader))
                for name, source in sources.items()
            },
            "files": {
                key: _attempt(partial(tree_facts, path, READ_WHOLE if key.startswith("tokenizer") else 0))
                for key, path in _inputs(cfg).items()
            },
        }
    finally:
        reader.close()


def source_facts(source: SourceConfig, root: str, number: int, reader: ShardReader) -> dict[str, Any]:
    """Shards of a source by name and size, their index, and the bytes of one sample that was read.

    Raises DataError (missing, unreadable or damaged shard) and ConfigError.
    """
    paths = expand_shards(source.shards, root)
    step = max(1, len(paths) // LOOKED_AT)
    shards = [reader.stat(path) for path in paths[::step][:LOOKED_AT]]
    names = "\0".join(os.path.basename(path) for path in paths)
    sizes = "\0".join(f"{shard.name} {shard.size}" for shard in shards)
    return {
        "shards": len(paths),
        "digest": _digest(names, sizes),
        "index": index_digests(shards),
        "read": read_sample(shards[number % len(shards)], reader),
    }


def index_digests(shards: Sequence[Shard]) -> dict[str, str]:
    """{which tokenizer and settings: digest of the token tables}, for those that all of `shards` have (beside them, or
    in the cache of this host).

    The digest is made of the check sums that the tables store, so that nothing is read.
    """
    tables: dict[str, list[str]] = {}
    for shard in shards:
        for which, table in _tables(shard).items():
            tables.setdefault(which, []).append(f"{shard.name} {table}")
    return {which: _digest(*sums) for which, sums in tables.items() if len(sums) == len(shards)}


def _tables(shard: Shard) -> dict[str, str]:
    tables: dict[str, str] = {}
    for prefix in reversed(sidecar_places(shard, TABLE)):  # what lies beside the shard is read first
        for path in sorted(prefix.parent.glob(f"{glob.escape(prefix.name)}*.npz")) if prefix.parent.is_dir() else ():
            try:
                with zipfile.ZipFile(path) as file:
                    # not of meta.npy, which has the shard's time
                    parts = [part for part in file.infolist() if part.filename != "meta.npy"]
            except (OSError, zipfile.BadZipFile):
                continue  # a damaged index is built again
            which = path.name.removeprefix(prefix.name).removesuffix(".npz")
            tables[which] = " ".join(f"{part.filename} {part.CRC:08x}" for part in parts)
    return tables


def read_sample(shard: Shard, reader: ShardReader) -> int:
    """Bytes of the first sample of a shard, all of its files, really read. Raises DataError when it cannot be."""
    window = ShardWindow(reader, shard, 1 << 16)
    total, key = 0, None
    try:
        for count, member in enumerate(tar_members(window.up_to, shard.size)):
            if not member.file:
                continue
            this = member.name.rpartition("/")[2].partition(".")[0]
            if (key is not None and this != key) or count >= HEADERS_READ:
                break
            key = this
            total += len(reader.read(shard, member.offset, member.size))
    except TarFault as fault:
        raise DataError(f"shard {shard.path} ({fault.fault} at byte {fault.offset}): {fault.reason}") from fault
    if key is None:
        raise DataError(f"shard {shard.path} holds no file")
    return total


def tree_facts(path: str, read_up_to: int) -> dict[str, Any]:
    """Digest of a file or folder: names and sizes, and the contents of files of at most `read_up_to` bytes. Raises
    OSError."""
    root = Path(path)
    files = [root] if root.is_file() else sorted(file for file in root.rglob("*") if file.is_file())
    if not files:
        raise FileNotFoundError(2, "does not exist" if not root.exists() else "holds no file", path)
    parts = []
    for file in files:
        size = file.stat().st_size
        inside = hashlib.sha256(file.read_bytes()).hexdigest() if size <= read_up_to else ""
        parts.append(f"{file.relative_to(root)} {size} {inside}")
    return {"path": path, "files": len(files), "digest": _digest(*parts)}


def _inputs(cfg: RunConfig) -> dict[str, str]:
    """What every rank reads besides the data: {configuration key: path}."""
    given = {"tokenizer.path": cfg.tokenizer.path, "model.init_from": cfg.model.init_from}
    given |= {f"model.init_parts.{name}": path for name, path in vars(cfg.model.init_parts).items()}
    return {key: path for key, path in given.items() if path and not is_url(path)}


def _attempt(find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return find()
    except (JpTrainError, OSError) as error:
        return {"error": str(error)}


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode(errors="surrogateescape")).hexdigest()[:16]
