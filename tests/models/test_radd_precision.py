"""The law of draws with coarse noise, and the commands about samplers."""

import os
import subprocess
import sys

import numpy as np
import pytest

from scanax.models.radd import precision, rates
from scanax.models.radd.schedules import LogLinear


def zipf(vocab: int) -> np.ndarray:
    p_V = 1 / np.arange(1, vocab + 1)
    return p_V / p_V.sum()


def test_fine_noise_has_the_law_itself():
    p_V, psi_N = zipf(50), rates.unmask_rates(LogLinear(), 64)
    np.testing.assert_allclose(precision.published_law(p_V, psi_N, 1e-12), p_V, rtol=1e-6)
    coarse = [precision.published_law(p_V, psi_N, 2.0**-k)[-1] for k in (20, 16, 12)]
    assert p_V[-1] > coarse[0] > coarse[1] > coarse[2]


@pytest.mark.parametrize("psi", [0.002, 0.02])
def test_a_race_by_enumeration(psi):
    """A single token against staying masked, over all pairs of uniforms of 12 bits."""
    step = 2.0**-12
    grid = -np.log(np.arange(1 / step) * step + 1e-10)[::-1]  # E of u = 1 - step, ..., 0
    wins = np.searchsorted(grid, grid * (1 - psi) / psi, side="right")
    exact = np.mean(1 - wins * step)
    a = step * (1 - psi) / psi
    assert psi * a / np.expm1(a) == pytest.approx(exact, rel=0.02, abs=step / 50)


def test_sampled_tokens_have_the_law():
    p_V, psi_N = zipf(20), rates.unmask_rates(LogLinear(), 512)
    counts = np.bincount(precision.sampled(p_V, psi_N, 4096, 0), minlength=20)
    assert ((counts - 4096 * p_V) ** 2 / (4096 * p_V)).sum() < 50  # 19 degrees of freedom


def test_command(tmp_path, root):
    out = tmp_path / "picture.png"
    module = "scanax.models.radd.precision"
    options = ["--vocab=30", "--tokens=20", f"--out={out}"]
    done = subprocess.run(
        [sys.executable, "-m", module, *options], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "| 4096 |" in done.stdout and out.read_bytes()[:4] == b"\x89PNG"
    wrong = subprocess.run([sys.executable, "-m", module, "x"], cwd=root, capture_output=True)
    assert wrong.returncode == 2


def test_benchmark(tmp_path, root):
    module, out = "scanax.models.radd.bench", tmp_path / "figures.json"
    small = ["--lengths=8", "--batches=2", "--multiples=2", "--layers=1", "--width=32"]
    small += ["--seconds=0.05", "--repetitions=1", f"--out={out}"]
    done = subprocess.run(
        [sys.executable, "-m", module, *small],
        **{"cwd": root, "capture_output": True, "text": True},
        env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},  # what is timed is not tested
    )
    assert done.returncode == 0, done.stderr
    assert "| 8 | 2 | 16 | 16 |" in done.stdout and out.exists()
