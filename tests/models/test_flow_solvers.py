"""Solvers against the published samplers and scipy: states, times, and numbers of evaluations."""

import dataclasses
import functools

import flow_goldens as goldens
import jax
import jax.numpy as jnp
from jax.test_util import check_grads
import numpy as np
import pytest
import scipy.integrate

from scanax.models.rectified_flow import RECIPES, Solver, geometry, recipe, runge_kutta, solve


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def numbers(file, start: str, end: str) -> list[str]:
    """The parts of the file's keys between ``start`` and ``end``."""
    keys = [key for key in file if key.startswith(start) and key.endswith(end)]
    assert keys
    return [key.removeprefix(start).removesuffix(end) for key in keys]


def test_rectified_flow(check, jit):
    file = goldens.load("rf_samplers")
    x0, counts = goldens.last(file["z0"]), numbers(file, "euler_ode_N", "")
    noises = goldens.last(file["sde_N6_noises"])

    def run(params):
        net = functools.partial(goldens.apply, params)
        sde = solve(net, x0, recipe("rf_sde:6:0.7"), noise=noises)
        return sde, {n: solve(net, x0, recipe(f"rf_euler:{n}")) for n in counts}

    sde, euler = jit(run)(goldens.part(file, "net_"))
    check("sde", goldens.first(sde.x), file["sde_N6_sigmavar0p7_out"], 1e-10)
    assert sde.nfe == 6
    for n, found in euler.items():
        check(n, goldens.first(found.x), file[f"euler_ode_N{n}"], 1e-10)
        half = goldens.first(found.x + 1) / 2
        check(n, half, file[f"euler_sampler_N{n}_scaled01"], 1e-10)
        assert int(found.nfe) == file[f"euler_sampler_N{n}_nfe"] == int(n)


def test_rectified_flow_adaptive(check, jit):
    """As scipy steps: results, evaluations, and the times of all steps."""
    file = goldens.load("rf_samplers")
    starts = {"fwd": goldens.last(file["z0"]), "rev": goldens.last(file["x1_for_reverse"])}
    net = functools.partial(goldens.apply, goldens.part(file, "net_"))

    @functools.partial(jit, static_argnames=("start", "end"))
    def run(x, tolerance, max_steps, *, start, end):
        return runge_kutta.integrate(
            net,
            x,
            start,
            end,
            rtol=tolerance,
            atol=tolerance,
            per_sample=False,
            max_steps=max_steps,
        )

    for way, x in starts.items():
        for tolerance in ("1e-05", "1e-10"):
            name = f"rk45_f64_{way}_tol{tolerance}"
            grid = file[f"{name}_tgrid"]
            for step, time in enumerate(grid):
                y, nfe_B, time_B = run(x, float(tolerance), step, start=grid[0], end=grid[-1])
                check(name, time_B, np.full(len(x), time), 1e-8)
                assert set(nfe_B.tolist()) == {2 + 6 * step}
            check(name, goldens.first(y), file[f"{name}_out"], 1e-9)
            assert int(nfe_B[0]) == file[f"{name}_nfe"]


def test_rectified_flow_adaptive_in_float32(jit):
    file = goldens.load("rf_samplers")
    narrow = {key: jnp.float32(x) for key, x in goldens.part(file, "net_").items()}
    net = functools.partial(goldens.apply, narrow)
    run = lambda name, x: solve(net, jnp.float32(goldens.last(x)), recipe(name))
    found, back = jit(
        lambda: (
            run("rf_rk45", file["z0"]),
            run("rf_invert_rk45", file["x1_for_reverse"]),
        )
    )()
    for solution, key in ((found, "rk45_ref_f32_out"), (back, "rk45_ref_reverse_from_z1_f32_out")):
        assert solution.x.dtype == jnp.float32 and int(solution.nfe) == file["rk45_ref_nfe"]
        np.testing.assert_allclose(goldens.first(solution.x), file[key], rtol=0, atol=2e-6)
        assert np.all(solution.reached) and solution.reached.shape == (len(file["z0"]),)


def test_slim_flow(check, jit):
    file = goldens.load("slim_samplers")
    x0, x1 = goldens.last(file["z0"]), goldens.last(file["x1"])
    counts = numbers(file, "euler_fwd_N", "_t")

    def run(params):
        net = functools.partial(goldens.apply, params)
        follow = lambda x, name, **arguments: solve(net, x, recipe(name), **arguments)
        found = {"one_step": follow(x0, "slimflow_one_step")}
        for n in counts:
            found[f"euler_fwd_N{n}"] = follow(x0, f"slimflow_euler:{n}", trajectory=True)
            found[f"euler_rev_N{n}"] = follow(x1, f"rf_invert_euler:{n}", trajectory=True)
            found[f"heun_N{n}"] = follow(x0, f"slimflow_heun:{n}", trajectory=True)
            noise = goldens.last(file[f"cm_stochastic_N{n}_noise"])
            found[f"cm_stochastic_N{n}"] = follow(x0, f"cm_stochastic:{n}", noise=noise)
        return found

    found = jit(run)(goldens.part(file, "net_"))
    for name, solution in found.items():
        if f"{name}_out" in file:
            check(name, goldens.first(solution.x), file[f"{name}_out"], 1e-9)
            continue
        want = file[f"{name}_traj"]
        if name.startswith("heun"):  # the public code repeats the last state
            np.testing.assert_array_equal(want[-1], want[-2])
            want = want[:-1]
            assert int(solution.nfe) == file[f"{name}_nfe_reported"]
            np.testing.assert_allclose(goldens.first(solution.trajectory), want, rtol=0, atol=1e-6)
        else:
            check(name, goldens.first(solution.trajectory), want, 1e-9)
            grid = recipe(f"rf{'_invert' if 'rev' in name else ''}_euler:{len(want) - 1}").grid
            check(name, grid[:-1], file[f"{name}_t"][:-1], 1e-9)


def test_two_rf_plus_plus(check, jit):
    """Their time is 1 - ours, and their velocity -v."""
    file = goldens.load("rfpp_samplers")
    names = {}
    for method in ("euler", "heun"):
        for rule, ours in (("default", ""), ("new", "new_")):
            for n in numbers(file, f"{method}_{rule}_N", "_traj"):
                names[f"{method}_{rule}_N{n}"] = recipe(f"rfpp_{ours}{method}:{n}")
    for rule, ours in (("default", "default"), ("new", "renoise")):
        custom = Solver("euler", (1e-5, 0.25, 0.7, 1.0), ours)
        names[f"euler_{rule}_custom_1_0.75_0.3_0"] = custom
    inverse = {
        f"inversion_{method}_N{n}": recipe(f"rfpp_invert_{method}:{n}")
        for method, n in (("euler", 4), ("heun", 5))
    }
    keys = {key.removesuffix("_traj") for key in file if key.endswith("_traj")}
    assert keys == {*names, *inverse}

    def run(params):
        net = lambda x, t: -goldens.apply(params, x, 1 - t)
        found = {}
        for key, solver in (names | inverse).items():  # what the file begins with is scaled
            as_is = dataclasses.replace(solver, input_scale=1.0, input_noise=0.0)
            x = goldens.last(file["x_inv" if key in inverse else "z1"])
            found[key] = solve(net, x, as_is, trajectory=True)
        return found

    for key, solution in jit(run)(goldens.part(file, "net_")).items():
        check(key, goldens.first(solution.trajectory), file[f"{key}_traj"], 1e-10)
        ends = f"{key}_{'zhat' if key in inverse else 'x0hat'}"
        if ends in file:
            check(ends, goldens.first(solution.predictions), file[ends], 1e-10)
        if f"{key}_straightness_per" in file:
            straightness_B = geometry.mean_straightness(solution.trajectory)
            want, mean = (file[f"{key}_straightness_{form}"] for form in ("per", "mean"))
            np.testing.assert_allclose(straightness_B, want, rtol=1e-8, atol=1e-18)
            np.testing.assert_allclose(jnp.mean(straightness_B), mean, rtol=1e-8, atol=1e-18)
        if "custom" not in key:
            assert solution.nfe == int(key.rsplit("N", 1)[1])


def test_slerp(check):
    file = goldens.load("rfpp_samplers")
    a, b = file["z1"].reshape(3, -1)[:2]
    share = jnp.asarray(file["slerp_lambda"])
    tile = lambda x: jnp.tile(x[None], (len(share), 1))
    check("slerp", geometry.slerp(tile(a), tile(b), share), file["slerp_out"], 1e-10)
    same = geometry.slerp(tile(a), tile(a), share)
    np.testing.assert_allclose(same, tile(a), rtol=1e-6)


NFE = {
    "euler:3": 3,
    "heun:3": 5,
    "rf_euler:4": 4,
    "rf_sde:4:0.5": 4,
    "rf_invert_euler:2": 2,
    "slimflow_one_step": 1,
    "slimflow_euler:2": 2,
    "slimflow_heun:1": 1,
    "cm_stochastic:3": 3,
    "rfpp_euler:2": 2,
    "rfpp_heun:5": 5,
    "rfpp_new_euler:3": 3,
    "rfpp_new_heun:1": 1,
    "rfpp_invert_euler:4": 4,
    "rfpp_invert_heun:3": 3,
    "rk45": None,
    "rf_rk45:1e-3": None,
    "rf_invert_rk45": None,
    "edm_euler:4": 4,
    "edm_heun:3": 5,
}


def curved(x, t_B):
    """A velocity whose flow is no line."""
    t = t_B.reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.sin(3 * x) + jnp.cos(5 * t) - x


def test_evaluations_are_counted(jit):
    """Against a counter of the calls that really happen."""
    assert {name.split(":")[0] for name in NFE} == set(RECIPES)
    calls = {name: [] for name in NFE}

    def counting(name):
        def velocity(x, t_B):
            jax.debug.callback(lambda t: calls[name].append(float(t)), t_B[0])
            return curved(x, t_B)

        return velocity

    def run(x, keys):
        names = zip(NFE, keys, strict=True)
        return {name: solve(counting(name), x, recipe(name), key=key) for name, key in names}

    x = jnp.linspace(-1, 1, 6, dtype=jnp.float64).reshape(3, 2)
    solutions = jit(run)(x, list(jax.random.split(jax.random.key(0), len(NFE))))
    jax.effects_barrier()
    for name, nfe in NFE.items():
        found = solutions[name]
        assert found.nfe == len(calls[name]) and found.nfe.shape == (), name
        assert nfe in (None, found.nfe), name
        assert all(0 <= t <= 1 for t in calls[name]) and np.all(found.reached)
        assert set(found.time.tolist()) == {recipe(name).grid[-1]}


def test_the_sde_on_a_grid_of_ones_own(jit):
    """Steps are as long as the grid says: with hardly any diffusion it is Euler's method."""
    x, grid = jnp.ones((1, 2)), (0.0, 0.1, 0.4, 1.0)
    sde, euler = (
        jit(lambda x, s=s: solve(curved, x, s, noise=jnp.ones((3, 1, 2))).x)(x)
        for s in (Solver("sde", grid, sigma=1e-6), Solver("euler", grid))
    )
    np.testing.assert_allclose(sde, euler, atol=1e-5)


def test_every_example_by_itself(jit):
    """As scipy integrates each alone; those that have arrived are not counted."""
    x = jnp.asarray([[0.1, 0.2], [4.0, -9.0], [1.0, 1.0]])
    speed_B = jnp.asarray([0.0, 3.0, 9.0])

    def velocity(x, t_B):
        return curved(speed_B[:, None] * x, t_B)

    solver = dataclasses.replace(recipe("rk45:1e-6"), per_sample=True)
    found = jit(lambda x: solve(velocity, x, solver))(x)
    assert found.nfe.shape == (3,) and len(set(found.nfe.tolist())) == 3
    for i, speed in enumerate(speed_B.tolist()):
        alone = lambda t, x, s=speed: np.sin(3 * s * x) + np.cos(5 * t) - s * x
        want = scipy.integrate.solve_ivp(alone, (0, 1), x[i], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(found.x[i], want.y[:, -1], rtol=1e-12)
        assert found.nfe[i] == want.nfev


def test_rejected_steps_and_hard_starts(jit):
    """Whole batches as scipy: a kink rejects steps; nothing moves; nothing is there; and hardly
    anything moves, so that the first step would like to look beyond the end."""
    kink = lambda x, t: jnp.where(t[:, None] > 0.5, 40 * jnp.cos(40 * x), x)
    still = lambda x, t: 0 * x
    slow = lambda x, t: jnp.where(t[:, None] > 1, jnp.nan, 1e-3 * jnp.cos(3 * t[:, None]) + 0 * x)
    cases = {
        "kink": (kink, lambda t, x: np.where(t > 0.5, 40 * np.cos(40 * x), x), [0.3, -0.7]),
        "still": (still, lambda t, x: 0 * x, [0.3, -0.7]),
        "slow": (slow, lambda t, x: 1e-3 * np.cos(3 * t) + 0 * x, [1e3, 2e3]),
        "zero": (curved, lambda t, x: np.sin(3 * x) + np.cos(5 * t) - x, [0.0, 0.0]),
    }
    for name, (ours, theirs, start) in cases.items():
        found = jit(lambda x, v=ours: solve(v, x, recipe("rk45:1e-8")))(jnp.asarray([start]))
        want = scipy.integrate.solve_ivp(theirs, (0, 1), start, rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(found.x[0], want.y[:, -1], rtol=1e-9, err_msg=name)
        assert found.nfe == want.nfev, name


def test_an_unreachable_tolerance_is_reported(jit):
    """Too few steps; a velocity that explodes; one that is not a number. Others are not hurt."""
    solver = dataclasses.replace(recipe("rk45:1e-9"), per_sample=True, max_steps=30)

    def velocity(x, t_B):
        bad = jnp.stack([t_B * 0, jnp.nan + t_B, 1 / jnp.square(0.5 - t_B), jnp.cos(900 * t_B)])
        return jnp.diagonal(bad)[:, None] + 0 * x

    found = jit(lambda x: solve(velocity, x, solver))(jnp.zeros((4, 1)))
    assert found.reached.tolist() == [True, False, False, False]
    assert found.time[0] == 1 and found.time[1] == 0 and 0 < found.time[2] < 0.5
    assert 0 < found.time[3] < 1 and found.nfe[3] == 2 + 6 * 30
    assert np.all(np.isfinite(found.x))
    whole = dataclasses.replace(solver, per_sample=False)
    found = jit(lambda x: solve(velocity, x, whole))(jnp.zeros((4, 1)))
    assert not np.any(found.reached) and set(found.time.tolist()) == {0.0}


def test_orders_of_convergence(jit):
    """Halving the step divides the error by 2 (Euler) and by 4 (Heun, and the flow and back)."""
    x = jnp.linspace(-1, 1, 4, dtype=jnp.float64)[:, None]

    @jit
    def run(x):
        exact = solve(curved, x, recipe("rk45:1e-12")).x
        error = lambda name: jnp.max(jnp.abs(solve(curved, x, recipe(name)).x - exact))
        errors = {m: [error(f"{m}:{n}") for n in (40, 80)] for m in ("euler", "heun")}
        back = solve(curved, exact, Solver("rk45", (1.0, 0.0), rtol=1e-12, atol=1e-12)).x
        return errors, back

    errors, back = run(x)
    assert 1.9 < errors["euler"][0] / errors["euler"][1] < 2.1
    assert 3.7 < errors["heun"][0] / errors["heun"][1] < 4.3
    np.testing.assert_allclose(back, x, atol=1e-9)


def test_noise_belongs_to_examples(jit):
    """With a key per example, a row's samples do not depend on its neighbours."""
    x = jnp.ones((3, 2))
    for name in ("rf_sde:3:0.5", "cm_stochastic:3", "rfpp_invert_euler:2"):
        run = jit(lambda x, keys, n=name: solve(curved, x, recipe(n), key=keys).x)
        keys = lambda: jax.random.split(jax.random.key(1), 3)
        two_rows, all_rows = run(x[1:], keys()[1:]), run(x, keys())
        np.testing.assert_array_equal(all_rows[1:], two_rows)
        assert len(np.unique(all_rows)) == 6
        one_key = run(x, keys()[0])
        assert len(np.unique(one_key)) == 6


def test_what_solvers_begin_with():
    """2-RF++: 1 - 1e-5 of the noise; 0.999 of an image and 0.001 of noise. Others: as it is."""
    x, xi = jnp.ones((2, 3)), jnp.full((1, 2, 3), 5.0)
    still = lambda x, t: 0 * x
    for name, want in (
        ("rfpp_new_heun:1", 1 - 1e-5),
        ("rfpp_invert_euler:1", 0.999 + 0.005),
        ("rf_euler:1", 1),
    ):
        found = solve(still, x, recipe(name), noise=xi, trajectory=True)
        np.testing.assert_allclose(found.trajectory[0], want, rtol=1e-12)


def test_transformations(jit):
    """vmap over starts gives what single calls do; gradients flow through fixed steps."""
    x = jnp.linspace(-1, 1, 8).reshape(4, 1, 2)
    for name in ("heun:3", "rk45"):
        follow = jit(lambda x, n=name: solve(curved, x, recipe(n)))
        many = jit(jax.vmap(lambda x, n=name: solve(curved, x, recipe(n))))(x)
        for i in range(4):
            one = follow(x[i])
            np.testing.assert_allclose(many.x[i], one.x, rtol=1e-12)
            assert many.nfe[i] == one.nfe
    end = lambda x: jnp.sum(solve(curved, x, recipe("rfpp_heun:5")).x)
    check_grads(end, (x[0],), order=1, modes=["rev"])


def test_half_precision_is_carried_in_float32():
    found = solve(
        lambda x, t: x.astype(jnp.bfloat16), jnp.ones((1, 2), jnp.bfloat16), recipe("euler:3")
    )
    assert found.x.dtype == jnp.float32


@pytest.mark.parametrize(
    "text, message",
    [
        ("rf_rk4", "unknown solver 'rf_rk4'; choose one of euler:N, heun:N, rk45"),
        ("rfpp_heun:4", r"use rfpp_heun:NFE \(the number of evaluations must be odd"),
        ("rfpp_invert_heun:2", "must be odd"),
        ("rf_euler:0", r"use rf_euler:N \(a solver makes at least one step, got 0"),
        ("rf_euler", "use rf_euler:N"),
        ("rf_euler:2.5", "2.5 is not a whole number"),
        ("rf_euler:many", "use rf_euler:N"),
        ("slimflow_one_step:1", "use slimflow_one_step"),
        ("rf_rk45:0", r"use rf_rk45\[:TOL\] \(solver.rtol must be positive"),
        ("rf_sde:4:-1", "solver.sigma must not be negative"),
        ("rfpp_euler:inf", "use rfpp_euler:N"),
    ],
)
def test_bad_recipes(text, message):
    with pytest.raises(ValueError, match=message):
        recipe(text)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"method": "rk4"}, "solver.method must be one of euler"),
        ({"rule": "new"}, "solver.rule must be one of default, renoise"),
        ({"displacement": "one"}, "solver.displacement must be one of"),
        ({"grid": (0.0, 0.5, 1.1)}, r"must be in \[0, 1\]"),
        ({"grid": (0.0, float("nan"))}, r"must be in \[0, 1\]"),
        ({"grid": (0.0, 0.5, 0.5)}, "must rise or fall"),
        ({"grid": (0.5,)}, "at least one step"),
        ({"method": "rk45", "grid": (0.0, 0.5, 1.0)}, r"give grid=\(start, end\) only"),
        ({"method": "rk45", "displacement": "unit"}, "only"),
        ({"method": "sde", "grid": (1.0, 0.0)}, "the grid must rise"),
        ({"rule": "renoise", "grid": (1.0, 0.0)}, "the grid must rise"),
        ({"rule": "renoise", "displacement": "unit"}, "use displacement 'grid'"),
        ({"rule": "renoise", "method": "rk45"}, "is for euler and heun"),
        ({"method": "cm_stochastic", "displacement": "unit"}, "use displacement 'grid'"),
        ({"sigma": 0.1}, "solver.sigma is for sde"),
        ({"per_sample": True}, "solver.per_sample for rk45"),
        ({"method": "sde", "input_noise": 0.1}, "is for euler, heun and rk45"),
        ({"max_steps": 0}, "max_steps must be positive"),
    ],
)
def test_bad_solvers(changes, message):
    with pytest.raises(ValueError, match=message):
        Solver(**{"method": "euler", "grid": (0.0, 1.0), **changes})


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("cm_stochastic:2", {}, "draws noise: pass key"),
        ("cm_stochastic:2", {"noise": jnp.zeros((1, 2, 3))}, r"noise must be \(2, 2, 3\)"),
        ("cm_stochastic:2", {"key": jnp.zeros(2, jnp.uint32)}, "key must be one key"),
        ("rk45", {"trajectory": True}, "rk45 has no fixed grid"),
        ("euler:1", {"velocity": lambda x, t: t}, "the velocity of x"),
        ("euler:1", {"x": jnp.zeros((0, 3))}, "with B >= 1"),
    ],
)
def test_bad_calls(name, arguments, message):
    arguments = {"velocity": curved, "x": jnp.zeros((2, 3)), "solver": recipe(name), **arguments}
    with pytest.raises(ValueError, match=message):
        solve(**arguments)
