"""The bytes of one sample: which of its files its kind needs, and what is stored elsewhere and need not be read."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from jp_train.config.choices import Crop
from jp_train.data.field_map import VQ_EXTENSION, FieldMap
from jp_train.data.samples import check_field_size
from jp_train.data.shards import Shard, ShardMembers, ShardReader, ShardWindow, read_spans
from jp_train.data.vq_ids import StoredIds
from jp_train.types import Kind, RawSample, SourceInfo


def read_fields(
    shard: Shard,
    members: ShardMembers,
    number: int,
    fields: FieldMap,
    crop: Crop,
    reader: ShardReader,
    source: str,
    *,
    images: bool = True,
    stored: StoredIds | None = None,
    embedded_ids: bool = True,
    token_ids: bytes | None = None,
) -> RawSample:
    """The bytes of sample `number` of a shard, only the fields its kind needs (`images=False`: images as empty
    bytes).

    With `stored` ids of the shard an image is not read, whether it has ids or is known to be unusable.
    `embedded_ids=False` leaves `.vq.npy` members alone where there is an image to encode. With `token_ids`, the
    sample's stored record, its texts are not read.
    """
    info = SourceInfo(source=source, shard=shard.path, key=members.keys[number])
    if token_ids is not None and fields.kind is Kind.TEXT:
        return RawSample(info=info, fields={}, token_ids=token_ids)
    first, last = members.member_start[number : number + 2].tolist()
    spans = zip(members.offset[first:last].tolist(), members.size[first:last].tolist(), strict=True)
    where = dict(zip([members.extensions[code] for code in members.extension[first:last].tolist()], spans, strict=True))
    return read_located(
        info,
        shard,
        number,
        where,
        fields,
        crop,
        reader,
        images=images,
        stored=stored,
        embedded_ids=embedded_ids,
        token_ids=token_ids,
    )


def read_located(
    info: SourceInfo,
    shard: Shard,
    number: int,
    located: Mapping[str, tuple[int, int]],
    fields: FieldMap,
    crop: Crop,
    reader: ShardReader | ShardWindow,
    *,
    images: bool = True,
    stored: StoredIds | None = None,
    embedded_ids: bool = True,
    token_ids: bytes | None = None,
) -> RawSample:
    """As `read_fields`, for a sample whose files are `located`: extension -> (offset, size) in the shard.

    Raises SkipSample for a file that is too large to be read.
    """
    ids = None if stored is None else stored.row(number)
    fault = "" if stored is None or ids is not None else stored.unusable.get(info.key, "")
    known, texts = ids is not None or bool(fault), token_ids is None
    present = tuple(located)
    of_kind, needed, read = _fields_to_read(present, fields, crop, known, embedded_ids, images, texts)
    for extension in needed:
        check_field_size(extension, located[extension][1])
    values = read_spans(reader, shard, [located[extension] for extension in read])
    content = dict.fromkeys(of_kind, b"")
    content |= zip(read, values, strict=True)
    return RawSample(info=info, fields=content, vq_ids=ids, image_fault=fault, token_ids=token_ids, extensions=present)


@lru_cache(maxsize=1024)
def _fields_to_read(
    present: tuple[str, ...], fields: FieldMap, crop: Crop, known: bool, embedded_ids: bool, images: bool, texts: bool
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Of a sample with these extensions: the fields it is made of, those of them that must not be too large, and those
    that are read.

    `known`: ids, or the fault of its image, are stored, so the image is not needed; `texts`: its texts are to be
    read.
    """
    where = list(present)
    if known or (not embedded_ids and any(map(fields.is_image, where))):
        where = [extension for extension in where if extension != VQ_EXTENSION]
    of_kind = tuple(fields.needed(where, crop))
    needed = tuple(extension for extension in of_kind if not (known and fields.is_image(extension)))
    read = [
        extension
        for extension in needed
        if (images or not fields.is_image(extension)) and (texts or not fields.is_text(extension))
    ]
    return of_kind, needed, tuple(read)
