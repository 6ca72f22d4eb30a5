"""Pages that are made from code, and the site."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def script(name: str) -> ModuleType:
    """A script of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_configuration_keys_is_what_the_schema_says() -> None:
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert script("make_configuration").page() == written, "run `python docs/make_configuration.py`"


def test_the_page_of_configuration_keys_has_every_key() -> None:
    from jp_train.config.keys import keys

    page = script("make_configuration").page()
    leaves = [key.name for key in keys() if key.section is None]
    assert len(leaves) > 150
    assert [key for key in leaves if f"**`{key}`**" not in page] == []


def test_every_module_has_its_place_on_one_api_page() -> None:
    pages = script("make_site").api_pages()
    listed = [
        line.removeprefix("::: ") for text in pages.values() for line in text.splitlines() if line.startswith(":::")
    ]
    modules = [path for path in (ROOT / "jp_train").rglob("*.py")]
    assert len(listed) == len(set(listed)) == len(modules)


@pytest.mark.parametrize("dead_link", [False, True])
def test_the_site_is_built_without_a_network_and_a_dead_link_is_an_error(tmp_path: Path, dead_link: bool) -> None:
    pytest.importorskip("mkdocs", reason="pip install 'jp_train[docs]'")
    for name in ("docs", "data_recipes", "hostfiles", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    package = tmp_path / "jp_train"  # one small room is enough
    shutil.copytree(ROOT / "jp_train" / "config", package / "config")
    shutil.copy(ROOT / "jp_train" / "__init__.py", package)
    if dead_link:
        with (tmp_path / "docs" / "data.md").open("a", encoding="utf-8") as page:
            page.write("\n[nowhere](absent.md)\n")
    offline = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "docs/make_site.py"], cwd=tmp_path, env=offline, capture_output=True, text=True, check=False
    )
    html = tmp_path / "site" / "html"
    if dead_link:
        assert done.returncode != 0 and "absent.md" in done.stdout + done.stderr
        return
    assert done.returncode == 0, done.stderr
    assert "load_config" in (html / "api" / "config.html").read_text(encoding="utf-8")
    assert "stage.ratio_unit" in (html / "docs" / "configuration.html").read_text(encoding="utf-8")
