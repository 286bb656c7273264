"""The notebook runs, from top to bottom, and shows what a notebook should.

`python -m tests.package.test_notebook` runs it on the demo model and writes what it shows into it.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


def run(document: dict[str, Any], model: str) -> list[list[dict[str, Any]]]:
    """What each cell with code shows: what it prints, and its last expression, as a notebook has them.

    Args:
        model: stands in for the demo model.
    """
    known: dict[str, Any] = {}
    return [shown(cell["source"].replace('"demo"', repr(model)), known) for cell in document["cells"] if is_code(cell)]


def is_code(cell: dict[str, Any]) -> bool:
    return cell["cell_type"] == "code"


def shown(source: str, known: dict[str, Any]) -> list[dict[str, Any]]:
    tree, value = ast.parse(source), None
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(tree, "cell", "exec"), known)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), known)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": printed.getvalue()})
    if value is not None:
        data = {"text/plain": repr(value)}
        if hasattr(value, "_repr_html_"):
            data["text/html"] = value._repr_html_()
        outputs.append({"output_type": "execute_result", "execution_count": None, "metadata": {}, "data": data})
    return outputs


def test_the_notebook(tiny: str) -> None:
    outputs = run(json.loads(NOTEBOOK.read_text()), tiny)
    results = [each["data"] for cell in outputs for each in cell if each["output_type"] == "execute_result"]
    tables = [data["text/html"] for data in results if "text/html" in data]
    assert len(tables) == 2
    assert all("<table" in table and "█" in table for table in tables)  # a picture of what rounds have kept
    assert all("\n" not in data["text/plain"] for data in results)
    assert any(data["text/plain"] == "True" for data in results)


def test_what_the_notebook_shows_was_made_by_it() -> None:
    document = json.loads(NOTEBOOK.read_text())
    assert (document["nbformat"], document["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in document["cells"]}) == len(document["cells"])
    page = NOTEBOOK.read_text()
    assert "return 2 * (width + height)" in page
    assert "█" in page
    assert not re.search(r"/(home|root|work)/", page)


def write(model: str = "demo") -> None:
    document = json.loads(NOTEBOOK.read_text())
    cells = [cell for cell in document["cells"] if is_code(cell)]
    for count, (cell, outputs) in enumerate(zip(cells, run(document, model), strict=True), start=1):
        cell["outputs"], cell["execution_count"] = outputs, count
        for output in outputs:
            if "execution_count" in output:
                output["execution_count"] = count
    NOTEBOOK.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    write()
