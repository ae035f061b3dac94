"""What `make docs` shows: links and pictures of its pages are there, examples in docstrings run."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("diffpatch", "kernels", "pipelines", "eval")


@pytest.fixture(scope="module")
def build() -> Any:
    pytest.importorskip("pdoc")
    path = ROOT / "examples" / "docs" / "build.py"
    spec = importlib.util.spec_from_file_location("build_docs", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_has_its_links_and_pictures(build: Any, tmp_path: Path) -> None:
    pages = {file for _, file in build.PAGES.values()}
    assert "index.html" in pages
    for source, _ in build.PAGES.values():
        text = build.linked(ROOT / source, tmp_path)
        for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", text):
            assert link in pages or (tmp_path / link).exists(), (source, link)


def test_the_template_shows_every_page(build: Any) -> None:
    pages = [{"title": title, "file": file} for title, (_, file) in build.PAGES.items()]
    shown = build.template().render(title="Gallery", pages=pages, body="<b>&")
    assert all(f'href="{page["file"]}"' in shown for page in pages)
    assert 'aria-current="page">Gallery' in shown and "&lt;b&gt;&amp;" in shown


def test_docstrings_are_made_markdown(build: Any) -> None:
    text = "Two names::\n\n    code\n\n``a``   one\n        thing\n``long``  two\n"
    shown = build.marked(text)
    assert shown == "Two names:\n\n    code\n\n- ``a``: one\n        thing\n- ``long``: two\n"
    page = build.to_html(shown)
    assert "::" not in page and page.count("<li>") == 2 and "<pre>" in page


def modules() -> list[str]:
    """Every module with an example, by the name it is imported by."""
    found = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.name == "__init__.py":  # pictures of a session, with a pipeline of the reader's
                continue
            if not path.is_symlink() and ">>> " in path.read_text(encoding="utf-8"):
                name = path.relative_to(ROOT).with_suffix("").parts
                found.append(".".join(name if folder == "diffpatch" else ("diffpatch", *name)))
    return sorted(set(found))


@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.attempted and not result.failed
