"""A forecast as one HTML file that needs nothing else: the table as text, the pictures inside."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; max-width: 1500px; margin: 2rem auto; padding: 0 1.5rem; }
pre { font: 12.5px/1.45 ui-monospace, monospace; background: #f6f8fa; padding: 1rem; overflow-x: auto; border-radius: 6px; }
img { max-width: 100%; margin: 1rem 0; } h1 { font-size: 1.4rem; font-weight: 600; }
"""


def page(title: str, text: str, pictures: Sequence[bytes]) -> str:
    """The whole file; `title` and `text` are escaped, `pictures` are PNG."""
    images = "\n".join(
        f'<img alt="" src="data:image/png;base64,{base64.b64encode(picture).decode()}">' for picture in pictures
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Forecast: {html.escape(title)}</title><style>{STYLE}</style></head>\n'
        f"<body><h1>Forecast: {html.escape(title)}</h1>\n{images}\n<pre>{html.escape(text)}</pre></body></html>\n"
    )
