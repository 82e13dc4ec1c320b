"""Exact velocities, and what the theory of rectified flows (Liu, Gong, Liu 2022) says of them."""

import flow_goldens as goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scanax.models.rectified_flow import (
    Solver,
    exact,
    geometry,
    path,
    recipe,
    solve,
    uniform_grid,
)


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def mixtures(file, name: str) -> tuple[exact.Mixture, exact.Mixture]:
    end = lambda i: exact.Mixture(*(jnp.asarray(file[f"{name}_{key}{i}"]) for key in "wmS"))
    return end(0), end(1)


@pytest.mark.parametrize("name", ["gauss2mog", "mog2mog"])
def test_mixtures(name, check, jit):
    """Velocity and density at all times, and the trajectories of every solver."""
    file = goldens.load("mog_velocity")
    pair = mixtures(file, name)
    t, x = jnp.asarray(file[f"{name}_t"]), jnp.asarray(file[f"{name}_x"])
    t_B, x_BD = jnp.repeat(t, x.shape[1]), x.reshape(-1, 2)
    start = jnp.asarray(file[f"{name}_euler_N1_traj"][0])
    names = {f"{m}_N{n}": f"{m}:{n}" for m in ("euler", "heun") for n in (1, 4, 16)}

    @jit
    def run(pair):
        velocity = lambda x, t: exact.mixture_velocity(*pair, x, t)
        follow = lambda text: solve(velocity, start, recipe(text), trajectory="rk" not in text)
        solutions = {key: follow(text) for key, text in names.items()}
        solutions |= {f"rk45_tol1e-{n}": follow(f"rk45:1e-{n}") for n in (5, 10)}
        log_density = exact.mixture_log_density(*pair, x_BD, t_B)
        return velocity(x_BD, t_B).reshape(x.shape), log_density.reshape(x.shape[:2]), solutions

    v, log_density, solutions = run(pair)
    for i, time in enumerate(file[f"{name}_t"]):
        check(f"v at {time}", v[i], file[f"{name}_v"][i], 1e-9 if time < 0.999 else 1e-7)
    check("density", log_density, file[f"{name}_logp"], 1e-9)
    for key, found in solutions.items():
        if key.startswith("rk45"):
            check(key, found.x, file[f"{name}_rk45_tol1e-{key[11:]}_end"], 1e-8)
        else:
            check(key, found.trajectory, file[f"{name}_{key}_traj"], 1e-8)
    assert int(solutions["rk45_tol1e-5"].nfe) == file[f"{name}_rk45_tol1e-5_nfe"]


def test_images(check):
    file = goldens.load("analytic_empirical_velocity")
    arguments = (jnp.asarray(file[key]) for key in ("images", "xt", "t"))
    check("v", exact.empirical_velocity(*arguments), file["velocity"], 1e-8)
    with pytest.raises(ValueError, match="must be shaped alike"):
        exact.empirical_velocity(jnp.zeros((3, 4)), jnp.zeros((2, 5)), jnp.zeros(2))


def test_images_are_reached(jit):
    """The flow to a set of points ends on them, each of them as often as the others."""
    points = jnp.asarray([[3.0, 0.0], [-3.0, 0.0], [0.0, 3.0]])
    velocity = lambda x, t: exact.empirical_velocity(points, x, t)
    z = jax.random.normal(jax.random.key(0), (1500, 2))
    solver = Solver("heun", uniform_grid(40, 0.0, 1 - 1e-3))
    end = np.asarray(jit(lambda z: solve(velocity, z, solver).x)(z))
    distance_BM = np.linalg.norm(end[:, None] - np.asarray(points), axis=2)
    assert np.mean(distance_BM.min(1) < 0.02) > 0.99
    share_M = np.bincount(distance_BM.argmin(1), minlength=3) / 1500
    assert np.all(abs(share_M - 1 / 3) < 4 * (2 / 9 / 1500) ** 0.5)


@pytest.fixture(scope="module")
def toy(jit):
    """Independent pairs of the toy, the exact flow from the same noise, S and V of each."""
    with jax.enable_x64(True):
        file = goldens.load("toy_theory_D10")
        source, target = (
            exact.Mixture(*(x.astype(jnp.float64) for x in mixture))
            for mixture in exact.toy_mixtures(float(file["D"]), float(file["var"]))
        )
        velocity = lambda x, t: exact.mixture_velocity(source, target, x, t)

        @jit
        def run(key):
            first, second = jax.random.split(key)
            x0 = exact.sample_mixture(source, first, 8000)
            x1 = exact.sample_mixture(target, second, 8000)
            solver = recipe("heun:60")
            flow = solve(velocity, x0, solver, trajectory=True)
            return {
                "x0": x0,
                "x1": x1,
                "z1": flow.x,
                "middle": flow.trajectory[30],
                "one_step": solve(velocity, x0, recipe("euler:1")).x,
                "pairs": solve(velocity, jnp.asarray(file["z0"]), recipe("rk45:1e-8")).x,
                "S": geometry.straightness(flow.trajectory, solver.grid),
                "V": geometry.crossing(velocity, x0, x1, 50),
            }

        return file, target, {k: np.asarray(x) for k, x in run(jax.random.key(0)).items()}


def error(samples) -> float:
    """Of their mean."""
    return np.std(samples) / len(samples) ** 0.5


def in_modes(target, x) -> float:
    """Share within three standard deviations of a mean."""
    distance_BK = np.linalg.norm(x[:, None] - np.asarray(target.mean), axis=2)
    return np.mean(distance_BK.min(1) < 3 * float(target.covariance[0, 0, 0]) ** 0.5)


def test_toy(toy):
    """The numbers that were worked out elsewhere, and its pairs."""
    file, target, found = toy
    np.testing.assert_allclose(sorted(target.mean.tolist()), sorted(file["m1"].tolist()), rtol=1e-6)
    cost = lambda a, b, name: np.asarray(geometry.transport_cost(found[a], found[b], name))
    for key, samples in (
        ("cost2_independent_exact", cost("x0", "x1", "squared")),
        ("cost2_independent_emp", cost("x0", "x1", "squared")),
        ("cost2_1rf", cost("x0", "z1", "squared")),
        ("cost1_independent", cost("x0", "x1", "l2")),
        ("cost1_1rf", cost("x0", "z1", "l2")),
        ("S_1rf", found["S"]),
        ("V_independent", found["V"]),
        ("identity_lhs", cost("x0", "x1", "squared") - cost("x0", "z1", "squared")),
        ("identity_rhs", found["S"] + found["V"]),
    ):
        spread = 0.02 * abs(file[key]) + 3 * error(samples)
        assert abs(samples.mean() - file[key]) < spread < 0.08 * file[key], key
    assert abs(in_modes(target, found["z1"]) - file["frac_within_3sd_full"]) < 0.006
    assert in_modes(target, found["one_step"]) == file["frac_within_3sd_onestep"] == 0
    np.testing.assert_allclose(found["pairs"], file["z1"], rtol=0, atol=1e-2)


def test_the_identity_of_costs(toy):
    """E ||X_1 - X_0||^2 - E ||Z_1 - Z_0||^2 = S(Z) + V(X)."""
    found = toy[2]
    cost = lambda end: np.asarray(geometry.transport_cost(found["x0"], found[end]))
    difference = cost("x1") - cost("z1") - found["S"] - found["V"]
    assert abs(difference.mean()) < 4 * error(difference) < 8


def test_convex_costs_do_not_rise(toy):
    found = toy[2]
    moved, before = found["z1"] - found["x0"], found["x1"] - found["x0"]
    costs = {name: lambda d, n=name: geometry.COSTS[n](jnp.asarray(d)) for name in geometry.COSTS}
    costs |= {f"rise of {i}": lambda d, i=i: np.maximum(0, d[:, i]) for i in range(2)}
    for name, cost in costs.items():
        gain = np.asarray(cost(before) - cost(moved))
        assert gain.mean() > -3 * error(gain), name
        if name in geometry.COSTS:  # by far
            assert gain.mean() > 10 * error(gain), name


def test_marginals_are_kept(toy):
    """Law(Z_t) = Law(X_t), in the middle and at the end, by their characteristic functions."""
    found = toy[2]
    middle = np.asarray(path.interpolate(found["x0"], found["x1"], jnp.full(8000, 0.5)))
    frequencies_DF = np.random.default_rng(0).normal(0, 0.3, (2, 12))
    for z, x in ((found["middle"], middle), (found["z1"], found["x1"])):
        for wave in (np.cos, np.sin):
            a, b = wave(z @ frequencies_DF), wave(x @ frequencies_DF)
            spread_F = 4.5 * np.sqrt((np.var(a, 0) + np.var(b, 0)) / len(a))
            assert np.all(abs(a.mean(0) - b.mean(0)) < spread_F)
            assert np.max(spread_F) < 0.1
        assert np.max(abs(z.mean(0) - x.mean(0))) < 0.35


def test_straight_couplings_need_one_step(jit):
    """X_1 = a X_0 + b: no crossings, S = V = 0, Euler's one step is exact, and reflow changes
    nothing; with a < 0 paths cross and all of it fails."""
    x0 = jax.random.normal(jax.random.key(1), (40, 2))
    a, b = jnp.asarray([[3.0, 0.2]]), jnp.asarray([[1.0, -2.0]])

    def velocity(x, t_B):
        t = t_B[:, None]
        return ((a - 1) * x + b) / (1 + t * (a - 1))

    @jit
    def run(x0):
        x1 = a * x0 + b
        solver = Solver("euler", (0.0, 0.1, 0.4, 1.0))
        flow = solve(velocity, x0, solver, trajectory=True)
        one, fine = (solve(velocity, x0, recipe(name)).x for name in ("euler:1", "rk45:1e-10"))
        s_B = geometry.straightness(flow.trajectory, solver.grid)
        mean_B = geometry.mean_straightness(flow.trajectory[jnp.asarray([0, 3])])
        v_B = geometry.crossing(velocity, x0, x1, 7)
        swapped_B = geometry.crossing(velocity, x0, x1[::-1], 7)
        return x1, flow.x, one, fine, s_B, mean_B, v_B, swapped_B

    x1, *ends, s_B, mean_B, v_B, swapped_B = run(x0)
    for end in ends:
        np.testing.assert_allclose(end, x1, atol=1e-9)
    for zero_B in (s_B, mean_B, v_B):
        assert np.max(zero_B) < 1e-20
    assert np.mean(swapped_B) > 1


def test_straightness_of_a_bent_line(jit):
    """Two pieces whose speeds are 1 and 3 where the mean is 2: S = 1 for each of the two numbers,
    whatever the grid."""
    for times in ((0.0, 0.5, 1.0), (0.0, 0.25, 0.5, 0.75, 1.0), (0.0, 0.1, 0.5, 0.6, 1.0)):
        place = np.interp(times, (0, 0.5, 1), (0, 0.5, 2))
        trajectory = jnp.asarray(place)[:, None, None] * jnp.asarray([[[1.0, -1.0]]])
        straightness = jit(lambda x, times=times: geometry.straightness(x, times))
        np.testing.assert_allclose(straightness(trajectory), [2.0])
    even = jnp.asarray([0.0, 0.5, 2.0])[:, None, None] * jnp.ones((1, 1, 2))
    np.testing.assert_allclose(geometry.mean_straightness(even), [1.0])


def test_crossing_is_an_integral(jit):
    """Of ||t||^2 over time, for a pair that stays where it is."""
    drift = lambda x, t_B: t_B[:, None] + 0 * x
    crossing = jit(lambda x: geometry.crossing(drift, x, x, 50))(jnp.zeros((1, 3)))
    np.testing.assert_allclose(crossing, [3 * 1 / 3], rtol=2e-4)


def test_mixture_samples(jit):
    mixture = exact.Mixture(
        jnp.asarray([0.8, 0.2]),
        jnp.asarray([[0.0, 0.0], [10.0, 0.0]]),
        jnp.asarray([[[2.0, 1.0], [1.0, 1.0]], [[0.5, 0.0], [0.0, 0.5]]]),
    )
    x = jit(lambda key: exact.sample_mixture(mixture, key, 20_000))(jax.random.key(0))
    x = np.asarray(x)
    left = x[x[:, 0] < 6]
    assert abs(len(left) / len(x) - 0.8) < 0.012
    np.testing.assert_allclose(np.cov(left.T), [[2, 1], [1, 1]], atol=0.08)
    few = jax.eval_shape(
        lambda key: exact.sample_mixture(exact.toy_mixtures()[0], key, 3), jax.random.key(0)
    )
    assert few.dtype == jnp.float32 and few.shape == (3, 2)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: geometry.transport_cost(x, x, "l3"), "unknown cost 'l3'; choose one of squared"),
        (lambda x: geometry.crossing(lambda x, t: x, x, x, 0), "at least one step"),
        (lambda x: geometry.straightness(x[None], (0.0,)), "2 or more"),
        (lambda x: geometry.straightness(jnp.stack([x, x]), (0.0, 0.5, 1.0)), "got 3"),
        (lambda x: geometry.mean_straightness(x[None]), "2 or more"),
        (lambda x: geometry.slerp(x, x[:1], jnp.zeros(2)), "must have the same shape"),
    ],
)
def test_bad_geometry(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.ones((2, 3)))
