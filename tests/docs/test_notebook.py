"""examples/quickstart.ipynb: its code cells run in order, and it is a notebook as Jupyter reads it."""

import json

import pytest

from tests.support.paths import ROOT

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def test_cells_run_in_order(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for number, cell in enumerate(json.loads(NOTEBOOK.read_text())["cells"], start=1):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}, cell {number}", "exec"), namespace)
    fused, stock = (namespace[name].history[9]["val_accuracy"] for name in ("trainer", "beside"))
    assert fused > 0.9 and stock > 0.9
    assert len(namespace["trainer"].history) == 12


def test_it_has_ten_cells_and_no_stored_output():
    """Outputs would name the machine that ran it, and go out of date."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert len(cells) == 10
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code")


def test_jupyter_reads_it():
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.read(NOTEBOOK, as_version=4))
