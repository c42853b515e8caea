"""The notebook runs from its first cell to its last."""

import ast
import json

from PIL import Image

from tests.helpers import ROOT


def test_every_cell_of_the_notebook_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT / "scripts")
    notebook = json.loads((ROOT / "scripts" / "demo.ipynb").read_text())
    names: dict = {}
    pictures = []
    cells = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    for cell in cells:
        assert cell["outputs"] == [] and cell["execution_count"] is None
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "cell", "exec"), names)
        if last is not None:  # what a notebook shows below the cell
            shown = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
            pictures += [shown] if isinstance(shown, Image.Image) else []
    assert [p.size for p in pictures] == [(1368, 144), (1368, 144), (1368, 280), (1368, 688)]
    said = capsys.readouterr().out
    assert "in 19 steps, n = 4" in said and "equal: True" in said
