"""The room's docstring is its table of contents."""

from __future__ import annotations

import re
from pathlib import Path

from jp_train import data

STATIONS = ("shards", "index", "plan", "rows", "batches")
FOLDER = Path(data.__file__).parent


def test_every_module_is_named_once_under_a_station_and_the_stations_are_in_the_order_of_a_sample() -> None:
    text = data.__doc__ or ""
    named = re.findall(r"^ {4}(\w+) {2,}\S", text, re.M)
    assert sorted(named) == sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
    assert tuple(re.findall(r"^(\w+): ", text, re.M)) == STATIONS


def test_the_modules_that_stations_are_named_after_are_named_under_them() -> None:
    text = data.__doc__ or ""
    for station in ("shards", "index", "plan", "rows"):
        section = re.search(rf"^{station}: .*?(?=^\w|\Z)", text, re.M | re.S)
        assert section and re.search(rf"^ {{4}}{station} ", section[0], re.M)
