"""What tests of training share: a fast compiler, promotion for optax, and a trained flow."""

from flow_runs import toy
import jax
import pytest

from scanax.train import run as run_lib


@pytest.fixture(scope="module", autouse=True)
def compiler(hurried_compiler):
    """Runs here are of a few steps on tiny models; those of the command line compile in full."""


@pytest.fixture(scope="module")
def standard_promotion():
    """Optax's Adam itself raises a float to an integer power, which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, standard_promotion):
    """The folder of a run of points."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    run_lib.train(toy(), folder)
    return folder
