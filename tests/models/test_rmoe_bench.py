"""The benchmark of routers: its rows, its table, its mistakes."""

import json
import os
import subprocess
import sys

import pytest

from scanax.models.rmoe import bench

COMMAND = [sys.executable, "-m", "scanax.models.rmoe.bench", "--repetitions=1"]


FAST = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # what is timed is not under test


def test_rows_and_table(tmp_path):
    """A loop over layers is counted once: the share of the router is that of a layer."""
    options = ["--sizes=2,16;3,16", "--router=gru", "--rows=2", "--tokens=8"]
    options.append(f"--out={tmp_path / 'out.json'}")
    table = subprocess.check_output([*COMMAND, *options], text=True, env=FAST)
    assert table.count("\n| ") == 5 and "| 2,16 | gru |" in table
    assert all("| 1.000 |" in line for line in table.splitlines() if "| linear |" in line)
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["router"] for row in rows] == ["linear", "gru"] * 2
    for two, three in zip(rows[:2], rows[2:], strict=True):
        assert two["router_share"] == pytest.approx(three["router_share"], rel=0.02)
        assert two["parameters"] < three["parameters"] and two["milliseconds"] > 0
    assert 0 < rows[0]["router_share"] < rows[1]["router_share"] < 1


def test_flops_of_routers():
    """Those of the products, three times with the backward, and what is not a product."""
    tokens, d, p, e = 64, 24, 128, 16
    for name, products in (
        ("linear", d * e),
        ("rnn", d * p + 2 * p * p + p * e),
        ("gru", d * p + 6 * p * p + p * e),
        ("lstm", d * p + 8 * p * p + p * e),
        ("mlp", d * 256 + 256 * e),
        ("xmoe", d * 16 + 16 * e),
    ):
        config = bench.model_config(1, d, 8, **bench.ROUTERS[name])
        ratio = bench.router_flops(config, tokens) / (6 * tokens * products)
        assert 1 <= ratio < (2.5 if products < p * p else 1.2), (name, ratio)


@pytest.mark.parametrize(
    "wrong, message",
    [("--sizes=8", "two positive integers"), ("--sizes=2,12", "num_heads"), ("more", "unexpected")],
)
def test_mistakes(wrong, message):
    result = subprocess.run([*COMMAND, wrong], text=True, stderr=subprocess.PIPE)
    assert result.returncode == 2 and message in result.stderr, result.stderr
