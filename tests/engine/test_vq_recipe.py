"""What decides stored ids, from a configuration alone."""

from __future__ import annotations

from jp_train.config import RunConfig
from jp_train.config.choices import ImageDecode, Init, SourceKind
from jp_train.config.schema import SourceConfig
from jp_train.data.image import TRANSFORM_VERSION
from jp_train.engine.vq_recipe import ids_recipe
from jp_train.model.pretrained import load_vq
from tests.model.janus_tiny import SIDE, tiny_config


def configuration(kind: SourceKind) -> RunConfig:
    cfg = RunConfig(model=tiny_config())
    cfg.model.init = Init.random
    cfg.data.sources = {"some": SourceConfig(kind=kind, shards="some.tar")}
    return cfg


def test_without_a_generation_source_there_is_nothing_to_decide() -> None:
    assert ids_recipe(configuration(SourceKind.understanding)) is None


def test_the_recipe_is_that_of_the_vq_the_transform_and_the_decoder() -> None:
    cfg = configuration(SourceKind.generation)
    vq = load_vq(cfg.model, seed=cfg.seed)
    recipe = ids_recipe(cfg)
    assert recipe is not None and recipe == ids_recipe(cfg, vq)
    assert (recipe.vq, recipe.transform, recipe.image_side) == (vq.fingerprint(), TRANSFORM_VERSION, SIDE)
    others = [configuration(SourceKind.generation) for _ in range(3)]
    others[0].seed = cfg.seed + 1  # a fresh VQ depends on it
    others[1].data.image_decode = ImageDecode.fast
    others[2].data.max_image_pixels = 1000
    recipes = [ids_recipe(other) for other in others]
    assert len({recipe.fingerprint, *(other.fingerprint for other in recipes if other)}) == 4
