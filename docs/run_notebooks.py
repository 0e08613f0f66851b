"""Runs notebooks from top to bottom, without Jupyter, and writes what their cells print and draw into them.

python docs/run_notebooks.py [NOTEBOOK.ipynb ...]
"""

from __future__ import annotations

import ast
import base64
import json
import sys
import types
from collections.abc import Iterable
from contextlib import redirect_stdout
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def code_cells(path: Path) -> list[dict[str, Any]]:
    """The notebook's code cells, as its JSON has them."""
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def execute(path: Path, module: types.ModuleType) -> Iterable[list[dict[str, Any]]]:
    """Run the code cells in ``module``, as a kernel would in ``__main__``; the outputs of each, in the notebook's format."""
    plt.switch_backend("Agg")
    # no size or colour of the user's own in a committed picture
    with mpl.rc_context({"figure.dpi": 80}):
        for number, cell in enumerate(code_cells(path), start=1):
            with redirect_stdout(StringIO()) as printed:
                value = _run_cell("".join(cell["source"]), f"{path.name}, code cell {number}", module.__dict__)
            text = {"name": "stdout", "output_type": "stream", "text": printed.getvalue().splitlines(keepends=True)}
            figures = [plt.figure(shown) for shown in plt.get_fignums()] + [value] * isinstance(value, Figure)
            yield [text] * bool(text["text"]) + [_picture(figure) for figure in figures]
            plt.close("all")


def _run_cell(source: str, name: str, namespace: dict[str, Any]) -> Any:
    """The value of its last line, where that is an expression; a kernel shows it, and here only figures are shown."""
    body = ast.parse(source, name).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), name, "exec"), namespace)
    return eval(compile(ast.Expression(last.value), name, "eval"), namespace) if isinstance(last, ast.Expr) else None


def _picture(figure: Any) -> dict[str, Any]:
    file = BytesIO()
    # no version of matplotlib in the file, so that the same picture is the same bytes
    figure.savefig(file, format="png", metadata={"Software": None})
    encoded = base64.b64encode(file.getvalue()).decode()
    return {"data": {"image/png": encoded}, "metadata": {}, "output_type": "display_data"}


def run(path: Path) -> None:
    """Execute one notebook and write its outputs into it."""
    notebook = json.loads(path.read_text())
    module = types.ModuleType(path.stem)
    sys.modules[path.stem] = module  # dataclasses look their module up
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, (cell, outputs) in enumerate(zip(cells, execute(path, module), strict=True), start=1):
        cell["execution_count"], cell["outputs"] = number, outputs
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(NOTEBOOKS.glob("*.ipynb")):
        run(Path(name))
