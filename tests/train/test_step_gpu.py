"""Training steps of language models with the kernels for Hopper GPUs in them."""

from hopper_lowering import H100, shared_memory
import jax
from jax.sharding import AbstractMesh, AxisType
import numpy as np
import pytest
from stepping import train

from scanax.configs import base
from scanax.kernels import hopper
from scanax.train import mesh as mesh_lib, state as state_lib, tasks
from scanax.train.config import from_dict

pytestmark = pytest.mark.usefixtures("standard_promotion")


def config(family: str, **changes):
    values = base.get_config("language_model", family)
    small = {
        "num_steps": 3,
        "batch_size": 2,
        "mesh.data": 1,
        "model.vocab_size": 258,
        "model.hidden_size": 64,
        "model.num_heads": 1,
        "model.num_hidden_layers": 1,
        "model.intermediate_size": 64,
        "model.dtype": "bfloat16",
        "data.length": 16,
        "evaluation.batch_size": 2,
        "optimizer.warmup_steps": 0,
    }
    if family == "delta_product":
        small |= {"model.head_dim": 64, "model.num_householder": 2, "model.use_forget_gate": True}
    values.update_from_flattened_dict({**small, **changes})
    return from_dict(values.to_dict())


@pytest.mark.parametrize(
    ("family", "scan"), [("delta_product", "delta_product"), ("lightnet", "additive_scan")]
)
def test_gradients_lower_for_two_gpus_with_remat(family, scan):
    """Rows divided over the devices of a mesh, every block computed once more in the backward."""
    c = config(family, **{"model.implementation": "pallas_gpu", "model.remat": True})
    task = tasks.build(c)
    state = state_lib.shapes(task, c)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), c.batch_size))

    def loss(params, extra, batch, keys):
        return task.loss(params, extra, batch, keys)[0]

    sizes = (2,) + (1,) * (len(mesh_lib.MESH_AXES) - 1)
    mesh = AbstractMesh(
        sizes, mesh_lib.MESH_AXES, (AxisType.Auto,) * len(sizes), abstract_device=H100
    )
    arguments = (state.params, state.extra, dict(task.batch_spec), keys)
    needed = shared_memory(jax.grad(loss), *arguments, mesh=mesh)
    assert {f"{scan}_{part}" for part in ("prepare", "forward", "backward", "gradients")} <= {
        *needed
    }


@pytest.mark.skipif(
    not hasattr(hopper.plgpu, "InterpretGPUParams"),
    reason="Pallas interprets kernels for GPUs from JAX 0.11 on, which needs Python 3.12",
)
def test_trains_as_with_plain_jax():
    """The same losses, interpreted, but for the rounded factors of the kernels' products."""
    of = lambda name: config("delta_product", **{"model.implementation": name})
    _, expected = train(of("xla"), steps=2)
    with hopper.interpreted(hopper.plgpu.InterpretGPUParams()):
        _, actual = train(of("pallas_gpu"), steps=2)
    np.testing.assert_allclose(actual, expected, rtol=2e-3)
    assert actual[-1] < actual[0]
