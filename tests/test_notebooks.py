"""The notebooks run from top to bottom, offline, and are committed with the outputs of such a
run.
"""

import json
import pathlib
import time

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    names = {path.name for path in NOTEBOOKS}
    assert names == {"01_ssm.ipynb", "02_model.ipynb", "03_train_fp8.ipynb", "04_align.ipynb",
                     "05_prune_distill.ipynb", "06_stability.ipynb", "07_infer.ipynb"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_runs_and_its_assertions_hold(path):
    notebook = nbformat.read(path, as_version=4)
    start = time.perf_counter()
    NotebookClient(notebook, timeout=120, kernel_name="python3", shutdown_kernel="immediate",
                   resources={"metadata": {"path": str(path.parent)}}).execute()
    assert time.perf_counter() - start < 120


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_is_committed_with_outputs_and_in_size(path):
    text = path.read_text(encoding="utf-8")
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert len(text) < 300_000 and 12 <= len(cells) <= 28
    assert all(cell["outputs"] for cell in cells), "a code cell has no output"
    assert all(len("".join(cell["source"]).splitlines()) <= 20 for cell in cells)
    assert not [o for cell in cells for o in cell["outputs"] if o["output_type"] == "error"]
    assert str(pathlib.Path.home()) not in text and "/work/" not in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_exercises_are_not_attempted_and_say_so(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    printed = ["".join(o.get("text", "")) for c in cells for o in c.get("outputs", [])]
    assert sum(text == "not attempted\n" for text in printed) in (3, 4)
