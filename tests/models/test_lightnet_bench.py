"""The benchmark of one layer: the same function everywhere it is timed, memory, and its table."""

import json
import subprocess
import sys

import pytest

from scanax.models.lightnet import bench


def test_rows_and_table():
    configs = [bench.layer_config(mixer, 8, 2) for mixer in bench.MIXERS]
    rows = bench.benchmark(configs, (4, 4), repetitions=2, memory_gb=1.0)
    assert {(row["what"], row["mixer"]) for row in rows} == {
        (what, mixer) for what in ("forward", "forward+backward") for mixer in bench.MIXERS
    }
    assert all(row["milliseconds"] > 0 and row["temporary_mb"] > 0 for row in rows)
    table = bench.table(rows)
    assert table.count("\n") == len(rows) + 1 and "| 4 x 4 | forward | softmax |" in table


def test_what_needs_too_much_memory_is_not_run():
    """Softmax keeps N x N weights; its memory is told all the same."""
    configs = [bench.layer_config(mixer, 8, 2) for mixer in ("lightnet", "softmax")]
    rows = bench.benchmark(configs, (1024,), repetitions=1, memory_gb=4e-3)
    ran = {row["mixer"] for row in rows if row["milliseconds"] is not None}
    assert ran == {"lightnet"}
    assert max(row["temporary_mb"] for row in rows) > 8
    assert "| softmax | not run |  |  |" in bench.table(rows)


def test_command_line(tmp_path):
    command = [sys.executable, "-m", "scanax.models.lightnet.bench", "--repetitions=1"]
    small = ["--tokens=16", "--width=8", f"--out={tmp_path / 'out.json'}"]
    assert "| 4 x 4 |" in subprocess.check_output([*command, *small], text=True)
    assert len(json.loads((tmp_path / "out.json").read_text())["rows"]) == 12
    for wrong, message in (("--tokens=15", "not a square"), ("--width=9", "must divide")):
        result = subprocess.run([*command, wrong], text=True, stderr=subprocess.PIPE)
        assert result.returncode == 2 and message in result.stderr


@pytest.mark.parametrize("text", ["x", "2", "-4"])
def test_malformed_tokens(text):
    with pytest.raises(ValueError, match="not a square number"):
        bench._square(text)
