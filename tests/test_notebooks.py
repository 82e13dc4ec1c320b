"""Every notebook runs from top to bottom."""

import os

from nbclient import NotebookClient
import nbformat
import pytest

NOTEBOOKS = ("quickstart",)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs(root, name):
    notebook = nbformat.read(root / "notebooks" / f"{name}.ipynb", as_version=4)
    environment = {
        **os.environ,
        "XLA_FLAGS": "",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(root)}})
    client.execute(env=environment)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    text = "".join(output.get("text", "") for output in outputs)
    assert "sequence_accuracy_32" in text and "continuing from step" not in text.split("right")[-1]
    accuracy = float(text.split("sequence_accuracy_32")[1].split()[0])
    assert accuracy > 0.9  # words of the training length, after 500 steps
