"""Experts divided among devices, against one device: values and gradients, on eight devices."""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import pytest

HERE = pathlib.Path(__file__)


def main() -> None:
    """Run as a program with eight devices, whatever the other tests have."""
    import jax.numpy as jnp
    import numpy as np

    from scanax.kernels import Experts, expert_mlp, expert_mlp_sharded
    from scanax.train.mesh import MeshConfig, make_mesh

    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape))
    tokens, number = 48, 8
    few = np.where(np.arange(number) < 2, 0.0, -1e9)  # all tokens to the first device's experts

    def case(gated: bool, choices: int, bias):
        logits = rng.normal(size=(tokens, number)) + bias
        index = jnp.asarray(np.argsort(-logits, axis=1)[:, :choices])
        gate = normal(number, 6, 5) if gated else None
        biases = (None, None) if gated else (normal(number, 5), normal(number, 6))
        experts = Experts(normal(number, 6, 5), normal(number, 5, 6), gate, *biases)
        weight = jax.nn.softmax(normal(tokens, choices))
        mask = jnp.asarray(rng.random(tokens) < 0.8)
        keep = jnp.asarray(2.0 * (rng.random((tokens, choices, 5)) < 0.5))
        return normal(tokens, 6), index, weight, experts, {"mask": mask, "keep": keep}

    cases = [case(True, 2, 0.0), case(False, 3, 0.0), case(True, 2, few), case(True, 8, 0.0)]

    def gradients(function, x, index, weight, experts, factors, **options):
        def loss(x, weight, experts):
            y = function(x, index, weight, experts, **factors, **options)
            return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)), y

        run = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
        return jax.device_get(run(x, weight, experts))

    wanted = [gradients(expert_mlp, *given, implementation="dense") for given in cases]

    for sizes in ({"expert": 2}, {"expert": 4, "data": 2}, {"expert": 8}):
        mesh = make_mesh(
            MeshConfig(**{"data": 1, "fsdp": 1, "tensor": 1, "expert": 1, "sequence": 1} | sizes)
        )
        pairs = list(zip(cases, wanted, strict=True))
        for given, want in pairs if mesh.size == 8 and "data" in sizes else pairs[1:3]:
            all_places = {"capacity_factor": float(number)}
            for options in (
                {},
                all_places,
                {"implementation": "ragged"},
                {**all_places, "policy": "position"},
            )[: None if given is cases[0] else 2]:
                got = gradients(expert_mlp_sharded, *given, mesh=mesh, **options)
                for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
                    error = np.abs(a - b).max() / max(1, np.abs(b).max())
                    assert error <= 1e-12, (sizes, options, error)
        # A device drops by its own tokens: each part of the row alone gives the same.
        x, index, weight, experts, _ = cases[0]
        few_places = lambda function, **options: jax.jit(
            functools.partial(function, capacity_factor=0.75, **options)
        )
        got = few_places(expert_mlp_sharded, mesh=mesh)(x, index, weight, experts)
        parts = [jnp.split(a, mesh.size) for a in (x, index, weight)]
        one = few_places(expert_mlp)
        alone = [one(*part, experts) for part in zip(*parts, strict=True)]
        assert np.abs(got - jnp.concatenate(alone)).max() <= 1e-12
        try:
            expert_mlp_sharded(x[:-1], index[:-1], weight[:-1], experts, mesh=mesh)
        except ValueError as error:
            assert "47 tokens do not divide" in str(error)
        else:
            raise AssertionError("47 tokens were divided")
    print("equal")


def test_divided_experts_are_the_same_experts():
    flags = "--xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # nearly all of the time is compilation
    ran = subprocess.run(
        [sys.executable, str(HERE)], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0 and ran.stdout.endswith("equal\n"), ran.stderr[-3000:]


def test_what_cannot_be_divided():
    import jax.numpy as jnp

    from scanax.kernels import Experts, expert_mlp_sharded
    from scanax.train.mesh import MeshConfig, make_mesh

    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1, expert=2, sequence=1))

    def run(number: int, **options):
        experts = Experts(jnp.ones((number, 4, 5)), jnp.ones((number, 5, 4)))
        x, index, weight = jnp.ones((4, 4)), jnp.zeros((4, 1), int), jnp.ones((4, 1))
        return expert_mlp_sharded(x, index, weight, experts, mesh=mesh, **options)

    with pytest.raises(ValueError, match="3 experts do not divide among 2 devices"):
        run(3)
    with pytest.raises(ValueError, match="'block' drops no token"):
        run(2, capacity_factor=1.0, implementation="block")
    with pytest.raises(ValueError, match="needs a capacity_factor"):
        run(2, implementation="capacity")
    with pytest.raises(ValueError, match="keep has shape"):
        run(2, keep=jnp.ones((4, 5)))


if __name__ == "__main__":
    main()
