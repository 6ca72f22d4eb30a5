"""The shell of every page: escaping, policy, one style sheet."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from jp_train.tools.html import count, data_uri, large, percent, render, write_page

HOSTILE = "</title><script>alert('1')</script>\ud800"
PNG = b"\x89PNG\r\n"


@pytest.fixture
def page(tmp_path: Path) -> str:
    write_page(tmp_path / "new" / "page.html", "forecast/forecast.html", title=HOSTILE, text=HOSTILE, images=[PNG])
    return (tmp_path / "new" / "page.html").read_text(encoding="utf-8")


def test_every_value_is_escaped_and_a_lone_surrogate_can_be_written(page: str) -> None:
    assert "<script" not in page and page.count("&lt;script&gt;alert(&#39;1&#39;)") == 3  # title, heading, text
    assert "\\ud800" in page


def test_the_shell_lets_a_page_load_and_run_nothing_and_has_the_one_style_sheet(page: str) -> None:
    assert page.startswith("<!doctype html>")
    assert "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\"" in page
    assert page.count("<style>") == 1 and "prefers-color-scheme:dark" in page and ".card{" in page
    assert not re.search(r"url\(|@import|https?://", page)


def test_an_image_is_inside_the_page(page: str) -> None:
    assert data_uri(PNG) in page and base64.b64decode(data_uri(PNG).partition(",")[2]) == PNG


def test_a_value_that_the_template_needs_and_does_not_get_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="text"):
        render("forecast/forecast.html", title="t", images=[])


def test_figures_are_written_for_people_and_none_is_a_dash() -> None:
    assert (count(1234567), large(12345678), large(1234), percent(0.1234)) == ("1,234,567", "12.3 M", "1,234", "12.3%")
    assert {count(None), large(None), percent(None)} == {'<span class="none">–</span>'}
