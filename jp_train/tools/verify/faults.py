"""What to do about each class of fault; the names are stable, scripts may rely on them."""

from __future__ import annotations

_REFUSED = "; training does not start with it"
_LEFT_OUT = "; the index leaves the sample out"
_REWRITE = "copy or write the shard again, or take it out of the source's `shards`" + _REFUSED
_FIX_SAMPLE = "the index leaves it out; correct the sample and write the shard again if it is needed"
_FIX_IMAGE = (
    "run `data verify --exclude` so that the index leaves it out, or replace the image; otherwise it costs skip "
    "budget in training"
)
WHOLE_SHARD = (
    "copy or write it again, move it out of the source's folder, or name the other shards, for example "
    "`shards: FOLDER/{{000000..000006},{000008..000127}}.tar`"
)
"""What to do about a shard that cannot be used, where leaving samples out is of no help."""

REMEDIES: dict[str, str] = {
    "truncated_tar": _REWRITE,
    "corrupt_tar": _REWRITE,
    "data_after_end": "write the shards again as one tar (`tar --concatenate`, not cat)" + _REFUSED,
    "compressed_tar": "decompress it to a plain .tar; images hardly shrink, and byte ranges need plain tars",
    "not_a_tar": "import it with `jp-train data import`, and name the folder of shards that it writes" + _REFUSED,
    "link_or_device": "write the shard again with plain files only (tar --dereference)" + _REFUSED,
    "duplicate_key": "give every sample of a shard its own key and write the shard again" + _REFUSED,
    "interleaved_key": "write the files of a sample next to each other (tar --sort=name)" + _REFUSED,
    "duplicate_field": "keep one file of each extension per key and write the shard again" + _REFUSED,
    "unreadable": "check the path, the disk, the mount or the server, then verify again",
    "process_died": (
        "verify this shard alone with --processes 1 and watch the memory; lower data.max_image_pixels if images "
        "are huge"
    ),
    "internal_error": "a fault of jp_train: training would stop at this sample; report it with the sample",
    "stray_file": "name files KEY.EXTENSION; the index leaves this one out",
    "missing_field": _FIX_SAMPLE,
    "extra_field": _FIX_SAMPLE,
    "bad_type": _FIX_SAMPLE,
    "bad_json": _FIX_SAMPLE,
    "bad_dialogue": _FIX_SAMPLE,
    "bad_class": "write a class number that class_names has" + _LEFT_OUT,
    "bad_mapping": "correct the function that the source's `map` names" + _LEFT_OUT,
    "not_utf8": "write text and JSON as UTF-8" + _LEFT_OUT,
    "lone_surrogate": "write text as valid Unicode (an escaped half of a pair is none)" + _LEFT_OUT,
    "empty_text": _FIX_SAMPLE,
    "field_too_large": "split the text or shrink the image" + _LEFT_OUT,
    "bad_vq_ids": "encode the images again (`data encode-images`)" + _LEFT_OUT,
    "too_many_images": "raise data.seq_len, or make several samples of it" + _LEFT_OUT,
    "picture_undecodable": _FIX_IMAGE,
    "picture_truncated": _FIX_IMAGE,
    "picture_format": "convert it to JPEG, PNG or WebP, or run `data verify --exclude`",
    "picture_too_large": "shrink it, raise data.max_image_pixels, or run `data verify --exclude`",
    "picture_too_long": "crop it, raise data.max_image_pixels, or run `data verify --exclude`",
    "nothing_to_learn": "raise data.seq_len, or shorten the question; otherwise it costs skip budget in training",
    "empty_shard": "write the shard again, or take it out of the source's `shards`",
    "passed_over": "nothing, if they are not meant; otherwise name plain tars in the source's `shards`",
    "no_usable_sample": "name other shards, or take the source out of the recipe" + _REFUSED,
    "over_long": "nothing, if that much text may be lost; otherwise raise data.seq_len",
    "bad_sample": _FIX_SAMPLE,
}
