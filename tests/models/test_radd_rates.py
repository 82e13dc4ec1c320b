"""Rates of unmasking, laws of unmask steps, numbers of evaluations, against reference values."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from radd_samplers import SCHEDULES, load

from scanax.models.radd import rates

LONG = {"loglinear": "loglinear", "geometric": "geometric_1e-4_20"}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("method", rates.METHODS)
@pytest.mark.parametrize("n", [8, 32, 128, 1024])
def test_rates(schedule, method, n):
    file = load("update_rates")
    np.testing.assert_allclose(rates.time_grid(n), file[f"timesteps_{n}"], rtol=0, atol=1e-12)
    want_N = np.minimum(file[f"{LONG[schedule]}_{method}_{n}"], 1)
    psi_N = rates.unmask_rates(SCHEDULES[schedule], n, method)
    np.testing.assert_allclose(psi_N[:-1], want_N[:-1], rtol=1e-9)
    assert psi_N.dtype == np.float64 and psi_N[-1] == 1


def test_log_linear_has_no_cancellation():
    """To the last bit dt / t, however many steps."""
    n = 1 << 16
    psi_N = rates.unmask_rates(SCHEDULES["loglinear"], n)
    times = np.linspace(1, 1e-5, n + 1)
    np.testing.assert_array_equal(psi_N[:-1], ((1 - 1e-5) / n / times[:-1])[:-1])
    p_N, _ = rates.step_probabilities(psi_N)
    np.testing.assert_allclose(p_N[:-1], (1 - 1e-5) / n, rtol=1e-10)


def test_schedules_of_jax(monkeypatch):
    """Functions of JAX arrays are evaluated in float64, also inside a traced function."""

    class Geometric:
        total = staticmethod(lambda t: 1e-4 ** (1 - jnp.asarray(t)) * 20.0 ** jnp.asarray(t))
        rate = staticmethod(lambda t: Geometric.total(t) * np.log(20 / 1e-4))

    want_N = rates.unmask_rates(SCHEDULES["geometric"], 32)
    found = []

    def traced(x):
        found.append(rates.unmask_rates(Geometric(), 32))
        return x

    jax.jit(traced)(1.0)
    np.testing.assert_allclose(found[0], want_N, rtol=1e-12)


def test_clamped(caplog):
    """Euler's rates above 1, with one line about them."""
    with caplog.at_level(logging.WARNING):
        psi_N = rates.unmask_rates(SCHEDULES["geometric"], 8, "euler")
    assert len(caplog.records) == 1 and "clamped" in caplog.text
    want_N = load("update_rates")["geometric_1e-4_20_euler_8"]
    assert psi_N.max() == 1 and want_N[:-1].max() > 1


@pytest.mark.parametrize("alpha", ["linear", "cosine"])
@pytest.mark.parametrize("grid", ["uniform", "cosine"])
def test_md4_grids(alpha, grid):
    plain = {"linear": lambda t: 1 - t, "cosine": lambda t: 1 - np.cos(np.pi / 2 * (1 - t))}[alpha]

    class MD4:
        total = staticmethod(lambda t: -np.log((1 - 2e-4) * plain(t) + 1e-4))
        rate = staticmethod(lambda t: np.ones_like(t))  # which tweedie does not need

    file, name = load("md4"), f"grid_{alpha}_{grid}_"
    times = rates.time_grid(16, grid)
    psi_N = rates.unmask_rates(MD4(), 16, grid=grid)
    wanted = [np.ravel(file[name + part]) for part in ("t", "s", "unmask_prob")]
    order = np.argsort(-wanted[0])
    t_N, s_N, want_N = (x[order] for x in wanted)
    np.testing.assert_allclose(times[:-1], t_N, rtol=0, atol=1e-10)
    np.testing.assert_allclose(times[1:], s_N, rtol=0, atol=1e-10)
    np.testing.assert_allclose(psi_N[:-1], want_N[:-1], rtol=0, atol=1e-10)


def test_laws_of_steps():
    file = load("event_times")
    names = [key.removeprefix("p_step_") for key in file if key.startswith("p_step_")]
    assert len(names) == 11
    for name in names:
        schedule, method, n = name.split("_")
        psi_N = rates.unmask_rates(SCHEDULES[schedule], int(n[1:]), method)
        p_N, cdf_N = rates.step_probabilities(psi_N)
        np.testing.assert_allclose(p_N, file["p_step_" + name], rtol=0, atol=1e-12)
        np.testing.assert_allclose(cdf_N, file["cdf_" + name], rtol=0, atol=1e-12)
        assert cdf_N[-1] == 1
        for length in (8, 64):
            want = float(file[f"expected_nfe_{name}_l{length}"])
            assert rates.expected_evaluations(p_N, length) == pytest.approx(want, rel=1e-12)


def test_expected_evaluations():
    file = load("enfe")
    for i, n in enumerate(file["n"]):
        psi_N = rates.unmask_rates(SCHEDULES["loglinear"], int(n))
        p_N, _ = rates.step_probabilities(psi_N)
        even_N = np.full(int(n), 1 / n)
        for j, length in enumerate(file["l"]):
            for function, p, key in (
                (rates.expected_evaluations, even_N, "enfe_paper"),
                (rates.expected_evaluations, p_N, "enfe_code_changed"),
                (rates.expected_loop_evaluations, p_N, "enfe_code_evals"),
            ):
                assert function(p, int(length)) == pytest.approx(file[key][i, j], rel=1e-9), key
        for j, batch in enumerate(file["batch"]):
            found = rates.expected_batch_evaluations(p_N, 1024, int(batch))
            assert found == pytest.approx(file["enfe_batch_level_l1024"][i, j], rel=1e-9)
        for method in rates.METHODS:
            psi_N = rates.unmask_rates(SCHEDULES["geometric"], int(n), method)
            p_N, _ = rates.step_probabilities(psi_N)
            for j, length in enumerate(file["l"]):
                want = file[f"enfe_geometric_{method}_evals"][i, j]
                if np.isfinite(want):
                    found = rates.expected_loop_evaluations(p_N, int(length))
                    assert found == pytest.approx(want, rel=1e-9), (n, length, method)


def test_mistakes():
    schedule = SCHEDULES["loglinear"]
    for wrong, message in (
        (lambda: rates.unmask_rates(schedule, 0), "at least one step"),
        (lambda: rates.unmask_rates(schedule, 4, "heun"), "method must be one of"),
        (lambda: rates.unmask_rates(schedule, 4, grid="log"), "grid must be one of"),
        (lambda: rates.step_probabilities(np.array([0.5, 0.9])), "the last 1"),
        (lambda: rates.step_probabilities(np.array([1.5, 1.0])), "the last 1"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
