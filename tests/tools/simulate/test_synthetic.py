"""Stated length distributions: which one a source gets, and the lengths that are drawn from it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from jp_train.config import load_config
from jp_train.config.choices import ImageEnd
from jp_train.errors import ConfigError
from jp_train.tools.simulate.synthetic import (
    ARRAY_SAMPLES,
    DEFAULTS,
    Lengths,
    read_lengths,
    synthetic_sources,
    template_tokens,
)
from jp_train.types import Kind
from tests.tools.simulate.test_measure import SMOKE

SLOTS = 36


@pytest.fixture(scope="module")
def toy():
    return load_config(SMOKE / "stage2.yaml", ["data.first_sentence=0.25", "data.image_end=eoi_eos"])


def kinds(cfg) -> dict[str, Kind]:
    return {name: Kind(source.kind.value) for name, source in cfg.data.sources.items()}


def test_a_source_gets_its_entry_then_that_of_its_kind_then_the_default(toy, tmp_path):
    generation = [name for name, kind in kinds(toy).items() if kind is Kind.GENERATION]
    path = tmp_path / "lengths.yaml"
    path.write_text(f"generation: {{mean: 30, sigma: 0.2}}\n{generation[0]}: {{mean: 40, samples: 7}}\n")
    lengths = read_lengths(path, toy)
    assert lengths[generation[0]] == replace(DEFAULTS[Kind.GENERATION], mean=40, sigma=0.2, samples=7)
    assert lengths[generation[1]] == replace(DEFAULTS[Kind.GENERATION], mean=30, sigma=0.2)
    others = {name: kind for name, kind in kinds(toy).items() if kind is not Kind.GENERATION}
    assert others and all(lengths[name] == DEFAULTS[kind] for name, kind in others.items())
    assert read_lengths(None, toy) == {name: DEFAULTS[kind] for name, kind in kinds(toy).items()}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "'the file' is neither a source"),
        ("elsewhere: {mean: 3}", "'elsewhere' is neither a source of the configuration nor a kind"),
        ("text: 3", "text is 3; expected numbers for some of bytes, max, mean, samples, sigma"),
        ("text: {mean: true}", "text.mean is True; expected a number >= 1"),
        ("text: {sigma: -0.1}", "text.sigma is -0.1; expected a number >= 0"),
        ("text: {mean: .nan}", "text.mean is nan"),
        ("text: {mean: -3, sigma: 1}", "text.mean is -3"),
        ("text: [", "cannot read the lengths"),
    ],
)
def test_an_entry_that_is_no_distribution_is_named(toy, tmp_path, text, message):
    (tmp_path / "lengths.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_lengths(tmp_path / "lengths.yaml", toy)


def test_drawn_lengths_have_the_stated_mean_and_depend_on_the_name_alone(toy):
    stated = Lengths(mean=100, sigma=0.5, samples=200_000)
    sources = {source.name: source for source in synthetic_sources(toy, dict.fromkeys(toy.data.sources, stated), SLOTS)}
    assert list(sources) == list(toy.data.sources)
    for name, kind in kinds(toy).items():
        around, source = template_tokens(kind, toy, SLOTS), sources[name]
        words = source.tokens - around
        assert len(words) == 200_000 and words.min() >= 3
        assert words.mean() == pytest.approx(100 - 0.5, rel=0.01), "rounding down takes half a token"
        assert source.min_tokens == (0 if kind is Kind.TEXT else around) and source.cuttable == (kind is Kind.TEXT)
        assert (source.short_tokens is not None) == (kind is Kind.GENERATION)
    other = replace(toy, data=replace(toy.data, sources=dict(reversed(toy.data.sources.items()))))
    again = {
        source.name: source for source in synthetic_sources(other, dict.fromkeys(other.data.sources, stated), SLOTS)
    }
    assert all(np.array_equal(again[name].tokens, source.tokens) for name, source in sources.items())


def test_a_large_source_repeats_at_most_half_a_million_lengths_and_max_clips_them(toy):
    stated = Lengths(mean=1000, sigma=2.0, max=1500, samples=10**9)
    source = synthetic_sources(toy, dict.fromkeys(toy.data.sources, stated), SLOTS)[0]
    around = template_tokens(source.kind, toy, SLOTS)
    assert len(source.tokens) == ARRAY_SAMPLES and source.tokens.max() == 1500 + around


def test_tokens_of_a_template_are_bos_eos_the_image_and_its_markers(toy):
    assert template_tokens(Kind.TEXT, toy, SLOTS) == 2
    assert template_tokens(Kind.UNDERSTANDING, toy, SLOTS) == SLOTS + 3
    for end, tokens in ((ImageEnd.eoi_eos, 2), (ImageEnd.eoi, 1), (ImageEnd.none, 0)):
        cfg = replace(toy, data=replace(toy.data, image_end=end))
        assert template_tokens(Kind.GENERATION, cfg, SLOTS) == 2 + SLOTS + tokens
