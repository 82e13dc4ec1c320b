"""Schedules against their references in both precisions, and the draws of times."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import radd_goldens as goldens

from scanax.models.radd import schedule, times

SCHEDULES = {
    "loglinear": "log_linear",
    "loglinear_eps1e-4": "log_linear:1e-4",
    "geometric_1e-4_20": "geometric",
    "geometric_1e-3_1": "geometric:1e-3:1",
}
METHODS = {
    "total": "total",
    "rate": "rate",
    "lambda": "masked",
    "score_scale": "odds",
    "weight": "weight",
}
MD4 = {"linear": "linear", "cosine": "cosine", "poly3": "polynomial:3"}


@pytest.mark.parametrize("bits, tolerance", [(64, 1e-12), (32, 2e-6)])
def test_reference(bits, tolerance, jit):
    """Each number within a relative tolerance, also where it is small."""
    file = goldens.load("schedule")
    with jax.enable_x64(bits == 64):
        t = jnp.asarray(file["t"], f"float{bits}")
        run = lambda t: {
            f"{theirs}_{key}": getattr(schedule(ours), method)(t)
            for theirs, ours in SCHEDULES.items()
            for key, method in METHODS.items()
        }
        for key, found in jit(run)(t).items():
            assert found.dtype == t.dtype
            # Next to 1, what float32 makes of t is another t.
            want = file[key] if bits == 64 else reference(key, np.asarray(t, np.float64))
            # e^-sbar has sbar times the relative error that sbar has by being rounded.
            total = (
                file[f"{key.removesuffix('_score_scale').removesuffix('_weight')}_total"]
                if (key.endswith(("score_scale", "weight")))
                else 1
            )
            error = np.abs(np.asarray(found, np.float64) - want) / want
            assert np.all(error <= tolerance * np.maximum(1, total)), (key, error.max())


def reference(key: str, t: np.ndarray) -> np.ndarray:
    """What a float32 number t stands for, in float64."""
    name, method = next(
        (ours, METHODS[key.removeprefix(f"{theirs}_")])
        for theirs, ours in SCHEDULES.items()
        if key.removeprefix(f"{theirs}_") in METHODS
    )
    with jax.enable_x64(True):
        return np.asarray(getattr(schedule(name), method)(jnp.asarray(t)))


@pytest.mark.parametrize("bits, tolerance", [(64, 1e-10), (32, 5e-6)])
def test_md4(bits, tolerance, jit):
    file = goldens.load("md4")
    with jax.enable_x64(bits == 64):
        t = jnp.asarray(file["t"], f"float{bits}")

        def run(t):
            found = {}
            for theirs, ours in MD4.items():
                s = schedule(ours)
                found[f"{theirs}_alpha"] = s.alpha(t)
                found[f"{theirs}_dalpha"] = -s.slope(t)
                found[f"{theirs}_logsnr"] = s.log_odds(t)
                found[f"{theirs}_dgamma_times_alpha"] = -s.weight(t)
            return found

        for key, found in jit(run)(t).items():
            # Of t = 0.999 in float32, 1 - t has five digits.
            slack = 5e-5 if bits == 32 and "linear" not in key else tolerance
            np.testing.assert_allclose(found, file[key], rtol=slack, atol=tolerance, err_msg=key)


NAMES = (*SCHEDULES.values(), *MD4.values(), "log_linear:0.5", "geometric:1e-2:500")


def test_relations(jit):
    """What defines the methods, by differentiation; and the ends, in float32."""

    def run(t):
        found = {}
        for name in NAMES:
            s = schedule(name)
            slope = lambda f: jax.vmap(jax.grad(f))(t)
            found[name] = {
                "rate": (s.rate(t), slope(s.total)),
                "slope": (s.slope(t), slope(s.masked)),
                "alpha": (s.alpha(t), jnp.exp(-s.total(t))),
                "masked": (s.masked(t), -jnp.expm1(-s.total(t))),
                "odds": (s.odds(t) * jnp.expm1(s.total(t)), jnp.ones_like(t)),
                "log_odds": (jnp.exp(s.log_odds(t)), s.odds(t)),
                "weight": (s.weight(t), s.rate(t) * s.odds(t)),
            }
        return found

    with jax.enable_x64(True):
        for name, found in jit(run)(jnp.linspace(0.01, 0.95, 12)).items():
            for key, (got, want) in found.items():
                np.testing.assert_allclose(got, want, 1e-9, err_msg=f"{name} {key}", atol=1e-12)
    for name in NAMES:
        s = schedule(name)
        for t in (jnp.asarray([1e-7, 1e-3, 1 - 2.0**-24, 1], jnp.float32),):
            for method in ("masked", "total", "weight", "log_odds", "rate"):
                assert np.all(np.isfinite(getattr(s, method)(t))) or (
                    name == "geometric:1e-2:500" and method == "rate"
                )
            assert np.all(np.diff(s.masked(t)) >= 0) and np.all(s.masked(t) > 0)
    assert schedule("log_linear") == schedule("log_linear:1e-3")
    assert schedule("linear") == schedule("polynomial:1")
    hash(schedule("cosine"))


@pytest.mark.parametrize(
    "text, message",
    [
        ("loglinear", "choose one of log_linear, geometric, linear, cosine, polynomial"),
        ("log_linear:0", "0 < EPS < 1"),
        ("log_linear:x", "0 < EPS < 1"),
        ("log_linear:nan", "0 < EPS < 1"),
        ("geometric:1", "geometric.:MIN:MAX"),
        ("geometric:2:1", "0 < MIN < MAX"),
        ("cosine:2", "use cosine"),
        ("polynomial", "polynomial:POWER"),
        ("polynomial:-1", "POWER > 0"),
    ],
)
def test_bad_schedules(text, message):
    with pytest.raises(ValueError, match=message):
        schedule(text)


@pytest.mark.parametrize("count", [5, 8])
def test_draws_reference(count):
    file = goldens.load("time_samplers")
    with jax.enable_x64(True):
        u_B, u0_B = jnp.asarray(file[f"u_{count}"]), jnp.asarray(file[f"u0_{count}"])
        for theirs, ours, w_B in (
            ("naive", "iid", u_B),
            ("vdm", "vdm", jnp.broadcast_to(u0_B, (count,))),
            ("decoupled", "decoupled", u_B),
        ):
            found = times.from_uniform(ours, w_B)
            np.testing.assert_allclose(found, file[f"{theirs}_{count}"], rtol=0, atol=1e-12)


def test_draws_spread():
    for name in times.DRAWS:
        u = np.asarray(times.draw(name, jax.random.key(1), 64))
        assert u.dtype == np.float32 and u.shape == (64,) and np.all((u >= 0) & (u < 1))
        cells = np.bincount(np.floor(u * 64).astype(int), minlength=64)
        assert (cells.max() == 1) == (name != "iid"), name
    top = jnp.full((1000,), 1 - 2.0**-24, jnp.float32)
    assert np.max(times.decoupled(top)) < 1
    with pytest.raises(ValueError, match="choose one of iid, vdm, decoupled"):
        times.draw("naive", jax.random.key(0), 3)


def test_sizes(jit):
    """Every size as often as it should be, in an order that differs from row to row."""
    run = jit(
        lambda keys, draws, length: times.stratified_sizes(keys, draws, length),
        static_argnums=(1, 2),
    )
    keys = jax.random.split(jax.random.key(2), 3)
    k = np.asarray(run(keys, 64, 16))
    assert k.shape == (3, 64) and k.dtype == np.int32
    for row in k:
        np.testing.assert_array_equal(np.bincount(row, minlength=17), [0] + [4] * 16)
    assert np.any(k[0] != k[1]) and np.any(np.diff(k[0]) < 0)
    # Fewer draws than sizes: one in each part, and each size alike on average.
    few = np.asarray(run(jax.random.split(jax.random.key(3), 4000), 3, 7))
    assert few.min() == 1 and few.max() == 7
    share = np.bincount(few.ravel(), minlength=8)[1:] / few.size
    np.testing.assert_allclose(share, 1 / 7, atol=4 * (1 / 7 / few.size) ** 0.5)
    for length in (1, 7, 1024, 2**20):
        some = jnp.asarray(np.unique(np.linspace(1, length, 50).astype(np.int32)))
        np.testing.assert_array_equal(times.size_of(times.uniform_of(some, length), length), some)
    ends = times.size_of(jnp.asarray([0, 1 - 2.0**-24, 1], jnp.float32), 1024)
    np.testing.assert_array_equal(ends, [1, 1024, 1024])
