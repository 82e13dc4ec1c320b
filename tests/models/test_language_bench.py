"""The benchmark of training language models: both sides train alike, its tables, its mistakes."""

import subprocess
import sys

import jax
import pytest

from scanax.models import language_bench as bench

COMMAND = [sys.executable, "-m", "scanax.models.language_bench"]


@pytest.mark.parametrize(
    "family, changes",
    [
        ("delta_product", {"num_householder": 3, "tie_word_embeddings": False}),
        ("lightnet", {"use_short_conv": True}),
    ],
)
def test_both_sides_train_alike(family, changes):
    """Equal losses of 20 steps, else ``benchmark`` raises; rows that do not fill a chunk."""
    for package in bench.PACKAGES[family]:
        pytest.importorskip(package)
    public = bench.published(family, 16, 1, 2, 32, 2) | changes
    with jax.numpy_dtype_promotion("standard"):  # inside of optax
        result = bench.benchmark(family, public, (20, 2, 70), 1, with_torch=True)
    ours, theirs = (result["losses"][name] for name in ("scanax", "PyTorch"))
    assert theirs == pytest.approx(ours, rel=1e-5) and ours[-1] < ours[0]
    table = bench.table([result])
    assert f"| {family} | {result['parameters']:,} | scanax |" in table
    assert table.count("\n| ") == 2 and "| 1.00 |" in table.splitlines()[-1]


def test_without_torch():
    """Our side alone: no ratio, and parts that add up to the step."""
    public = bench.published("lightnet", 8, 2, 1, 16, 1)
    with jax.numpy_dtype_promotion("standard"):
        result = bench.benchmark("lightnet", public, (1, 1, 16), 1, with_torch=False)
    (row,) = result["rows"]
    assert row["milliseconds"] > 0 and row["temporary_mb"] > 0 and result["tokens"] == 16
    assert "|  |" in bench.table([result])
    cells = [line.split("|") for line in bench.parts_table([result]).splitlines()[2:]]
    assert [cell[2].strip() for cell in cells][2:4] == ["scan", "MLP"]
    assert sum(float(cell[4].strip(" %")) for cell in cells) == pytest.approx(100, abs=1)


@pytest.mark.parametrize("wrong", [1.001, float("nan")])
def test_no_ratio_of_different_models(wrong):
    with pytest.raises(bench.Disagreement, match="at step 1"):
        bench.compare("lightnet", {"scanax": [2.0, 1.0, 1.0], "PyTorch": [2.0, wrong, 1.0]})
    bench.compare("lightnet", {"scanax": [2.0, 1.0]})


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("--family=lightnet,gru", "'gru' is not one of"),
        ("--heads=3", "must divide"),
        ("more", "unexpected"),
    ],
)
def test_mistakes(wrong, message):
    result = subprocess.run([*COMMAND, wrong], text=True, stderr=subprocess.PIPE)
    assert result.returncode == 2 and message in result.stderr, result.stderr
