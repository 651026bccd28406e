"""What the documentation shows runs: the notebook, the cluster's files, the image, every command.

pytest tests/test_docs.py
"""

import json
import subprocess

import pytest
import yaml
from PIL import Image

from tests.conftest import ROOT


def test_the_notebook_runs_from_top_to_bottom_and_keeps_no_outputs(tmp_path, monkeypatch):
    notebook = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    monkeypatch.chdir(ROOT / "docs")
    monkeypatch.setenv("TUTORIAL_RUNS", str(tmp_path))
    monkeypatch.setenv("TUTORIAL_STEPS", "2")
    names: dict = {}
    for cell in cells:
        exec(compile("".join(cell["source"]), f"tutorial.ipynb {cell['id']}", "exec"), names)
    assert "| mean" in (tmp_path / "results" / "results.md").read_text()
    assert isinstance(names["picture"], Image.Image)
    assert names["infrared"].size == (80, 64)
