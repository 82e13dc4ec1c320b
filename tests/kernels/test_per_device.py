"""What the compiler cannot divide runs per device: equal to one device, on eight simulated ones."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType
import pytest

from scanax.kernels.per_device import by_heads, by_rows, per_device

HERE = pathlib.Path(__file__)


def main() -> None:
    """Run as a program with eight devices, whatever the other tests have."""
    import numpy as np

    from scanax.kernels import backends
    from scanax.kernels.additive_scan import api as additive
    from scanax.kernels.delta_product import api as delta
    from scanax.train.mesh import MeshConfig, make_mesh, replicated

    jax.config.update("jax_numpy_rank_promotion", "raise")
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2, expert=1, sequence=1))
    normal = lambda *shape: jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    batch, tokens, heads, width = 4, 24, 2, 8
    q, state = normal(batch, tokens, heads, width), normal(batch, heads, width, width)
    k, beta = normal(batch, tokens, 2, heads, width) / 4, jnp.ones((batch, tokens, 2, heads))
    reset = jnp.zeros((batch, tokens), bool).at[1, 5].set(True)
    options = {"scale": 0.3, "chunk_size": 8}

    def gradients(contract, backend, inputs):
        both = {"contract": contract, "forward": backend, "backward": backend}

        def loss(inputs):
            o, final = backends.scan(*inputs, reset, **options, **both)
            return jnp.sum(jnp.sin(o)) + sum(jnp.sum(jnp.cos(x)) for x in jax.tree.leaves(final))

        return jax.device_get(jax.jit(jax.value_and_grad(loss))(inputs))

    g = -jnp.abs(q[..., 0])
    cases = (
        (delta.CONTRACT, delta.BACKENDS["xla"], (q, k, 2 * k, beta, g, state)),
        (additive.CONTRACT, additive.BACKENDS["xla"], (q, q, q, None, (state, q[:, 0]))),
    )
    for contract, backend, inputs in cases:
        expected = gradients(contract, backend, inputs)
        inputs = jax.device_put(inputs, replicated(mesh))
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            actual = gradients(contract, backend._replace(divisible=False), inputs)
        for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5)

    # Columns by heads: the gradient has the values, and comes back in the division, of the columns.
    x, columns = normal(batch, 6), normal(6, 2 * heads * width)

    def loss(columns):
        kernel = by_heads(columns, (2, heads, width))
        assert kernel.ndim == (4 if jax.sharding.get_abstract_mesh().axis_names else 2)
        return jnp.sum(jnp.sin(jnp.tensordot(x, kernel, axes=1)))

    expected = jax.jit(jax.grad(loss))(columns)
    divided = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", "tensor"))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        actual = jax.jit(jax.grad(loss))(jax.device_put(columns, divided))
    np.testing.assert_allclose(jax.device_get(actual), expected, rtol=1e-5, atol=1e-5)
    assert actual.sharding.spec[-1] == "tensor", actual.sharding


def test_eight_devices_equal_one():
    flags = "--xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # nearly all of the time is compilation
    subprocess.run([sys.executable, str(HERE)], env=environment, check=True)


def test_what_does_not_divide_is_named():
    function = per_device(lambda x: x, ("BH",), "BH")
    rows, heads = jnp.ones((5, 3)), jnp.ones((2, 4))
    mesh = AbstractMesh((2, 3), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    with jax.sharding.use_abstract_mesh(mesh):
        with pytest.raises(ValueError, match="5 rows cannot be divided among the 2 devices"):
            function(rows)
        with pytest.raises(ValueError, match="4 heads cannot be divided among the 3 devices"):
            function(heads)


def test_heads_that_do_not_divide_stay_columns():
    x = jnp.ones((3, 2 * 4 * 5))
    mesh = AbstractMesh((2, 3), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    assert by_heads(x, (2, 4, 5)) is x
    with jax.sharding.use_abstract_mesh(mesh):
        assert by_heads(x, (2, 4, 5)) is x
        assert by_heads(x, (40,)) is x


def test_rows_that_do_not_divide_stay():
    x = jnp.ones((3, 4))
    assert by_rows(x) is x
    mesh = AbstractMesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    with jax.sharding.use_abstract_mesh(mesh):
        assert by_rows(x) is x


if __name__ == "__main__":
    main()
