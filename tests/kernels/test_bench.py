"""The benchmark runs, and its table has the ratios."""

import json
import subprocess
import sys

import numpy as np
import pytest

from scanax.kernels import bench, peers

DELTA, ADDITIVE = bench.OPERATIONS["delta_product"], bench.OPERATIONS["additive_scan"]
EXPERTS = bench.OPERATIONS["expert_mlp"]


@pytest.mark.parametrize("operation", [DELTA, ADDITIVE])
def test_rows_and_table(operation):
    shape = (1, 12, 2, 4, 8, 2)[: len(operation.dimensions.split(","))]
    rows = bench.benchmark(operation, shape, gated=True, repetitions=2, others={})
    assert {(row["what"], row["implementation"]) for row in rows} == {
        (what, name) for what in ("forward", "forward+backward") for name in ("reference", "xla")
    }
    for row in rows:
        assert row["milliseconds"] > 0 and row["over_floor"] > 0
        if row["implementation"] == "reference":
            assert row["baseline_over_this"] == 1
    assert bench.table(operation, rows).count("\n") == len(rows) + 1


def test_experts_are_counted_by_the_compiler():
    """ragged_dot on CPU computes all experts twice over, blocks and places little too much."""
    rows = bench.benchmark(EXPERTS, (512, 16, 16, 8, 2), gated=True, repetitions=1, others={})
    assert len(rows) == 2 * len(EXPERTS.implementations()) and "gmm" not in str(rows)
    for row in rows:
        assert row["temporary_mb"] > 0 and row["milliseconds"] > 0
        ratio = row["compiled_gflops"] / row["gflops"]
        name = row["implementation"]
        if name in ("dense", "ragged"):
            assert ratio > 4
        else:
            assert 1 < ratio < (2.5 if name == "block 128" else 2)
        assert (row["baseline_over_this"] == 1) == (name == "ragged")
    table = bench.table(EXPERTS, rows)
    assert "| ragged / this | compiled / GFLOP | temporary MB |" in table
    assert table.count("\n") == len(rows) + 1


def test_peers_are_checked_and_timed():
    def peer(wrong):
        def make(*arguments):
            o = np.asarray(DELTA.function(*arguments)[0]) + wrong
            return lambda: o, lambda: o

        return make

    rows = bench.benchmark(DELTA, (1, 6, 1, 4, 4, 2), False, 1, {"package": peer(0.0)})
    assert {row["implementation"] for row in rows} == {"reference", "xla", "package"}
    assert all(row["peer_over_this"]["package"] > 0 for row in rows)
    assert "| package / this |" in bench.table(DELTA, rows)
    with pytest.raises(RuntimeError, match="package and ours differ by"):
        bench.benchmark(DELTA, (1, 6, 1, 4, 4, 2), False, 1, {"package": peer(1.0)})


def test_peer_of_transformers_is_the_same_operation():
    # The benchmark times it where a user has it; installing two gigabytes for one test is too much.
    for package in ("torch", "transformers"):
        pytest.importorskip(package, reason=f"pip install {package} to compare with its kernel")
    bench.benchmark(DELTA, (2, 70, 2, 8, 8, 2), True, 1, {"transformers": peers.transformers})


def test_command_line(tmp_path):
    command = [sys.executable, "-m", "scanax.kernels.bench", "--repetitions=1"]
    out = tmp_path / "bench.json"
    arguments = ["--shapes=1,5,1,2,2,1", "--nopeers", f"--out={out}"]
    assert "| 1,5,1,2,2,1 |" in subprocess.check_output([*command, *arguments], text=True)
    assert len(json.loads(out.read_text())["rows"]) == 4
    wrong = subprocess.run([*command, "--shapes=1,5"], text=True, stderr=subprocess.PIPE)
    assert wrong.returncode == 2 and "6 positive integers B,T,H,K,V,N" in wrong.stderr


def test_flops_of_the_definition():
    assert DELTA.flops((4, 2048, 4, 64, 64, 1)) == 8 * 4 * 2048 * 4 * 64 * 64
    assert ADDITIVE.flops((4, 2048, 4, 64, 64)) == 5 * 4 * 2048 * 4 * 64 * 64
    assert EXPERTS.flops((2048, 352, 352, 16, 2)) == 4 * 2048 * 2 * 352 * 352


@pytest.mark.parametrize("text", ["4,2048", "a,b,c,d,e,f", "1,0,1,1,1,1", ""])
def test_malformed_shape(text):
    with pytest.raises(ValueError, match="6 positive integers B,T,H,K,V,N"):
        bench.parse_shape(DELTA, text)
