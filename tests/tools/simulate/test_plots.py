"""A forecast as a file: six panels in one image, and the numbers beside it."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image

from jp_train.config import load_config
from jp_train.errors import DataError
from jp_train.tools.simulate.plots import DASHES, KIND_COLOURS, _styles, draw_forecast, save_forecast
from jp_train.tools.simulate.stage import SimulateOptions, simulate_stage
from tests.tools.simulate.test_measure import SMOKE


@pytest.fixture(scope="module")
def forecast():
    options = SimulateOptions(synthetic=True, world=2, steps=400, sample_steps=20)
    return simulate_stage(load_config(SMOKE / "stage2.yaml"), options, io.StringIO())


def test_a_forecast_is_saved_as_an_image_and_as_its_numbers(forecast, tmp_path):
    names = save_forecast(forecast, tmp_path / "a" / "b")
    assert names == f"{tmp_path}/a/b/simulate.png, {tmp_path}/a/b/simulate.json"
    assert json.loads((tmp_path / "a" / "b" / "simulate.json").read_text()) == forecast
    with Image.open(tmp_path / "a" / "b" / "simulate.png") as image:
        assert image.format == "PNG" and image.size == (17 * 120, 9.8 * 120)


def test_epochs_below_1_and_a_source_without_documents_are_drawn_too(forecast, tmp_path):
    changed = json.loads(json.dumps(forecast))
    for source in changed["sources"]:
        source["repeats_at_steps"] = []
    changed["histograms"]["lengths"].pop(changed["sources"][0]["name"])
    draw_forecast(changed, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_sources_of_a_kind_share_its_colour_and_differ_in_their_dashes():
    sources = [{"name": f"{kind}{n}", "kind": kind} for n in range(2) for kind in KIND_COLOURS]
    styles = _styles({"sources": sources})
    for kind, colour in KIND_COLOURS.items():
        assert [styles[f"{kind}{n}"]["color"] for n in range(2)] == [colour, colour]
        assert [styles[f"{kind}{n}"]["linestyle"] for n in range(2)] == list(DASHES[:2])


def test_a_folder_that_cannot_be_written_is_an_error_that_names_the_option(forecast, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write the forecast to .*give --out a folder"):
        save_forecast(forecast, tmp_path / "file" / "folder")
