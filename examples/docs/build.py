"""The documentation as pages: README, measurements, the map of the house, the gallery, the API.

    make docs           # or: python examples/docs/build.py build/docs

The API reference is made by pdoc from the docstrings of what `diffpatch` offers.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import warnings
from pathlib import Path

import pdoc
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup
from pdoc.render_helpers import to_html

ROOT = Path(__file__).parents[2]
PAGES = {  # title -> (source, page)
    "diffpatch": ("README.md", "index.html"),
    "Own models, servers": ("examples/own_models.md", "own_models.html"),
    "Gallery": ("examples/README.md", "gallery.html"),
    "Measurements": ("eval/results/README.md", "measurements.html"),
    "Models": ("pipelines/README.md", "models.html"),
    "Backends": ("kernels/README.md", "backends.html"),
    "Map of the house": ("CONTRIBUTING.md", "contributing.html"),
    "Changes": ("CHANGELOG.md", "changes.html"),
}
MODULES = ("diffpatch", r"!diffpatch\.", "diffpatch.adapters", r"!diffpatch\.adapters\..+\.backend")
LINK = re.compile(r"(!?\[[^\]]*\]\()(?!https?://|#)([^)#\s]+)((?:#[^)]*)?\))")
PICTURES = (".png", ".webp", ".gif", ".svg")


def main() -> None:
    """Write every page into a folder."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="such as build/docs")
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    api(folder)
    pages = [{"title": title, "file": file} for title, (_, file) in PAGES.items()]
    for title, (source, file) in PAGES.items():
        body = Markup(to_html(linked(ROOT / source, folder)))
        page = template().render(title=title, pages=pages, body=body)
        (folder / file).write_text(page, encoding="utf-8")


def api(folder: Path) -> None:
    """The reference; pdoc writes an index of its own, which the README's page replaces."""
    pdoc.render.configure(
        docformat="google", footer_text="diffpatch", template_directory=Path(__file__).parent
    )
    convert = pdoc.docstrings.google
    pdoc.docstrings.google = lambda docstring: convert(marked(docstring))
    with warnings.catch_warnings():  # it tries adapters to engines that are not installed, too
        warnings.filterwarnings("ignore", "Couldn't import")
        pdoc.pdoc(*MODULES, output_directory=folder)


def marked(text: str) -> str:
    """A docstring whose habits Markdown does not know as Markdown: "::" before code, and lists of
    ``names`` with what each is beside it, which would run together into one paragraph."""
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
    return re.sub(r"^(``[^`\n]+``) {2,}(?=\S)", r"- \1: ", text, flags=re.MULTILINE)


def linked(source: Path, folder: Path) -> str:
    """The Markdown of a page whose links hold in the folder; its pictures are copied there.

    Links to other files lead to where they are, in the repository.
    """
    files = {(ROOT / name).resolve(): file for name, file in PAGES.values()}

    def moved(match: re.Match[str]) -> str:
        before, target, after = match.groups()
        path = (source.parent / target).resolve()
        if path in files:
            return f"{before}{files[path]}{after}"
        if path.suffix in PICTURES:
            shutil.copy(path, folder / path.name)
            return f"{before}{path.name}{after}"
        return match[0] if not path.exists() else f"{before}{os.path.relpath(path, folder)}{after}"

    return LINK.sub(moved, source.read_text(encoding="utf-8"))


def template() -> Template:
    """Of every page but the reference."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    return templates.get_template("page.html")


if __name__ == "__main__":
    main()
