"""The benchmark of training language models: both sides train alike, its tables, its mistakes."""

import subprocess
import sys

import jax
import pytest

from scanax.models import language_bench as bench

COMMAND = [sys.executable, "-m", "scanax.models.language_bench"]

# What is compared with is no dependency: without it there is nothing to compare.
TORCH = "the benchmark's other side: pip install torch transformers"
FLA = "the benchmark's other side: pip install torch, and fla-core without its dependencies"


@pytest.mark.parametrize(
    "family, peer, packages",
    [
        ("delta_product", "torch", ("torch", "transformers")),
        ("delta_product", "fla", ("torch", "fla")),
        ("lightnet", "fla", ("torch", "fla")),
    ],
)
def test_trains_alike(family, peer, packages):
    """Equal losses on rows that do not fill a chunk."""
    for package in packages:
        pytest.importorskip(package, reason=FLA if peer == "fla" else TORCH)
    public = bench.published(family, 16, 1, 2, 32, 3) | {"tie_word_embeddings": False}
    rows_XBT = bench.markov(32, 10, 2, 70)
    with jax.numpy_dtype_promotion("standard"):  # inside of optax
        _, trainers = bench.begin(family, public, rows_XBT[0], [peer])
        losses = {name: [side.step(x) for x in rows_XBT] for name, side in trainers.items()}
    assert set(losses) == {"scanax", peer}
    assert losses[peer] == pytest.approx(losses["scanax"], rel=1e-5)


def test_lightnet_and_its_tables():
    """The losses are compared before anything is timed; our parts add up to our step."""
    pytest.importorskip("torch", reason=TORCH)
    public = bench.published("lightnet", 16, 1, 2, 32, 1) | {"use_short_conv": True}
    with jax.numpy_dtype_promotion("standard"):
        result = bench.benchmark("lightnet", public, (10, 2, 70), 1, ["torch"])
    assert [row["library"] for row in result["rows"]] == ["scanax", "torch"]
    assert (
        result["loss_error"] < 1e-5
        and result["tokens"] == 140
        and result["rows"][0]["temporary_mb"] > 0
    )
    *_, ours, theirs = bench.table([result]).splitlines()
    assert f"| lightnet | {result['parameters']:,} | scanax |" in ours and "| 1.00 |" in theirs
    cells = [line.split("|") for line in bench.parts_table([result]).splitlines()[2:]]
    assert [cell[2].strip() for cell in cells][2:4] == ["scan", "MLP"]
    assert sum(float(cell[4].strip(" %")) for cell in cells) == pytest.approx(100, abs=1)
    alone = {**result, "rows": result["rows"][:1]}
    assert "|  |" in bench.table([alone]) and bench.table([alone]).count("\n") == 2


@pytest.mark.parametrize("wrong", [1.01, float("nan")])
def test_no_ratio_of_different_models(wrong):
    with pytest.raises(bench.Disagreement, match="at step 1"):
        bench.compare("lightnet", {"scanax": [2.0, 1.0, 1.0], "torch": [2.0, wrong, 1.0]})
    assert bench.compare("lightnet", {"scanax": [2.0, 1.0]}) is None


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("--family=lightnet,gru", "'gru' is not one of"),
        ("--heads=3", "must divide"),
        ("--peers=jax", "'jax' is not one of"),
        ("more", "unexpected"),
    ],
)
def test_mistakes(wrong, message):
    result = subprocess.run([*COMMAND, wrong], text=True, stderr=subprocess.PIPE)
    assert result.returncode == 2 and message in result.stderr, result.stderr
