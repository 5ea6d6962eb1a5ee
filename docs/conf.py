"""Builds the documentation site: `make docs`. Warnings are errors there.

The pages are plain Markdown, which a code host shows as it is. What only this site needs is added
here: the tree of pages behind the links of the index, and the signatures behind the names of the
Python page.
"""

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.highlighting import lexers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from pygments.lexers.special import TextLexer  # noqa: E402

import agq  # noqa: E402
from agq.pipeline.config.explain import reference  # noqa: E402

project = "agq-pipeline"
author = "the agq-pipeline authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "agq-pipeline"
myst_heading_anchors = 3
autodoc_typehints = "none"
napoleon_google_docstring = False
# GitHub draws these diagrams; here they stay text, because drawing them takes code from elsewhere.
lexers["mermaid"] = TextLexer()


def _write_reference(app: Sphinx) -> None:
    # Sphinx reads sources from disk; an unchanged file is not read again.
    file, text = HERE / "configuration.md", reference()
    if not file.exists() or file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")


def _add_to_page(app: Sphinx, page: str, source: list[str]) -> None:
    if page == "index":
        pages = re.findall(r"^- .*?\]\((\S+?)\.md\)", source[0], re.M)
        source[0] += "\n".join(["\n```{toctree}\n:hidden:\n", *pages, "```\n"])
    if page == "api":
        lines = []
        for name in re.findall(r"^\| `agq\.(\w+)", source[0], re.M):
            found = getattr(agq, name)
            if not isinstance(found, type):
                lines.append(f".. autofunction:: agq.{name}")
            elif issubclass(found, Exception):
                lines.append(f".. autoexception:: agq.{name}")
            else:
                lines.append(f".. autoclass:: agq.{name}\n   :members:")
        source[0] += "\n".join(["\n```{eval-rst}", *lines, "```\n"])


def setup(app: Sphinx) -> None:
    """Write the page of all settings before the sources are read, and complete two pages."""
    app.connect("builder-inited", _write_reference)
    app.connect("source-read", _add_to_page)
