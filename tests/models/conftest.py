"""What the model tests share: compiling fast rather than well, and one way to compare."""

import functools

import jax
import numpy as np
import pytest

# Programs here run once on tiny arrays: compiling them is nearly all of the time.
COMPILER_OPTIONS = {"xla_backend_optimization_level": 0}


@pytest.fixture(scope="module", autouse=True)
def compiler(hurried_compiler):
    """Also for what tests compile without ``jit``, operation by operation."""


@pytest.fixture(scope="session")
def jit():
    """``jax.jit`` with a compiler that hurries."""
    return functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)


@pytest.fixture(scope="session")
def check():
    """Asserts that ``got`` is ``want`` up to a tolerance relative to the largest entry."""

    def check(name, got, want, tolerance):
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        assert got.shape == want.shape, name
        error = np.max(np.abs(got - want), initial=0) / np.max(np.abs(want), initial=1e-30)
        assert error <= tolerance, f"{name}: error {error:.1e} > {tolerance:.0e}"

    return check
