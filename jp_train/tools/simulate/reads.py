"""How many bytes training reads for a document, from the sidecars: only the fields that its kind needs count, or the
token ids in place of texts."""

from __future__ import annotations

import numpy as np

from jp_train.config.choices import VqIds
from jp_train.config.schema import DataConfig
from jp_train.data.field_map import VQ_EXTENSION
from jp_train.data.index import SourceIndex
from jp_train.data.sidecar import load_members
from jp_train.data.vq_use import ids_summary
from jp_train.errors import DataError
from jp_train.tools.simulate.measure import SourceReads
from jp_train.types import Kind

SAMPLED_SHARDS = 64
"""Shards of a source whose sidecars are read, evenly spaced; shards are similar enough for a mean."""
NPY_HEADER = 128


def source_reads(index: SourceIndex, data: DataConfig, slots: int) -> SourceReads:
    """The mean bytes of a document of a source, with its image and with VQ ids in the image's place (`slots`
    uint16).

    Ids that lie in the shards as members replace images as in training. Ids beside the shards are counted, not
    compared with the run's VQ.

    Raises:
        DataError: if a shard's index is gone.
    """
    shards = index.shards
    chosen = sorted({round(number) for number in np.linspace(0, len(shards) - 1, min(len(shards), SAMPLED_SHARDS))})
    samples = embedded = 0
    sums = {"images": 0, "ids": 0, "others": 0}
    for number in chosen:
        members = load_members(shards[number])
        if members is None:
            raise DataError(
                f"the index of shard {shards[number].path} is gone or stale; start again so that it is rebuilt"
            )
        samples += len(members.keys)
        by_extension = {
            extension: int(members.size[members.extension == code].sum(dtype=np.int64))
            for code, extension in enumerate(members.extensions)
        }
        if VQ_EXTENSION in members.extensions:
            embedded += int((members.extension == members.extensions.index(VQ_EXTENSION)).sum())
        fields = index.locator.fields
        of_images = set(filter(fields.is_image, by_extension))
        for extension in of_images | set(fields.needed(by_extension, data.crop)):
            what = "images" if extension in of_images else "ids" if extension == VQ_EXTENSION else "others"
            sums[what] += by_extension[extension]
    others, images = sums["others"] / max(samples, 1), sums["images"] / max(samples, 1)
    if index.locator.token_ids:
        others = index.ids_bytes / max(len(index), 1)
    if index.kind is not Kind.GENERATION:
        with_images = others + images * (index.kind is Kind.UNDERSTANDING)
        return SourceReads(with_images=with_images, with_ids=with_images, stored=0.0, samples=len(index))
    beside = max(ids_summary(index).values(), default=0) / len(shards)
    stored = 0.0 if data.vq_ids is VqIds.off and images else max(beside, embedded / max(samples, 1))
    with_ids = others + 2 * slots + NPY_HEADER * (embedded > 0)
    return SourceReads(
        with_images=others + images if images else with_ids, with_ids=with_ids, stored=stored, samples=len(index)
    )
