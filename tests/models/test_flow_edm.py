"""EDM's sampler as a recipe of flows: the same states as its own code's, from velocities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scanax.models.rectified_flow import Solver, diffusion, path, recipe, solve


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_recipe_is_the_published_sampler(golden, method):
    """With a Gaussian's exact denoiser, made into a velocity."""
    with np.load(golden / "rectflow" / "edm_conversion.npz") as saved:
        z, mean, std = (saved[f"edm_{n}"] for n in ("latents", "gauss_mu", "gauss_s"))
        expected = saved[f"edm_N5_{method}_traj"]
    with jax.enable_x64(True):
        mean, std = (jnp.asarray(x, jnp.float64) for x in (mean, std))

        def velocity(x, t_B):
            t = path.along(t_B, x)
            sigma = (1 - t) / t
            centre = jnp.broadcast_to(mean, x.shape)
            denoised = (std**2 * x / t + sigma**2 * centre) / (std**2 + sigma**2)
            return diffusion.velocity_of_denoised(denoised, x, t_B)

        solver = recipe(f"edm_{method}:5")
        found = solve(velocity, jnp.asarray(z, jnp.float64), solver, trajectory=True)
        assert int(found.nfe) == {"euler": 5, "heun": 9}[method]
        np.testing.assert_allclose(found.trajectory, expected, rtol=1e-7, atol=1e-7)
        np.testing.assert_allclose(found.x, expected[-1], rtol=1e-7, atol=1e-7)


def test_impossible_grids_are_errors():
    with pytest.raises(ValueError, match="from a time above 0 to 1"):
        Solver("edm_heun", (0.0, 1.0))
    with pytest.raises(ValueError, match="has rule 'default'"):
        Solver("edm_heun", (0.1, 1.0), displacement="unit")
