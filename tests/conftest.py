"""Settings of the whole suite: strict dtypes and ranks, four devices, one compilation cache."""

import os
import pathlib
import tempfile

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(pathlib.Path(tempfile.gettempdir()) / f"scanax-test-cache-{os.getuid()}"),
)
# Subprocesses inherit these, so that runs of the command line share compiled programs.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_debug_key_reuse", True)

GOLDEN = pathlib.Path(__file__).parent / "golden"
ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def hurried_compiler():
    """Machine code as it comes: for tests that compile much and compute little."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def golden() -> pathlib.Path:
    """The folder of reference values."""
    return GOLDEN


@pytest.fixture
def root() -> pathlib.Path:
    """The repository's root."""
    return ROOT
