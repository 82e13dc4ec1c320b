"""Training times: the U-shaped density against its reference, and every name."""

import flow_goldens as goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scanax.models.rectified_flow import time_density, times


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def test_u_shaped(check):
    file = goldens.load("rfpp_tdist")
    p, u = jnp.asarray(file["p"]), jnp.asarray(file["u"])
    for a in (1, 2, 4, 8):
        want = goldens.part(file, f"a{a}_")
        check("density", times.u_shaped_density(u, a), want["U_pdf"], 1e-9)
        check("cdf", times.u_shaped_cdf(u, a), want["U_cdf"], 1e-9)
        check("quantile", times.u_shaped_quantile(p, a), want["U_ppf_closed"], 1e-9)
        scaled = time_density(f"u_shaped:{a}").from_uniform(p)
        check("scaled", scaled, want["U_ppf_scaled"], 1e-9)
        # The published sampler draws from an exponential density and mirrors half of it.
        mirrored = (want["exp_pdf_ref"] + want["exp_pdf_ref"][::-1]) / 2
        check("mirrored density", times.u_shaped_density(u, a), mirrored, 1e-6)
        mirrored = (want["exp_cdf_ref"] + 1 - want["exp_cdf_ref"][::-1]) / 2
        check("mirrored cdf", times.u_shaped_cdf(u, a), mirrored, 1e-6)
        x = jnp.asarray(want["exp_ppf_ref"])
        back = (jnp.exp(a * x) - 1) / (jnp.exp(float(a)) - 1)
        check("exponential", back, p, 1e-6)
    quantile = times.u_shaped_quantile(jnp.asarray(file["emp_a4_q"]), 4)
    np.testing.assert_allclose(quantile, file["emp_a4_quantiles"], rtol=0, atol=0.03)
    middle = jnp.asarray((np.arange(200_000) + 0.5) / 200_000)
    t = np.asarray(time_density("u_shaped").from_uniform(middle))
    for found, key in ((t.mean(), "mean"), (t.var(), "var")):
        np.testing.assert_allclose(found, file[f"a4_U_{key}"], rtol=1e-4)
        np.testing.assert_allclose(found, file[f"emp_a4_{key}"], rtol=0.03)


def test_slim_flow_times(check):
    """The names of its public code, t and what it does to the path."""
    file = goldens.load("slim_losses")
    for theirs, ours in (
        ("t0", "t0"),
        ("t1", "t1"),
        ("uniform", "uniform"),
        ("fix_0.25", "fixed:0.25"),
        ("range_0.2_0.8", "range:0.2:0.8"),
    ):
        t = time_density(ours).from_uniform(jnp.asarray(file["u"]))
        check(theirs, t, file[f"tsched_{theirs}_t"], 1e-9)
        x = t[:, None, None, None] * file["x1"] + (1 - t)[:, None, None, None] * file["z0"]
        check(theirs, x, file[f"tsched_{theirs}_xt"], 1e-9)


SAMPLES = {  # lowest, highest, mean, standard deviation
    "uniform": (1e-3, 1, 0.5005, 0.2884),
    "u_shaped": (1e-5, 1 - 1e-5, 0.5, 0.3401),
    "range:0.2:0.8": (0.2, 0.8, 0.5, 0.1732),
    "logit_normal:0:1": (1e-5, 1 - 1e-5, 0.5, 0.2083),
    "logit_normal:-1:0.01": (0.2, 0.4, 0.26894, 0.00197),
    "t0t1": (1e-3, 1, 0.5005, 0.4995),
    "k_step:4": (1e-3, 0.75025, 0.375625, 0.2793),
}


def test_samples_follow_the_density(jit):
    """Range, mean and variance of 4000 samples, and the distinct times of the discrete."""
    extremes = jnp.asarray([0, 1 - 2**-24], jnp.float32)  # of what is drawn

    def run(key):
        samples = {}
        for name, its_key in zip(SAMPLES, jax.random.split(key, len(SAMPLES)), strict=True):
            samples[name] = time_density(name).sample(jax.random.split(its_key, 4000))
        return samples, {name: time_density(name).from_uniform(extremes) for name in SAMPLES}

    samples, ends = jit(run)(jax.random.key(3))
    for name, (low, high, mean, std) in SAMPLES.items():
        t = np.asarray(samples[name])
        assert t.dtype == np.float32 and low - 1e-7 <= t.min() and t.max() <= high + 1e-7, name
        assert abs(t.mean() - mean) < 4 * std / 4000**0.5, name
        assert abs(t.std() / std - 1) < 0.05, name
        assert ends[name].dtype == jnp.float32 and np.all((ends[name] > 0) & (ends[name] <= 1))
    np.testing.assert_allclose(
        np.unique(samples["k_step:4"]), [0.001, 0.25075, 0.5005, 0.75025], rtol=1e-6
    )
    np.testing.assert_allclose(np.unique(samples["t0t1"]), [1e-3, 1])


@pytest.mark.parametrize(
    "text, message",
    [
        ("u-shaped", r"unknown times 'u-shaped'; choose one of uniform, u_shaped\[:a\]"),
        ("u_shaped:0", "use u_shaped"),
        ("range:0.8:0.2", "use range:a:b with 0 <= a < b <= 1"),
        ("range:0.2", "use range:a:b"),
        ("fixed", "use fixed:a"),
        ("fixed:1.5", "use fixed:a"),
        ("k_step:0", "use k_step:k with a whole number"),
        ("k_step:2.5", "use k_step:k"),
        ("k_step:inf", "use k_step:k"),
        ("k_step:many", "use k_step:k"),
        ("logit_normal:0:-1", "use logit_normal"),
        ("uniform:3", "use uniform"),
    ],
)
def test_bad_times(text, message):
    with pytest.raises(ValueError, match=message):
        time_density(text)


def test_bad_cut_off():
    with pytest.raises(ValueError, match="eps of the times"):
        time_density("uniform", eps=0.0)
