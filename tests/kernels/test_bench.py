"""The benchmark runs, and its table has the ratios."""

import json
import subprocess
import sys

import pytest

from scanax.kernels import bench


def test_rows_and_table():
    rows = bench.benchmark((1, 12, 2, 4, 8, 2), gated=True, repetitions=2)
    assert {(row["what"], row["implementation"]) for row in rows} == {
        (what, name) for what in ("forward", "forward+backward") for name in ("reference", "xla")
    }
    for row in rows:
        assert row["milliseconds"] > 0 and row["over_floor"] > 0
        if row["implementation"] == "reference":
            assert row["reference_over_this"] == 1
    assert bench.table(rows).count("\n") == len(rows) + 1


def test_command_line(tmp_path):
    command = [sys.executable, "-m", "scanax.kernels.bench", "--repetitions=1"]
    out = tmp_path / "bench.json"
    arguments = ["--shapes=1,5,1,2,2,1", f"--out={out}"]
    assert "| 1,5,1,2,2,1 |" in subprocess.check_output([*command, *arguments], text=True)
    assert len(json.loads(out.read_text())["rows"]) == 4
    wrong = subprocess.run([*command, "--shapes=1,5"], text=True, stderr=subprocess.PIPE)
    assert wrong.returncode == 2 and "six positive integers" in wrong.stderr


def test_flops_of_the_definition():
    assert bench.flops((4, 2048, 4, 64, 64, 1)) == 8 * 4 * 2048 * 4 * 64 * 64


@pytest.mark.parametrize("text", ["4,2048", "a,b,c,d,e,f", "1,0,1,1,1,1", ""])
def test_malformed_shape(text):
    with pytest.raises(ValueError, match="six positive integers"):
        bench.parse_shape(text)
