"""Links and citations: every page that is named exists, and nothing outside the repository is cited."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(page for folder in (".", "docs", "data_recipes", "hostfiles") for page in (ROOT / folder).glob("*.md"))
CODE = sorted(
    path
    for folder in ("jp_train", "examples", "tests", "bench", "launch", "data_recipes", "hostfiles", "docs", ".ci")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".yaml", ".yml", ".md", ".sh", ".sbatch", "") and path.is_file()
)
ABSENT = re.compile(
    r"\b(DEEPSPEED|DESIGN|FACTS|HOUSE|HOUSE_MOVES|JANUS_PRO_SPEC|JANUSFLOW_SPEC|STYLE_EXAMPLES)(\.md\b| section)"
    r"|\bspecification,? section"
)
"""Notes of the project that are not in the repository."""


def anchors(page: Path) -> set[str]:
    """What GitHub and the site make of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_of_a_page_leads_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        assert not re.match(r"[a-z]+:", path), f"{target}: pages link to nothing outside the repository"
        linked = (page.parent / path).resolve() if path else page
        assert linked.is_relative_to(ROOT) and linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("suffix", [".py", ".yaml", ".md"])
def test_every_page_that_code_cites_exists(suffix: str) -> None:
    dead = {
        (str(path.relative_to(ROOT)), cited)
        for path in CODE
        if path.suffix == suffix
        for cited in re.findall(r"\b(?:docs|data_recipes|hostfiles)/\w+\.md\b", path.read_text(encoding="utf-8"))
        if not (ROOT / cited).is_file()
    }
    assert dead == set()


def test_nothing_cites_a_document_that_is_not_in_the_repository() -> None:
    citing = {str(path.relative_to(ROOT)) for path in [*CODE, *PAGES] if ABSENT.search(_text(path))}
    assert citing - {"tests/docs/test_links.py"} == set()


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def test_every_make_target_that_a_page_names_exists() -> None:
    named = {
        target
        for page in PAGES
        for target in re.findall(r"(?:`|^    )make ([a-z0-9-]+)", _text(page), flags=re.MULTILINE)
    }
    assert {"smoke", "test", "docs"} <= named
    for target in sorted(named):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_make_help_lists_every_target() -> None:
    listed = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.+)$", makefile, flags=re.MULTILINE)
    assert {line.split()[0] for line in listed.splitlines()} == set(phony.split())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_path_in_backticks_that_looks_like_a_file_of_the_repository_is_one(page: Path) -> None:
    """`model/vq.py` is short for jp_train/model/vq.py in the pages about the package."""
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:\w+/)+\w+\.(?:py|md|yaml|sh|sbatch))`", text):
        if "NAME" in path:
            continue
        assert any((folder / path).exists() for folder in (ROOT, ROOT / "jp_train", page.parent)), path
