"""Diffusion networks as velocities, and EDM's sampler, against the published code."""

import flow_goldens as goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scanax.models.rectified_flow import Solver, diffusion, solve


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def network(x, c_noise_B):
    """The files' F(x, c) = sin(3 x) + c x."""
    return jnp.sin(3 * x) + c_noise_B.reshape(-1, *(1,) * (x.ndim - 1)) * x


def test_conversions(check):
    """Their time is 1 - ours."""
    file = goldens.load("edm_conversion")
    t = 1 - jnp.asarray(file["t"])
    sigma = diffusion.noise_level(t)
    check("sigma", sigma / file["sigma"], np.ones(len(t)), 1e-9)
    np.testing.assert_allclose(diffusion.time_of(sigma), t, rtol=1e-12)
    for key, found in diffusion.edm_coefficients(sigma)._asdict().items():
        np.testing.assert_allclose(found, file[key], rtol=1e-9, atol=1e-12, err_msg=key)
    np.testing.assert_allclose(diffusion.velocity_weight(t), file["rf_weight_lambda_v"], rtol=1e-9)
    vp = diffusion.vp(t)
    for key, found in (("tau", vp.tau), ("alpha", vp.alpha), ("xscale", vp.scale)):
        np.testing.assert_allclose(found, file[f"vp_{key}"], rtol=1e-7, err_msg=key)
        np.testing.assert_allclose(found[1:], file[f"vp_{key}"][1:], rtol=1e-9, err_msg=key)
    back = diffusion.vp_noise_level(vp.tau)
    np.testing.assert_allclose(back[1:], file["vp_sigma_roundtrip"][1:], rtol=1e-9)
    np.testing.assert_allclose(back, sigma, rtol=1e-11)  # where the published form is at 3e-8


def test_edm_velocity(check, jit):
    """The published form, in float64; and in float32 where that form loses its digits."""
    file = goldens.load("edm_conversion")
    x = goldens.last(file["fake_xt"].astype(np.float64))
    t = 1 - jnp.float64(file["fake_t_f32"])
    velocity = jit(lambda x, t: diffusion.edm_velocity(network, x, t))
    v = velocity(x, t)
    check("v", goldens.first(v), -file["fake_v_f64"], 1e-9)
    check("float32", goldens.first(v)[3:], -file["fake_v_ref_f32"][3:], 2e-6)
    check("float32", goldens.first(v)[:3], -file["fake_v_ref_f32"][:3], 1e-3)
    denoised = diffusion.denoised_of_velocity(v, x, t)
    check("denoised", goldens.first(denoised), file["fake_denoised_f64"], 1e-9)
    again = diffusion.velocity_of_denoised(denoised, x, t)
    np.testing.assert_allclose(again, v, rtol=1e-6, atol=1e-9)
    narrow = t.astype(jnp.float32)
    found = velocity(x.astype(jnp.float32), narrow)
    want = velocity(x, narrow.astype(jnp.float64))
    assert found.dtype == jnp.float32
    for row in range(len(t)):
        check(f"t = {narrow[row]}", found[row], want[row], 2e-6)


def test_vp_velocity(jit):
    """The exact network of normal data gives the exact velocity, wherever VP was trained."""
    t = jnp.asarray([0.01, 0.1, 0.5, 0.9, 0.999, 1.0])
    x = jnp.linspace(-2, 2, 6 * 5).reshape(6, 5)
    mean, spread = 0.7, 0.4

    def noise(x, label_B):
        """E[eps | x_vp] at 999 tau."""
        sigma = diffusion.vp_noise_level(label_B / 999)[:, None]
        alpha = 1 / jnp.sqrt(1 + jnp.square(sigma))
        variance = jnp.square(alpha * spread) + jnp.square(alpha * sigma)
        return alpha * sigma * (x - alpha * mean) / variance

    found = jit(lambda x, t: diffusion.vp_velocity(noise, x, t))(x, t)
    at = t[:, None]
    variance = jnp.square(at * spread) + jnp.square(1 - at)
    gain = (at * spread**2 - (1 - at)) / variance
    np.testing.assert_allclose(found, mean + gain * (x - at * mean), rtol=1e-9)
    labels = []
    diffusion.vp_velocity(lambda x, label_B: labels.append(label_B) or x, x, t * 1e-4)
    assert np.all(labels[0] <= 999) and labels[0][0] == 999


def test_edm_sampler(check, jit):
    file = goldens.load("edm_conversion")
    mean, spread = goldens.last(file["edm_gauss_mu"])[None], float(file["edm_gauss_s"])
    z = goldens.last(file["edm_latents"].astype(np.float64))

    def denoiser(x, sigma_B):
        square = jnp.square(sigma_B)[:, None, None, None]
        return (spread**2 * x + square * mean) / (spread**2 + square)

    check("sigmas", diffusion.edm_sigmas(18), file["edm_sigmas_N18"], 1e-9)
    rounded = lambda n: tuple(np.float32(diffusion.edm_sigmas(n)).tolist())  # as the file's are
    cases = {f"edm_N{n}_{m}": (n, m) for n in (5, 18) for m in diffusion.EDM_METHODS}

    def run(z):
        found = {
            key: diffusion.edm_sample(denoiser, z, rounded(n), method)
            for key, (n, method) in cases.items()
        }
        t0 = 1 / 81  # sigma = 80; the same ODE in the flow's time, from the same point
        velocity = lambda x, t: diffusion.velocity_of_denoised(
            denoiser(x / t[:, None, None, None], diffusion.noise_level(t)), x, t
        )
        flow = solve(velocity, t0 * 80.0 * z, Solver("rk45", (t0, 1 - 1e-6), rtol=1e-9, atol=1e-9))
        return found, flow, diffusion.edm_sample(denoiser, z, diffusion.edm_sigmas(400))

    found, flow, fine = jit(run)(z)
    for key, (n, method) in cases.items():
        check(key, goldens.first(found[key].trajectory), file[f"{key}_traj"], 1e-9)
        np.testing.assert_array_equal(found[key].x, found[key].trajectory[-1])
        assert found[key].nfe == (2 * n - 1 if method == "heun" else n)
    assert np.all(flow.reached)
    check("flow", flow.x, fine.x, 1e-4)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: diffusion.edm_sigmas(0), "steps >= 1"),
        (lambda: diffusion.edm_sigmas(4, low=90.0), "low < high"),
        (lambda: diffusion.edm_sample(network, jnp.ones((1, 2)), (1.0, 0.5)), "end in 0"),
        (lambda: diffusion.edm_sample(network, jnp.ones((1, 2)), (1.0, 2.0, 0.0)), "must fall"),
        (lambda: diffusion.edm_sample(network, jnp.ones((1, 2)), (1.0, 0.0), "rk4"), "euler, heun"),
    ],
)
def test_bad_diffusion(call, message):
    with pytest.raises(ValueError, match=message):
        call()
    assert diffusion.edm_sigmas(1) == (80.0, 0.0)
