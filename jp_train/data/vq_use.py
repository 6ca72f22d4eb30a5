"""Which stored VQ ids a run uses (`data.vq_ids`), decided once, before the first row: ids of another VQ are an error.

Ids come from `jp-train data encode-images` (vq_ids.py), or are `.vq.npy` members of the shards, whose fingerprint
stands in the `manifest.json` of their folder: {"vq": {"fingerprint": "..."}}.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from jp_train.config.choices import Crop, VqIds
from jp_train.config.schema import DataConfig
from jp_train.data.field_map import IMAGE_EXTENSIONS, VQ_EXTENSION
from jp_train.data.index import SourceIndex
from jp_train.data.shards import Shard, is_url
from jp_train.data.sidecar import load_members, member_extensions
from jp_train.data.vq_ids import REMEDY, IdsManifest, IdsRecipe, load_manifest, stored_fingerprints
from jp_train.errors import DataError
from jp_train.types import Kind

_NAMED = 3


def use_stored_ids(data: DataConfig, indexes: Sequence[SourceIndex], recipe: IdsRecipe | None) -> list[SourceIndex]:
    """The indexes with the ids that rows are to be made of; `recipe` is that of the run's own VQ (None: no generation
    source).

    Raises: DataError: for ids of another VQ or transform, of a shard that has changed, or of unknown origin, and with
    `require` for shards without ids; the message has the shard, what was found and expected, and the remedy.
    """
    used = []
    for index in indexes:
        if index.kind is not Kind.GENERATION:
            used.append(index)
            continue
        assert recipe is not None, "generation sources need the fingerprint of the run's VQ"
        used.append(_use(data, index, recipe))
    return used


def describe_use(index: SourceIndex) -> str:
    """A few words about where the ids of a generation source come from."""
    locator = index.locator
    stored, shards = len(locator.shards_with_ids), len(locator.shards)
    where = f"stored for {stored} of {shards} shards" if stored else "no stored ids"
    return (
        f"{index.name}: "
        f"{where}{'' if stored == shards else ', the other images are encoded in training' if stored else ''}"
    )


def ids_summary(index: SourceIndex) -> dict[str, int]:
    """{fingerprint: number of shards of the source that have ids with it}; nothing is compared."""
    counts: dict[str, int] = {}
    for prints in stored_fingerprints(index.shards).values():
        for fingerprint in prints:
            counts[fingerprint] = counts.get(fingerprint, 0) + 1
    return counts


def _use(data: DataConfig, index: SourceIndex, recipe: IdsRecipe) -> SourceIndex:
    centre = data.crop is Crop.centre
    manifests: dict[int, IdsManifest] = {}
    # stored ids are of the image with the usual name
    if centre and not index.locator.fields.image and data.vq_ids is not VqIds.off:
        manifests = _current_manifests(index, recipe)
    embedded: list[Shard] = []
    without: list[Shard] = []
    for number, shard in enumerate(index.shards):
        manifest = manifests.get(number)
        if manifest is None or manifest.without_picture:
            counts = _embedded(shard)
            needed = counts.without_picture if not centre or data.vq_ids is VqIds.off else counts.embedded
            embedded += [shard] if needed else []
            if manifest is None and counts.images_without_ids:
                without.append(shard)
    if embedded:
        _check_embedded(data.vq_ids, index.name, embedded, recipe)
    if data.vq_ids is VqIds.require and without:
        raise DataError(
            f"data.vq_ids=require, but {len(without)} of {len(index.shards)} shards of source {index.name!r} have no "
            f"VQ ids with fingerprint {recipe.fingerprint}: {_names(without)}; run `jp-train data encode-images` with "
            "this configuration"
        )
    locator = replace(
        index.locator,
        ids_fingerprint=recipe.fingerprint if manifests else "",
        shards_with_ids=frozenset(manifests),
        embedded_ids=data.vq_ids is not VqIds.off,
    )
    return replace(index, locator=locator)


def _current_manifests(index: SourceIndex, recipe: IdsRecipe) -> dict[int, IdsManifest]:
    """Manifests with this run's fingerprint by shard number; other ids, or ids of other content, are an error."""
    manifests: dict[int, IdsManifest] = {}
    others: list[Shard] = []
    for number, shard in enumerate(index.shards):
        manifest = load_manifest(shard, recipe.fingerprint)
        if manifest is None:
            others.append(shard)
        elif not manifest.belongs_to(shard):
            raise DataError(
                f"the VQ ids of shard {shard.path} (source {index.name!r}) were made from a file of {manifest.size} "
                f"bytes with stamp {manifest.stamp}, it now has {shard.size} bytes and stamp {shard.stamp}; run "
                "`jp-train data encode-images` again (images that are still the same are recognised and not "
                "encoded again), or set data.vq_ids=off"
            )
        else:
            manifests[number] = manifest
    foreign = stored_fingerprints(others)
    for shard in others:
        if foreign[shard.path]:
            raise DataError(_foreign(index.name, shard, foreign[shard.path][0], recipe))
    return manifests


def _foreign(source: str, shard: Shard, fingerprint: str, recipe: IdsRecipe) -> str:
    other = load_manifest(shard, fingerprint)
    stored, ours = asdict(other.recipe) if other is not None else {}, asdict(recipe)
    details = "; ".join(
        f"{name} is {value}, this run's is {ours[name]}" for name, value in stored.items() if value != ours[name]
    )
    return (
        f"shard {shard.path} (source {source!r}) has VQ ids with fingerprint {fingerprint}, this run's VQ and "
        f"transform have {recipe.fingerprint}{f' ({details})' if details else ''}: its ids mean other images; "
        f"{REMEDY}"
    )


@dataclass(frozen=True, slots=True)
class _Counts:
    embedded: int
    """Samples with a `.vq.npy` member."""
    without_picture: int
    """Those of them that have no image."""
    images_without_ids: int
    """Samples with an image and no `.vq.npy`."""


def _embedded(shard: Shard) -> _Counts:
    """Counted from the members sidecar; only shards with such members have it read whole."""
    extensions = member_extensions(shard)
    if extensions is not None and VQ_EXTENSION not in extensions:
        return _Counts(0, 0, int(any(extension in IMAGE_EXTENSIONS for extension in extensions)))
    members = load_members(shard)
    if members is None:
        raise DataError(f"the index of shard {shard.path} is gone or stale; start again so that it is rebuilt")
    sample = np.repeat(np.arange(len(members.keys)), np.diff(members.member_start))
    has = {}
    for what, extensions in (("ids", (VQ_EXTENSION,)), ("image", IMAGE_EXTENSIONS)):
        codes = [code for code, extension in enumerate(members.extensions) if extension in extensions]
        has[what] = np.zeros(len(members.keys), bool)
        has[what][sample[np.isin(members.extension, codes)]] = True
    ids, image = has["ids"], has["image"]
    return _Counts(int(ids.sum()), int((ids & ~image).sum()), int((image & ~ids).sum()))


def _check_embedded(mode: VqIds, source: str, shards: Sequence[Shard], recipe: IdsRecipe) -> None:
    if mode is VqIds.off:
        raise DataError(
            f"data.vq_ids=off, but shards of source {source!r} have samples with .{VQ_EXTENSION} and no image that "
            f"could be encoded: {_names(shards)}; take the source out, or set data.vq_ids=auto"
        )
    known: dict[Path, str] = {}
    unknown: list[Shard] = []
    for shard in shards:
        folder = Path(shard.path).parent
        if not is_url(shard.path) and folder not in known:
            known[folder] = _folder_fingerprint(folder / "manifest.json")
        fingerprint = "" if is_url(shard.path) else known[folder]
        if not fingerprint:
            unknown.append(shard)
        elif fingerprint != recipe.fingerprint:
            raise DataError(
                f"{folder / 'manifest.json'} says that the .{VQ_EXTENSION} members of {shard.name} (source "
                f"{source!r}) have fingerprint {fingerprint}, this run's VQ and transform have {recipe.fingerprint}: "
                f"the ids mean other images; {REMEDY}"
            )
    if unknown and mode is not VqIds.trust:
        raise DataError(
            f"shards of source {source!r} have .{VQ_EXTENSION} members of unknown origin: {_names(unknown)}. This "
            f"run's VQ and transform have fingerprint {recipe.fingerprint}: if the ids were made with them, write "
            f'{{"vq": {{"fingerprint": "{recipe.fingerprint}"}}}} into the manifest.json of their folder, or set '
            f"data.vq_ids=trust; otherwise {REMEDY}"
        )


def _folder_fingerprint(path: Path) -> str:
    """The fingerprint that a folder's manifest.json states, empty without one. Raises DataError for a manifest that
    cannot be read."""
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f'{path} cannot be read: {error}; it should hold {{}} or {{"vq": {{"fingerprint": "..."}}}}'
        ) from None
    vq = manifest.get("vq") if isinstance(manifest, dict) else None
    return str(vq.get("fingerprint") or "") if isinstance(vq, dict) else ""


def _names(shards: Sequence[Shard]) -> str:
    more = f" and {len(shards) - _NAMED} more" if len(shards) > _NAMED else ""
    return ", ".join(shard.path for shard in shards[:_NAMED]) + more
