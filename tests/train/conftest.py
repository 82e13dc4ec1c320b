"""What tests of training share: promotion that optax can live with, and a trained flow."""

from flow_runs import toy
import jax
import pytest

from scanax.train import run as run_lib


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
