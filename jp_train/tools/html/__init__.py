"""The pages that the tools write: one shell (`shell.html`), one style sheet, and a template in the folder of each tool.

jinja2 escapes every value that is no `Markup`; the shell's content security policy lets a page load and run nothing.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from jp_train.files import write_atomically
from jp_train.terminal import duration, measured

NONE = Markup('<span class="none">–</span>')
_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parents[1]),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, **values: Any) -> str:
    """The page of a template below `jp_train/tools`, such as `report/report.html`."""
    return _ENVIRONMENT.get_template(template).render(**values)


def write_page(path: Path, template: str, **values: Any) -> None:
    """Render a template and replace the file at `path` with it. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, render(template, **values).encode("utf-8", "backslashreplace"))


def data_uri(png: bytes) -> str:
    """A PNG as the source of an image inside the page."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def count(value: int | None) -> str:
    """1234567 -> 1,234,567; a dash for None."""
    return NONE if value is None else f"{value:,}"


def large(value: float | None) -> str:
    """12345678 -> 12.3 M, for quantities whose last digits nobody reads; a dash for None."""
    if value is None:
        return NONE
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or (abs(value) >= size and size > 1e3):
            return f"{value / size:.3g} {letter}"
    return f"{value:,.0f}"


def percent(value: float | None, digits: int = 1) -> str:
    """0.1234 -> 12.3%; a dash for None."""
    return NONE if value is None else f"{100 * value:.{digits}f}%"


_ENVIRONMENT.filters |= {
    function.__name__: function for function in (count, data_uri, duration, large, measured, percent)
}
