"""Annealing reflow and flow-guided distillation against the published code, in float64."""

import flow_goldens as goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scanax.models.rectified_flow import annealing, distillation, path, time_density
from scanax.models.rectified_flow.perceptual import conv_distance, resized


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def test_schedules(check):
    file = goldens.load("slim_schedule")
    steps, warmup = jnp.asarray(file["steps"]), int(file["warmup_iters"])
    names = {f"beta_{s}": f"{s}:{warmup}" for s in ("linear", "exp", "cos")}
    names["beta_fix0p3"] = "fixed:0.3"
    assert set(names) == {key for key in file if key.startswith("beta")}
    for key, name in names.items():
        beta = annealing.schedule(name).beta
        check(key, beta(steps.astype(jnp.float64)), file[key], 1e-12)
        np.testing.assert_allclose(beta(jnp.int32(steps[3])), file[key][3], rtol=1e-6)


def test_annealing_reflow(check, jit):
    """The published code flips the whole batch."""
    file = goldens.load("slim_losses")
    z0, x1, xi = (goldens.last(file[key]) for key in ("z0", "x1", "fresh_noise"))
    t = time_density("uniform").from_uniform(jnp.asarray(file["u"]))
    schedule = annealing.schedule("linear:300000")

    @jit
    def run(params, step, flip):
        flip_B = jnp.full(len(z0), flip)
        beta = schedule.beta(step)
        x0 = annealing.mirror(annealing.anneal(z0, xi, beta), flip_B)
        data = annealing.mirror(x1, flip_B)

        def loss(params):
            net = lambda x, t: goldens.apply(params, x, t)
            return jnp.mean(distillation.pair_loss("l2", net, x0, data, t))

        value, gradient = jax.value_and_grad(loss)(params)
        arrays = {"noise": x0, "data": data, "xt": path.interpolate(x0, data, t)}
        arrays["target"] = path.target(x0, data)
        return beta, arrays, {"loss": value, **{f"grad_{k}": g for k, g in gradient.items()}}

    cases = [key.removesuffix("_beta") for key in file if key.endswith("_beta")]
    assert len(cases) == 10
    for case in cases:
        _, step, flip = case.split("_")
        want = goldens.part(file, f"{case}_")
        params = goldens.part(file, "student_")
        beta, arrays, values = run(params, jnp.float64(step[1:]), flip == "flip1")
        check(case, beta, want.pop("beta"), 1e-9)
        check(case, t, want.pop("t"), 1e-9)
        for key, array in arrays.items():
            check(f"{case} {key}", goldens.first(array), want.pop(key), 1e-9)
        for key, array in want.items():
            check(f"{case} {key}", values[key], array, 1e-9)


def test_annealed_noise_stays_normal():
    """Its ends, and its variance between them."""
    z0, xi = (jax.random.normal(jax.random.key(i), (100, 1000)) for i in range(2))
    for beta in (0.0, 0.3, 0.9, 1.0):
        found = annealing.anneal(z0, xi, jnp.float64(beta))
        assert abs(jnp.var(found) - 1) < 0.02
        if beta in (0, 1):
            np.testing.assert_array_equal(found, xi if beta else z0)


def test_flips_are_of_pairs(jit):
    """A coin per key, the same one for noise and image; with one key, one coin for all."""
    x0 = jnp.arange(64.0 * 2 * 3).reshape(64, 2, 3, 1)
    flip = jit(annealing.flip_pair)
    noise, image = flip(jax.random.split(jax.random.key(0), 64), x0, x0 + 1000)
    np.testing.assert_array_equal(noise + 1000, image)
    flipped = np.asarray(noise[:, 0, 0, 0] != x0[:, 0, 0, 0])
    assert 20 <= flipped.sum() <= 44
    np.testing.assert_array_equal(noise[flipped], x0[flipped][:, :, ::-1])
    np.testing.assert_array_equal(noise[~flipped], x0[~flipped])
    seen = set()
    for seed in range(8):
        noise, _ = flip(jax.random.key(seed), x0, x0)
        coins = set(np.asarray(noise[:, 0, 0, 0] != x0[:, 0, 0, 0]).tolist())
        assert len(coins) == 1
        seen |= coins
    assert seen == {True, False}


def test_flow_guided_distillation(check, jit):
    file = goldens.load("slim_losses")
    x0, x1, xi = (goldens.last(file[key]) for key in ("z0", "x1", "teacher_noise"))
    distance = resized(conv_distance([goldens.kernel(file)]), 64, align_corners=True)
    t0 = time_density("t0").from_uniform(jnp.asarray(file["u"]))
    low, high = distillation.LEGS
    s = time_density(f"range:{low}:{high}").from_uniform(jnp.asarray(file["u_teacher"]))
    check("s", s, file["fgd_t"], 1e-12)
    teacher = lambda x, t: goldens.apply(goldens.part(file, "teacher_"), x, t)

    def run(params):
        net = lambda params: lambda x, t: goldens.apply(params, x, t)

        def two_step(params, name, first):
            loss_B = distillation.two_step_loss(
                name, net(params), teacher, xi, s, distance, first=first
            )
            return jnp.mean(loss_B)

        def total(params, name):
            direct_B = distillation.pair_loss(name, net(params), x0, x1, t0, distance)
            return jnp.mean(direct_B) + two_step(params, name, "student")

        found = {}
        for key, name in (("l2", "l2"), ("lpips", "distill_lpips")):
            found[f"fgd_{key}_total"] = jax.value_and_grad(total)(params, name)
            for first in distillation.FIRST:
                pair = jax.value_and_grad(two_step)(params, name, first)
                found[f"fgd_{key}_twostep_{first}_first"] = pair
        return found

    found = jit(run)(goldens.part(file, "student_"))
    assert {f"{k}_loss" for k in found} == {k for k in file if k[:3] == "fgd" and k[-4:] == "loss"}
    compared = 0
    for key, (value, gradient) in found.items():
        check(key, value, file[f"{key}_loss"], 1e-9)
        for name in gradient:
            if f"{key}_grad_{name}" in file:
                check(f"{key} {name}", gradient[name], file[f"{key}_grad_{name}"], 1e-9)
                compared += 1
    assert compared == 8


def test_two_steps_have_the_huber_constant_of_the_pairs():
    """c beyond any residual makes it r^2 / (2 c d)."""
    still = lambda x, t: 0 * x
    one = lambda x, t: jnp.ones_like(x)
    loss = lambda c: distillation.two_step_loss(
        "huber", still, one, jnp.zeros((1, 4)), jnp.asarray([0.5]), huber_c=c
    )
    np.testing.assert_allclose(loss(1e3), 4 * 0.5**2 / (2 * 1e3 * 4), rtol=1e-5)
    np.testing.assert_allclose(loss(1e-6), 1 / 4, rtol=1e-5)


@pytest.mark.parametrize(
    "text, message",
    [
        ("linear", "use linear:W"),
        ("sine:300", "unknown annealing 'sine'; choose one of linear"),
        ("cos:0", "takes a positive number of steps"),
        ("fixed:1.5", r"must be in \[0, 1\]"),
        ("fixed:nan", r"must be in \[0, 1\]"),
    ],
)
def test_bad_annealing(text, message):
    with pytest.raises(ValueError, match=message):
        annealing.schedule(text)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"first": "both"}, "first must be 'student' or 'teacher'"),
        ({"name": "distill_lpips"}, "pass a perceptual distance"),
        ({"s_B": jnp.zeros(3)}, "one number per example"),
    ],
)
def test_bad_distillation(changes, message):
    still = lambda x, t: 0 * x
    arguments = {"name": "l2", "xi": jnp.zeros((2, 4)), "s_B": jnp.ones(2) / 2, **changes}
    with pytest.raises(ValueError, match=message):
        distillation.two_step_loss(student=still, teacher=still, **arguments)
