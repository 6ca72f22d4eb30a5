"""`python docs/make_site.py` builds the site in site/html: this folder's pages, the Markdown files beside the code, and
one API page per room, made from docstrings. A dead link is an error; nothing is loaded from the network."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "site" / ".pages"
"""The staged pages, laid out as in the repository, so that the same relative links hold in both."""
OTHER_PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "data_recipes/README.md",
    "hostfiles/README.md",
    "LICENSE",
)


def stage() -> None:
    """Copy the Markdown and what it links to, and write the API pages."""
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(ROOT / "docs", PAGES / "docs", ignore=shutil.ignore_patterns("*.py", "*.yml", "__pycache__"))
    for name in OTHER_PAGES:
        (PAGES / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, PAGES / name)
    for name, text in api_pages().items():
        (PAGES / "api").mkdir(exist_ok=True)
        (PAGES / "api" / name).write_text(text, encoding="utf-8")


def api_pages() -> dict[str, str]:
    """{file name: text} of a page per room, and their index."""
    package = ROOT / "jp_train"
    rooms: dict[str, list[str]] = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        room = ".".join(parts[1:-1]) or "ground"
        rooms.setdefault(room, []).append(module)
    pages = {
        f"{room}.md": "\n\n".join((f"# {room}", *(f"::: {module}" for module in modules))) + "\n"
        for room, modules in rooms.items()
    }
    links = "\n".join(f"- [{room}]({room}.md): {len(modules)} modules" for room, modules in sorted(rooms.items()))
    return pages | {"index.md": f"# API\n\nFrom docstrings, one page per room.\n\n{links}\n"}


def build() -> int:
    """The site from the staged pages; warnings and errors are printed. Returns mkdocs' exit status."""
    command = [sys.executable, "-m", "mkdocs", "build", "--clean", "-f", str(ROOT / "docs" / "mkdocs.yml")]
    # not --quiet: with it, mkdocs does not count the warnings that `strict` makes errors
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(*(line for line in done.stderr.splitlines() if not line.startswith("INFO")), sep="\n", file=sys.stderr)
    return done.returncode


if __name__ == "__main__":
    stage()
    raise SystemExit(build())
