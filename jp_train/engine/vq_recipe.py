"""What decides the VQ ids of a configuration's images."""

from __future__ import annotations

from jp_train.config.choices import SourceKind
from jp_train.config.schema import RunConfig
from jp_train.data.image import TRANSFORM_VERSION
from jp_train.data.vq_ids import IdsRecipe
from jp_train.model.pretrained import load_vq
from jp_train.model.vq import VQTokenizer


def ids_recipe(cfg: RunConfig, vq: VQTokenizer | None = None) -> IdsRecipe | None:
    """What decides the ids of this configuration's images; None when it has no generation source. Reads the VQ's
    weights, no others.

    Raises CheckpointError when they do not fit.
    """
    sources = [*cfg.data.sources.values(), *cfg.validation.sources.values()]
    if vq is None and not any(source.kind is SourceKind.generation for source in sources):
        return None
    vq = load_vq(cfg.model, seed=cfg.seed) if vq is None else vq
    return IdsRecipe(
        vq=vq.fingerprint(),
        transform=TRANSFORM_VERSION,
        image_side=cfg.model.vision.image_size,
        max_image_pixels=cfg.data.max_image_pixels,
        decode=cfg.data.image_decode.value,
    )
