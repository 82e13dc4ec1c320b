"""The benchmark of one layer: its rows, its table, and what it does not run."""

import json
import os
import subprocess
import sys

import pytest

COMMAND = [sys.executable, "-m", "scanax.models.lightnet.bench", "--repetitions=1", "--width=8"]


FAST = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # what is timed is not under test


def test_rows_and_table(tmp_path):
    """Softmax keeps N x N weights: its memory is told, and it is not run."""
    options = ["--tokens=16,1024", "--memory_gb=4e-3", f"--out={tmp_path / 'out.json'}"]
    table = subprocess.check_output([*COMMAND, *options], text=True, env=FAST)
    assert "| 4 x 4 | forward | softmax |" in table and "| softmax | not run |  |  |" in table
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert len(rows) == 24 and table.count("\n| ") == 25
    for row in rows:
        too_much = row["mixer"] == "softmax" and row["grid"] in ([1024], [32, 32])
        assert (row["milliseconds"] is None) == too_much
        assert (row["temporary_mb"] > 4) == too_much


@pytest.mark.parametrize(
    "wrong, message",
    [("--tokens=15", "not a square"), ("--tokens=x", "not a square"), ("--width=9", "must divide")],
)
def test_mistakes(wrong, message):
    result = subprocess.run([*COMMAND, wrong], text=True, stderr=subprocess.PIPE)
    assert result.returncode == 2 and message in result.stderr, result.stderr
