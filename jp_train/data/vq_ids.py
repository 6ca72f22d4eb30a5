"""VQ ids of a shard's images, stored beside the shard, so that training neither reads nor decodes a generation
image.

    X.tar.jp-vq-<print>.npy    uint16 [N, S]: the ids of each of the shard's N samples; a sample without ids has 65535
                               everywhere
    X.tar.jp-vq-<print>.json   what they were made with, and why images have none; written last: its presence says
                               that the ids
                               are complete

`<print>` starts the fingerprint of VQ weights and image transform, so ids of several tokenizers lie beside each
other. They are ids of the centre crop. The array is plain, so a row is one byte range; it is read through the
ShardReader, which retries and names an I/O error, where a mapped file would kill the process.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from jp_train.config.choices import ImageDecode
from jp_train.data.shards import Shard, ShardReader
from jp_train.data.sidecar import sidecar_places, write_sidecar, written_places
from jp_train.errors import DataError

FORMAT = 1
"""Raise it when the layout of the two files changes: older ids are then encoded again."""
NO_IDS = 65535
"""Fills the row of a sample without ids."""
REMEDY = (
    "run `jp-train data encode-images` with this configuration, or set data.vq_ids=off to encode the images in training"
)

_MARK = ".jp-vq-"
_FINGERPRINT = re.compile(r"[0-9a-f]{32}")
_PLAIN_FIELDS = (
    "size",
    "stamp",
    "samples",
    "slots",
    "codebook_size",
    "without_picture",
    "pictures_sha256",
    "ids_sha256",
)
_HEADER_BYTES = 128
"""Of a two-dimensional .npy as numpy writes it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IdsRecipe:
    """Everything that determines an id, and whether an image is usable. `vq`: VQTokenizer.fingerprint()."""

    vq: str
    transform: int
    image_side: int
    max_image_pixels: int
    decode: str = ImageDecode.exact.value
    """`data.image_decode`; a manifest without it was made with `exact`."""

    @property
    def fingerprint(self) -> str:
        """Hex digest of it all, for the centre crop."""
        parts: tuple[str, ...] = (
            "janus-ids/1",
            self.vq,
            str(self.transform),
            "crop=centre",
            str(self.image_side),
            str(self.max_image_pixels),
        )
        parts += () if self.decode == ImageDecode.exact.value else (f"decode={self.decode}",)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class StoredIds:
    """The stored ids of one shard. `unusable` maps keys of images that cannot be used to the reason."""

    file: Shard
    samples: int
    slots: int
    codebook_size: int
    unusable: Mapping[str, str]
    reader: ShardReader

    def row(self, number: int) -> np.ndarray | None:
        """The ids uint16 [S] of sample `number` of the shard; None when it has none: an unusable image, or no
        image.

        Raises DataError when they cannot be read, or are damaged.
        """
        if not 0 <= number < self.samples:
            raise DataError(
                f"{self.file.path} has ids of {self.samples} samples, number {number} is asked for: the shard is "
                "another one"
            )
        row = np.frombuffer(
            self.reader.read(self.file, _HEADER_BYTES + number * self.slots * 2, self.slots * 2), np.uint16
        )
        highest = int(row.max())
        if highest < self.codebook_size:
            return row
        if (row == NO_IDS).all():
            return None
        raise DataError(
            f"{self.file.path}: sample {number} has id {highest}, the codebook has {self.codebook_size}: damaged; "
            f"delete it, then {REMEDY}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class IdsManifest:
    """What stands beside stored ids. `size` and `stamp` are those of the shard they were made from;
    `pictures_sha256` is over keys and image bytes in order, so that a copied shard is recognised;
    `without_picture` counts samples that have no image to encode."""

    recipe: IdsRecipe
    size: int
    stamp: str
    samples: int
    slots: int
    codebook_size: int
    without_picture: int
    pictures_sha256: str
    ids_sha256: str
    unusable: tuple[tuple[str, str], ...]
    ids_path: Path

    def belongs_to(self, shard: Shard) -> bool:
        """Whether the shard is still the file that was encoded."""
        return (self.size, self.stamp) == (shard.size, shard.stamp)

    @property
    def ids_bytes(self) -> int:
        """The size that the ids file must have."""
        return _HEADER_BYTES + self.samples * self.slots * 2


def load_manifest(shard: Shard, fingerprint: str) -> IdsManifest | None:
    """The manifest with this fingerprint, preferably one that belongs to the shard's present content; None without a
    readable one."""
    manifests: list[IdsManifest] = []
    for path in sidecar_places(shard, _suffix(fingerprint, "json")):
        try:
            stored = json.loads(path.read_bytes())
            if stored["format"] != FORMAT or stored["fingerprint"] != fingerprint:
                continue
            fields = {name: stored[name] for name in _PLAIN_FIELDS}
            recipe = IdsRecipe(**stored["recipe"])
            unusable = tuple((str(key), str(reason)) for key, reason in stored["unusable"])
            if (
                not _has_types(IdsManifest, fields)
                or not _has_types(IdsRecipe, stored["recipe"])
                or recipe.fingerprint != fingerprint
            ):
                continue
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue  # absent or damaged: encoded again
        manifests.append(IdsManifest(recipe=recipe, unusable=unusable, ids_path=path.with_suffix(".npy"), **fields))
    return next((manifest for manifest in manifests if manifest.belongs_to(shard)), manifests[0] if manifests else None)


def open_ids(shard: Shard, fingerprint: str, reader: ShardReader) -> StoredIds | None:
    """The stored ids of a shard, None when there are none with this fingerprint that belong to its present content.

    Raises DataError when a manifest says that they are complete, but they are missing or of another shape.
    """
    manifest = load_manifest(shard, fingerprint)
    if manifest is None or not manifest.belongs_to(shard):
        return None
    problem = ids_problem(manifest, reader)
    if problem:
        raise DataError(f"{problem}; {REMEDY}")
    return StoredIds(
        file=reader.stat(str(manifest.ids_path)),
        samples=manifest.samples,
        slots=manifest.slots,
        codebook_size=manifest.codebook_size,
        unusable=dict(manifest.unusable),
        reader=reader,
    )


def ids_problem(manifest: IdsManifest, reader: ShardReader, *, digest: bool = False) -> str:
    """What is wrong with the ids file of a manifest, empty when nothing is. `digest` reads it whole and compares its
    SHA-256."""
    path = manifest.ids_path
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return f"{path} is missing, though its manifest says that it is complete"
    if size != manifest.ids_bytes:
        return f"{path} has {size} bytes, its manifest says {manifest.ids_bytes}: it was damaged"
    file = reader.stat(str(path))
    if reader.read(file, 0, _HEADER_BYTES) != _header(manifest.samples, manifest.slots):
        return f"{path} does not begin like uint16 [{manifest.samples}, {manifest.slots}]: it was damaged"
    if digest and hashlib.sha256(reader.read(file, 0, size)).hexdigest() != manifest.ids_sha256:
        return f"{path} has another SHA-256 than its manifest says: it was damaged"
    return ""


def store_ids(
    shard: Shard,
    recipe: IdsRecipe,
    ids: np.ndarray,
    *,
    codebook_size: int,
    without_picture: int,
    pictures_sha256: str,
    unusable: Sequence[tuple[str, str]],
) -> IdsManifest:
    """Write the ids uint16 [N, S] of a shard, then the manifest. Raises DataError when neither place can be written."""
    samples, slots = ids.shape
    data = _header(samples, slots) + np.ascontiguousarray(ids, "<u2").tobytes()
    for path in written_places(shard, _suffix(recipe.fingerprint, "json")):
        with contextlib.suppress(OSError):
            path.unlink()  # an older manifest must not vouch for new ids
    path = write_sidecar(shard, _suffix(recipe.fingerprint, "npy"), lambda file: file.write(data))
    manifest = IdsManifest(
        recipe=recipe,
        size=shard.size,
        stamp=shard.stamp,
        samples=samples,
        slots=slots,
        codebook_size=codebook_size,
        without_picture=without_picture,
        pictures_sha256=pictures_sha256,
        ids_sha256=hashlib.sha256(data).hexdigest(),
        unusable=tuple(unusable),
        ids_path=path,
    )
    _store_manifest(shard, manifest)
    return manifest


def restamp_ids(shard: Shard, manifest: IdsManifest) -> None:
    """Make stored ids valid for `shard`, whose images are those that were encoded although its size or stamp
    differs."""
    _store_manifest(shard, replace(manifest, size=shard.size, stamp=shard.stamp))


def stored_fingerprints(shards: Iterable[Shard]) -> dict[str, list[str]]:
    """For each shard path the fingerprints of all stored ids, whatever VQ they belong to; folders are listed once."""
    listings: dict[Path, dict[str, list[Path]]] = {}
    fingerprints: dict[str, list[str]] = {}
    for shard in shards:
        prints: list[str] = []
        for place in sidecar_places(shard, ""):
            if place.parent not in listings:
                listings[place.parent] = _manifests(place.parent)
            for path in listings[place.parent].get(place.name, []):
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
                    fingerprint = json.loads(path.read_bytes())["fingerprint"]
                    if _FINGERPRINT.fullmatch(fingerprint):  # part of a file's name
                        prints.append(fingerprint)
        fingerprints[shard.path] = list(dict.fromkeys(prints))
    return fingerprints


def _has_types(cls: type, values: Mapping[str, object]) -> bool:
    """Whether the values from a foreign file have the types (int, str) of the fields of `cls`."""
    types = {"int": int, "str": str}
    return all(type(value) is types[str(cls.__annotations__[name])] for name, value in values.items())


def _manifests(folder: Path) -> dict[str, list[Path]]:
    """The manifests of a folder by the name of their shard."""
    manifests: dict[str, list[Path]] = {}
    try:
        names = sorted(entry.name for entry in os.scandir(folder))
    except OSError:
        return manifests
    for name in names:
        shard, mark, _ = name.rpartition(_MARK)
        if mark and name.endswith(".json") and not name.startswith("."):
            manifests.setdefault(shard, []).append(folder / name)
    return manifests


def _store_manifest(shard: Shard, manifest: IdsManifest) -> None:
    fields = {name: getattr(manifest, name) for name in _PLAIN_FIELDS}
    document = {
        "format": FORMAT,
        "fingerprint": manifest.recipe.fingerprint,
        "recipe": asdict(manifest.recipe),
        "crop": "centre",
        **fields,
        "unusable": manifest.unusable,
    }
    text = json.dumps(document, indent=1).encode()
    write_sidecar(shard, _suffix(manifest.recipe.fingerprint, "json"), lambda file: file.write(text))


def _suffix(fingerprint: str, ending: str) -> str:
    return f"{_MARK}{fingerprint[:12]}.{ending}"


def _header(samples: int, slots: int) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<u2", "fortran_order": False, "shape": (samples, slots)})
    header = file.getvalue()
    assert len(header) == _HEADER_BYTES, f"numpy writes a header of {len(header)} bytes"
    return header
