"""What mkdocs cannot do by itself: README is the first page, the notebook is run and shown, and a
page may name files of the repository that are no pages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.structure.files import File, Files
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"\[([^\[\]]*)\]\(([^()#\s:]+)(#[^()\s]*)?\)")
ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):<code>~?(?:fusedkd\.)?")


def on_files(files: Files, config: Any) -> None:
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text()))
    notebook = nbformat.read(DOCS / "quickstart.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    for cell in notebook.cells:  # what libraries warn of is not the reader's affair
        cell["outputs"] = [o for o in cell.get("outputs", []) if o.get("name") != "stderr"]
    text, resources = MarkdownExporter().from_notebook_node(notebook)
    files.append(File.generated(config, "notebook.md", content=text))
    for name, data in resources["outputs"].items():
        files.append(File.generated(config, name, content=data))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to pages from README; the names alone of files that the site does not have."""
    source = page.file.src_uri
    folder = ROOT if source == "index.md" else (DOCS / source).parent

    def linked(match: re.Match[str]) -> str:
        text, path, anchor = match[1], (folder / match[2]).resolve(), match[3] or ""
        if not path.exists():
            return match[0]
        if path.suffix == ".ipynb":
            return f"[{text}](notebook.md)"
        if path.is_relative_to(DOCS) and path != DOCS:
            return f"[{text}]({match[2].removeprefix('docs/')}{anchor})"
        return f"`{path.relative_to(ROOT)}`" if text == match[2] else text

    return LINK.sub(linked, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings name functions as Sphinx does; here the name is enough."""
    return ROLE.sub("<code>", html)
