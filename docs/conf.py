"""How Sphinx makes the site: `make docs`."""

from __future__ import annotations

import json
import re
from importlib import metadata
from typing import TYPE_CHECKING, Any

from myst_parser.parsers.sphinx_ import MystParser

if TYPE_CHECKING:
    from docutils.nodes import document
    from sphinx.application import Sphinx

project = "cppo_lightning"
release = metadata.version("cppo-lightning")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = project
templates_path: list[str] = []
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
# what Lightning says of its own hooks is in its own documentation
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_default_options = {"show-inheritance": True}
napoleon_numpy_docstring = False
# `|Delta|`, `*` and names that end in `_` mean something in reStructuredText, and nothing in a docstring here
LITERAL = r"::\n(?:[ \t]+\S.*\n?|[ \t]*\n)+|``[^`]+``|`[^`]*`_*"
SPECIAL = re.compile(rf"({LITERAL})|([|*])|(?<=\w)(_)(?=\W|$)")


class NotebookParser(MystParser):
    """A notebook as a page: its text, its code, and the outputs that are stored in it."""

    supported = ("notebook",)

    def parse(self, inputstring: str, document: document) -> None:
        super().parse("\n\n".join(_cell(cell) for cell in json.loads(inputstring)["cells"]), document)


def _cell(cell: dict[str, Any]) -> str:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return source
    return "\n\n".join([f"```python\n{source}\n```", *(_output(output) for output in cell["outputs"])])


def _output(output: dict[str, Any]) -> str:
    if output["output_type"] == "stream":
        return f"```text\n{''.join(output['text'])}```"
    return f"![what the cell draws](data:image/png;base64,{output['data']['image/png']})"


def read_source(app: Sphinx, name: str, content: list[str]) -> None:
    """Links that lead out of docs/ on a disk, to README and notebooks, lead to pages of the site, without a file's ending."""
    text = content[0]
    if name == "readme":  # its own links start in the repository's root
        text = re.sub(r"<picture>.*?</picture>", "![CPPO's mask on one response](docs/mask.png)", text, flags=re.DOTALL)
        text = re.sub(r"\]\((?!https:)([^)]+)\)", r"](../\1)", text).replace("](../docs/", "](").replace("```jsonl", "```json")
    text = re.sub(r"\]\(((?:\.\./)*)\.\./README\.md\)", r"](\1readme)", text)
    text = re.sub(r"\]\(((?:\.\./)*)\.\./(notebooks/\w+)\.ipynb\)", r"](\1\2)", text)
    content[0] = text


def escape_docstring(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    text = SPECIAL.sub(lambda found: found[1] or f"\\{found[2] or found[3]}", "\n".join(lines))
    lines[:] = text.split("\n")


def setup(app: Sphinx) -> None:
    app.add_source_suffix(".ipynb", "notebook")
    app.add_source_parser(NotebookParser)
    app.connect("source-read", read_source)
    app.connect("autodoc-process-docstring", escape_docstring, priority=100)  # before napoleon makes sections of it
