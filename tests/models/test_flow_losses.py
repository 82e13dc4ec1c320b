"""Losses and weights of flows against the published code: values and gradients in float64."""

import flow_goldens as goldens
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scanax.models.rectified_flow import losses, path, time_density
from scanax.models.rectified_flow.distillation import pair_loss
from scanax.models.rectified_flow.perceptual import conv_distance, resized


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


def compare(check, name, file, tolerance, loss, gradient):
    """Every gradient that the file has for this loss, and the loss itself."""
    check(name, loss, file[f"{name}_loss"], tolerance)
    found = [key for key in gradient if f"{name}_grad_{key}" in file]
    assert found
    for key in found:
        check(f"{name} {key}", gradient[key], file[f"{name}_grad_{key}"], tolerance)


def test_path(check):
    file = goldens.load("rf_losses")
    x0, x1 = goldens.last(file["z0"]), goldens.last(file["x1"])
    t = time_density("uniform").from_uniform(jnp.asarray(file["u"]))
    check("t", t, file["t_std"], 1e-14)
    x_t, v = path.interpolate(x0, x1, t), path.target(x0, x1)
    check("x_t", goldens.first(x_t), file["xt_std"], 1e-14)
    check("target", goldens.first(v), file["target"], 1e-14)
    check("data", path.predicted_data(x_t, v, t), x1, 1e-14)
    check("noise", path.predicted_noise(x_t, v, t), x0, 1e-14)
    with pytest.raises(ValueError, match="one number per example"):
        path.interpolate(x0, x1, t[:2])
    with pytest.raises(ValueError, match="must have the same shape"):
        path.interpolate(x0[:2], x1, t)


def test_rectified_flow(check, jit):
    file = goldens.load("rf_losses")
    x0, x1 = goldens.last(file["z0"]), goldens.last(file["x1"])
    distance = conv_distance([goldens.kernel(file)])
    ours = {
        "std_mean": ("l2", "uniform"),
        "std_halfsum": ("half_sum", "uniform"),
        "reflow_t0_l2": ("l2", "t0"),
        "reflow_t0_lpips": ("distill_lpips", "t0"),
        "reflow_t0_lpips_l2": ("distill_lpips_l2", "t0"),
        "reflow_t1_l2": ("l2", "t1"),
        "reflow_uniform_l2": ("l2", "uniform"),
        "reflow_k2_l2": ("l2", "k_step:2"),
        "reflow_k4_l2": ("l2", "k_step:4"),
    }
    assert {f"{name}_loss" for name in ours} == {key for key in file if key.endswith("_loss")}

    def run(params):
        def loss(params, name, times):
            u = jnp.asarray(file["u"])
            if times.startswith("k_step"):  # the file has the index that was drawn
                k = int(times[-1])
                u = (jnp.asarray(file[f"reflow_k{k}_idx"], jnp.float64) + 0.5) / k
            t = time_density(times).from_uniform(u)
            net = lambda x, t: goldens.apply(params, x, t)
            return jnp.mean(pair_loss(name, net, x0, x1, t, distance))

        return {
            key: jax.value_and_grad(loss)(params, *arguments) for key, arguments in ours.items()
        }

    for key, found in jit(run)(goldens.part(file, "net_")).items():
        compare(check, key, file, 1e-10, *found)


def test_two_rf_plus_plus(check, jit):
    """Their time is 1 - ours, and their velocity -v."""
    file = goldens.load("rfpp_losses")
    x0, x1, t = goldens.last(file["z"]), goldens.last(file["x"]), 1 - jnp.asarray(file["t"])
    bare = conv_distance([goldens.kernel(file)])
    unit = lambda x, y: bare(0.5 * x + 0.5, 0.5 * y + 0.5)
    distance = resized(unit, 224, align_corners=False)
    names = {name: name for name in ("huber", *(n for n in losses.LOSSES if n[:5] == "lpips"))}
    names |= {"l2_squared": "l2", "l2": "root_l2"}
    assert {f"{name}_loss" for name in names} == {key for key in file if key.endswith("_loss")}
    net = lambda params, x, t: -goldens.apply(params, x, 1 - t)

    def run(params):
        x_t = path.interpolate(x0, x1, t)
        loss = lambda params, name: jnp.mean(
            losses.per_example(name, net(params, x_t, t), x_t, t, x0, x1, distance)
        )
        v = net(params, x_t, t)
        arrays = {"zt": x_t, "target": -path.target(x0, x1), "pred": -v}
        arrays["pred_x"] = path.predicted_data(x_t, v, t)
        return arrays, {key: jax.value_and_grad(loss)(params, name) for key, name in names.items()}

    arrays, found = jit(run)(goldens.part(file, "net_"))
    for key, array in arrays.items():
        check(key, goldens.first(array), file[key], 1e-9)
    for key, pair in found.items():
        compare(check, key, file, 1e-9, *pair)


def test_pseudo_huber(check):
    """Over residuals of many sizes, and as it is asked for: by form, or by number."""
    file = goldens.load("rfpp_losses")
    norm = jnp.asarray(file["ph_resid_norm"])
    d = file["x"][0].size
    zero = jnp.zeros((len(norm), d))
    t = jnp.zeros(len(norm))

    def huber(norm, c):
        v = zero.at[:, 0].set(norm)
        return losses.per_example("huber", v, zero, t, zero, zero, huber_c=c)

    value, slope = jax.jvp(lambda n: huber(n, "d"), (norm,), (jnp.ones_like(norm),))
    check("value", value, file["ph_value_over_d"], 1e-9)
    check("slope", slope, file["ph_dvalue_dr_over_d"], 1e-9)
    np.testing.assert_allclose(value, huber(norm, float(file["huber_c_code"])), rtol=1e-12)
    root = huber(norm, float(file["huber_c_iCT_sqrt"]))
    np.testing.assert_allclose(huber(norm, "sqrt_d"), root, rtol=1e-12)
    narrow = lambda x: x.astype(jnp.float32)
    small = losses.per_example("huber", *(narrow(x) for x in (zero + 1e-6, zero, t, zero, zero)))
    np.testing.assert_allclose(small, huber(jnp.full_like(t, 1e-6 * d**0.5), "d"), rtol=1e-5)


def test_slim_flow(check, jit):
    file = goldens.load("slim_losses")
    x0, x1 = goldens.last(file["z0"]), goldens.last(file["x1"])
    distance = resized(conv_distance([goldens.kernel(file)]), 64, align_corners=True)
    t0 = time_density("t0").from_uniform(jnp.asarray(file["u"]))
    t = time_density("uniform").from_uniform(jnp.asarray(file["u"]))
    names = {"l2": "l2", "l1": "l1"}
    names |= {name: f"distill_{name}" for name in ("lpips", "lpips_l2", "lpips_l1")}

    def run(params):
        net = lambda params: lambda x, t: goldens.apply(params, x, t)
        loss = lambda params, name: jnp.mean(pair_loss(name, net(params), x0, x1, t0, distance))
        found = {f"distill_t0_{k}": jax.value_and_grad(loss)(params, n) for k, n in names.items()}
        return found, pair_loss("l2", net(params), x0, x1, t)

    found, loss_B = jit(run)(goldens.part(file, "student_"))
    for key, pair in found.items():
        compare(check, key, file, 1e-9, *pair)
    for name in losses.WEIGHTS:
        theirs = name.replace("_", "-") if name == "truncated_snr" else name
        weight_B = losses.weight(name, t)
        if name == "snr":  # which the published code cannot do
            assert file["weight_snr_raises_NotImplemented"]
            np.testing.assert_allclose(weight_B, file["weight_snr+1_w"] - 1, rtol=1e-9)
            continue
        check(name, weight_B, file[f"weight_{theirs}_w"], 1e-9)
        check(name, jnp.mean(weight_B * loss_B), file[f"weight_{theirs}_loss"], 1e-9)


def test_training_steps(check, jit):
    """Eight updates: warm-up counted before the update, clipping, Adam, EMA with its warm-up."""
    file = goldens.load("rf_train_steps")
    lr, warmup, rate = (float(file[key]) for key in ("lr", "warmup", "ema_rate"))
    clip = float(file["grad_clip"])
    optimizer = optax.adam(lambda step: lr * jnp.minimum(step.astype(jnp.float64) / warmup, 1))

    @jit
    def update(params, ema, state, n, x0, x1, u):
        t = time_density("uniform").from_uniform(u)
        net = lambda params: lambda x, t: goldens.apply(params, x, t)
        loss = lambda params: jnp.mean(pair_loss("l2", net(params), x0, x1, t))
        value, gradient = jax.value_and_grad(loss)(params)
        # Optax's clipping leaves out what torch adds to the norm.
        share = jnp.minimum(1, clip / (optax.tree.norm(gradient) + 1e-6))
        gradient = jax.tree.map(lambda g: share * g, gradient)
        updates, state = optimizer.update(gradient, state)
        params = optax.apply_updates(params, updates)
        decay = jnp.minimum(rate, (1 + n) / (10 + n))
        ema = jax.tree.map(lambda s, p: s - (1 - decay) * (s - p), ema, params)
        return params, ema, state, value

    params = {key: jnp.asarray(x) for key, x in goldens.part(file, "init_").items()}
    ema, state = params, optimizer.init(params)
    for i in range(len(file["loss"])):
        x0, x1 = goldens.last(file["z0"][i]), goldens.last(file["x1"][i])
        n = jnp.float64(i + 1)
        with jax.numpy_dtype_promotion("standard"):  # inside of optax
            params, ema, state, value = update(params, ema, state, n, x0, x1, file["u"][i])
        check("loss", value, file["loss"][i], 1e-9)
        check("rate", lr * min(i / warmup, 1), file["lr_used"][i], 1e-12)
        for key in params:
            check(key, params[key], file[f"param_{key}"][i], 1e-12)
            check(key, ema[key], file[f"ema_{key}"][i], 1e-9)


def test_gradients_at_the_target_are_zero():
    x = jnp.ones((2, 4, 4, 1))
    t = jnp.full(2, 0.5)
    for name in ("root_l2", "huber"):
        loss = lambda v, n=name: jnp.sum(losses.per_example(n, v, x, t, 0 * x, x))
        assert not np.any(jax.grad(loss)(x)), name


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"name": "l3"}, "unknown loss 'l3'; choose one of l2, half_sum"),
        ({"name": "lpips_huber"}, "pass a perceptual distance"),
        ({"name": "huber", "huber_c": 0.0}, "huber_c must be positive"),
        ({"name": "huber", "huber_c": "sqrt"}, "huber_c must be a number"),
        ({"v": jnp.zeros((2, 3, 3, 1))}, "must have the shape of x0"),
        ({"t_B": jnp.zeros((2, 1))}, "one number per example"),
        ({"name": "lpips", "distance": lambda x, y: x - y}, "the distance must return"),
    ],
)
def test_bad_losses(changes, message):
    x = jnp.zeros((2, 4, 4, 1))
    arguments = {"name": "l2", "v": x, "x_t": x, "t_B": jnp.zeros(2), "x0": x, "x1": x, **changes}
    with pytest.raises(ValueError, match=message):
        losses.per_example(**arguments)


def test_unknown_weight():
    with pytest.raises(ValueError, match="unknown weight 'snr2'; choose one of uniform"):
        losses.weight("snr2", jnp.zeros(1))
