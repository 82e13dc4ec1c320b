"""Losses of masked diffusion against the published code, in float64 and float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import radd_goldens as goldens

from scanax.models.radd import (
    LOSSES,
    Corruption,
    Loss,
    Noise,
    ar_nats,
    cross_entropy,
    losses,
    schedule,
    score_entropy,
    times,
    value,
)

FILES = {"losses_a": "log_linear", "losses_b": "geometric"}
GOLDEN_LOSSES = {
    "t_dse": ("t_DSE", "x_t"),
    "t_dce": ("t_DCE", "x_t"),
    "lambda_dce": ("lambda_DCE", "x_lambda"),
    "k_dce": ("k_DCE", "x_k"),
}


def golden_noise(file, name: str, dtype) -> Noise:
    """The draw that the file has for a loss."""
    if name != "k_dce":
        return Noise(jnp.asarray(file["u"], dtype), jnp.asarray(file["mask_uniforms"], dtype))
    perm_BT = jnp.asarray(file["perms"], jnp.int32)
    length = perm_BT.shape[1]
    u_B = times.uniform_of(jnp.asarray(file["k"], jnp.int32), length, dtype)
    return Noise(u_B, perm_BT.astype(dtype) / length)


@pytest.mark.parametrize("bits, tolerance", [(64, 1e-9), (32, 1e-5)])
@pytest.mark.parametrize("name", FILES)
def test_reference(name, bits, tolerance, jit):
    """Masks, cross entropies per token, losses, and the score entropy of any scores."""
    file, noise_schedule = goldens.load(name), schedule(FILES[name])
    dtype, mask_id, vocabulary = f"float{bits}", int(file["mask_id"]), int(file["vocab"])
    with jax.enable_x64(bits == 64):
        x0_BT = jnp.asarray(file["x0"], jnp.int32)
        noises = {ours: golden_noise(file, ours, dtype) for ours in GOLDEN_LOSSES}

        def run(raw_BTS, log_cond_BTS, log_score_BTS, noises):
            ce_BT = cross_entropy(raw_BTS, x0_BT, vocabulary)
            found: dict[str, tuple[jax.Array, ...]] = {
                "again": (ce_BT, cross_entropy(log_cond_BTS, x0_BT, vocabulary))
            }
            for ours, noise in noises.items():
                corruption = Loss(ours, noise_schedule).corrupt(noise)
                x_BT = jnp.where(corruption.mask_BT, mask_id, x0_BT)
                found[ours] = (x_BT, value(corruption, ce_BT), token_values(corruption, ce_BT))
            t_B = Loss("t_dse", noise_schedule).time(noises["t_dse"].u_B)
            mask_BT = found["t_dse"][0] == mask_id
            rate_B, log_odds_B = noise_schedule.rate(t_B), noise_schedule.log_odds(t_B)
            scores = (
                log_score_BTS[..., :vocabulary],
                jax.nn.log_softmax(raw_BTS[..., :vocabulary]) + log_odds_B[:, None, None],
            )
            found["entropy"] = tuple(
                score_entropy(x, x0_BT, mask_BT, rate_B, log_odds_B) for x in scores
            )
            found["schedule"] = (t_B, noise_schedule.total(t_B), rate_B)
            return found

        arrays = [
            jnp.asarray(file[key], dtype) for key in ("raw_logits", "log_cond", "log_score_unnorm")
        ]
        found = jit(run)(*arrays, noises)
    close = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    close(*found["again"])
    for ours, (theirs, x) in GOLDEN_LOSSES.items():
        x_BT, loss_B, token_BT = found[ours]
        np.testing.assert_array_equal(x_BT, file[x], err_msg=ours)
        assert loss_B.dtype == dtype
        close(loss_B, file[f"loss_{theirs}"], err_msg=ours)
        close(token_BT, file[f"tok_{theirs}"], err_msg=ours)
    unnormalised_BT, normalised_BT = found["entropy"]
    # Three terms that cancel: in float32 the largest of them sets the error.
    slack = 0 if bits == 64 else 1e-4
    close(unnormalised_BT, file["tok_score_entropy_unnorm"], atol=tolerance + slack)
    close(normalised_BT, file["tok_t_DSE"], atol=tolerance + slack)
    for got, key in zip(found["schedule"], ("t", "sigma", "dsigma"), strict=True):
        close(got, file[key])


def token_values(corruption: Corruption, ce_BT):
    """The parts of ``value`` per token."""
    one = lambda mask_BT, ce_BT, share_B: value(
        Corruption(mask_BT, corruption.weight_B, corruption.constant_B * share_B), ce_BT
    )
    count_B = jnp.maximum(jnp.sum(corruption.mask_BT, axis=1), 1).astype(ce_BT.dtype)
    columns = [
        one(corruption.mask_BT[:, i : i + 1], ce_BT[:, i : i + 1], in_B / count_B)
        for i, in_B in enumerate(corruption.mask_BT.astype(ce_BT.dtype).T)
    ]
    return jnp.stack(columns, axis=1)


@pytest.mark.parametrize("name", FILES)
def test_same_gradient(name, jit):
    """Of t_dse, of t_dce and of the three terms of the score entropy, example by example."""
    file, noise_schedule = goldens.load(name), schedule(FILES[name])
    vocabulary = int(file["vocab"])
    with jax.enable_x64(True):
        x0_BT = jnp.asarray(file["x0"], jnp.int32)
        noise = golden_noise(file, "t_dse", "float64")

        def coded(name, raw_BTS):
            ce_BT = cross_entropy(raw_BTS, x0_BT, vocabulary)
            return value(Loss(name, noise_schedule).corrupt(noise), ce_BT)

        def three_terms(raw_BTS):
            loss = Loss("t_dse", noise_schedule)
            t_B = loss.time(noise.u_B)
            log_odds_B = noise_schedule.log_odds(t_B)
            log_BTV = jax.nn.log_softmax(raw_BTS[..., :vocabulary]) + log_odds_B[:, None, None]
            mask_BT = loss.corrupt(noise).mask_BT
            entropy_BT = score_entropy(
                log_BTV, x0_BT, mask_BT, noise_schedule.rate(t_B), log_odds_B
            )
            return jnp.sum(entropy_BT, axis=1)

        def gradient(f, raw_BTS):  # an example's loss depends on its own logits only
            return jax.grad(lambda raw_BTS: jnp.sum(f(raw_BTS)))(raw_BTS)

        def run(raw_BTS):
            fs = (lambda x: coded("t_dse", x), lambda x: coded("t_dce", x), three_terms)
            return [gradient(f, raw_BTS) for f in fs]

        dse, dce, three = jit(run)(jnp.asarray(file["raw_logits"]))
    np.testing.assert_array_equal(dse, dce)
    np.testing.assert_allclose(three, dse, rtol=1e-9, atol=1e-9)
    assert np.all(np.asarray(dse)[..., vocabulary] == 0) and np.any(np.asarray(dse) != 0)


@pytest.mark.parametrize("bits, tolerance", [(64, 1e-9), (32, 1e-5)])
@pytest.mark.parametrize("name", FILES)
def test_ar(name, bits, tolerance, jit):
    """In three orders, one for all examples or one for each."""
    file = goldens.load(name)
    mask_id = int(file["mask_id"])
    with jax.enable_x64(bits == 64):
        x0_BT = jnp.asarray(file["x0"], jnp.int32)
        length = x0_BT.shape[1]
        orders = {
            "forward": np.arange(length),
            "backward": np.arange(length)[::-1],
            "random": file["ar_random_order"],
        }

        def run(weight_TSTV):
            def conditionals(x_BT):
                one_BTS = jax.nn.one_hot(x_BT, weight_TSTV.shape[1], dtype=weight_TSTV.dtype)
                logits = jnp.einsum("bps,pslv->blv", one_BTS, weight_TSTV, precision="highest")
                return jax.nn.log_softmax(logits)

            found = {
                key: ar_nats(conditionals, x0_BT, jnp.asarray(order, jnp.int32), mask_id)
                for key, order in orders.items()
            }
            rows = [list(orders.values())[i % 3] for i in range(len(x0_BT))]
            found["each"] = ar_nats(conditionals, x0_BT, jnp.asarray(rows, jnp.int32), mask_id)
            return found

        found = jit(run)(jnp.asarray(file["arW"], f"float{bits}"))
        with pytest.raises(ValueError, match="does not fit"):
            ar_nats(lambda x: x, x0_BT, jnp.arange(length + 1), mask_id)
    for i, key in enumerate(orders):
        want = file[f"loss_ar_{key}"]
        np.testing.assert_allclose(found[key], want, rtol=tolerance, err_msg=key)
        np.testing.assert_allclose(found["each"][i::3], want[i::3], rtol=tolerance, err_msg=key)


def test_md4(jit):
    """Continuous and discrete time, and the reconstruction."""
    file = goldens.load("md4")
    with jax.enable_x64(True):
        x0_BT = jnp.asarray(file["loss_x0"], jnp.int32)
        logits_BTV = jnp.asarray(file["loss_logits"])
        vocabulary, steps = logits_BTV.shape[2], int(file["timesteps"])
        # The reference keeps a token where its number is below alpha.
        noise = Noise(jnp.asarray(file["loss_t"]), jnp.asarray(1 - file["loss_unmask_uniforms"]))
        nelbo = lambda name, **options: value(
            Loss("nelbo", schedule(name), **options).corrupt(noise),
            cross_entropy(logits_BTV, x0_BT, vocabulary),
        )
        run = lambda: {
            name: (nelbo(name), nelbo(name, steps=steps), nelbo(name, reconstruction=vocabulary))
            for name in ("linear", "cosine")
        }
        for name, (continuous, discrete, with_reconstruction) in jit(run)().items():
            close = functools.partial(np.testing.assert_allclose, rtol=1e-10, err_msg=name)
            close(continuous, file[f"loss_diff_{name}_cont"])
            close(discrete, file[f"loss_diff_{name}_disc"])
            want = np.full(len(x0_BT), file[f"loss_recon_{name}"])
            close(with_reconstruction - continuous, want, rtol=1e-9)


def test_nelbo_is_t_dse_without_the_cut():
    noise = Noise(jnp.asarray([0.2, 0.7]), jnp.asarray([[0.1, 0.5, 0.9], [0.6, 0.8, 0.2]]))
    same = [Loss("nelbo", cut=1e-3).corrupt(noise), Loss("t_dse").corrupt(noise)]
    jax.tree.map(np.testing.assert_array_equal, *same)
    np.testing.assert_allclose(Loss("nelbo").corrupt(noise).weight_B, [5, 1 / 0.7], rtol=1e-6)


def test_draw_is_per_row(jit):
    """A row's noise is the same whatever rows are beside it."""
    keys_B, u_B = jax.random.split(jax.random.key(5), 6), times.draw("iid", jax.random.key(6), 6)

    def run(keys_B, u_B):
        draw = lambda rows: Loss("k_dce").draw(jax.random.clone(keys_B)[rows], u_B[rows], 7)
        return draw(slice(0, 6)), draw(slice(3, 6))

    whole, half = jit(run)(keys_B, u_B)
    assert whole.uniforms_BT.shape == (6, 7) and whole.uniforms_BT.dtype == jnp.float32
    np.testing.assert_array_equal(whole.uniforms_BT[3:], half.uniforms_BT)
    assert len(np.unique(whole.uniforms_BT)) == 42


EDGES = (0.0, 2.0**-24, 1e-6, 1e-3, 0.5, 1 - 2.0**-24)


def test_float32_ends(jit):
    """Finite values and gradients at u from 0 to 1, where a float32 draw may be; k's masks."""
    u_B = jnp.asarray(EDGES, jnp.float32)
    noise = Loss("t_dse").draw(jax.random.split(jax.random.key(7), len(EDGES)), u_B, 16)
    logits = jax.random.normal(jax.random.key(8), (len(EDGES), 16, 5))
    x0_BT = jnp.asarray(np.arange(len(EDGES) * 16).reshape(-1, 16) % 5, jnp.int32)
    every = [
        Loss(name, schedule(text))
        for name in LOSSES
        for text in ("log_linear", "geometric", "linear", "cosine", "polynomial:2")
        if name not in ("lambda_dce", "k_dce") or text == "log_linear"
    ] + [Loss("nelbo", schedule("linear"), steps=1000, reconstruction=5)]

    def run(logits_BTV):
        def both(loss):
            corruption = loss.corrupt(noise)
            f = lambda x: value(corruption, cross_entropy(x, x0_BT, 5))
            total = lambda x: jnp.sum(f(x))
            return corruption.mask_BT, f(logits_BTV), jax.grad(total)(logits_BTV)

        return [both(loss) for loss in every]

    for loss, (mask_BT, value_B, grad) in zip(every, jit(run)(logits), strict=True):
        assert np.all(np.isfinite(value_B)) and np.all(np.isfinite(grad)), loss
        assert value_B.dtype == jnp.float32
        if loss.name == "k_dce":
            np.testing.assert_array_equal(np.sum(mask_BT, 1), [1, 1, 1, 1, 9, 16])
        elif loss.name == "lambda_dce":
            assert np.all(mask_BT[-1]) and not np.any(mask_BT[0])


def test_low_precision_logits():
    """bfloat16 logits are summed in float32; ranks are a permutation even with ties."""
    ce_BT = cross_entropy(jnp.zeros((2, 3, 6), jnp.bfloat16), jnp.zeros((2, 3), jnp.int32), 5)
    assert ce_BT.dtype == jnp.float32
    np.testing.assert_allclose(ce_BT, np.log(5), rtol=1e-6)
    tied = jnp.asarray([[0.5, 0.5, 0.1], [0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(losses.ranks(tied), [[1, 2, 0], [0, 1, 2]])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": "dse"}, "choose one of t_dse, t_dce, lambda_dce, k_dce, nelbo"),
        ({"name": "t_dse", "cut": 1.0}, "smallest time"),
        ({"name": "nelbo", "steps": -1}, "not be negative"),
        ({"name": "k_dce", "steps": 10}, "are of the loss nelbo"),
    ],
)
def test_bad_losses(arguments, message):
    with pytest.raises(ValueError, match=message):
        Loss(**arguments)


def test_bad_shapes():
    noise = Noise(jnp.zeros(2), jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match="cross entropies must be"):
        value(Loss("k_dce").corrupt(noise), jnp.zeros((2, 4)))
    with pytest.raises(ValueError, match="4 columns for a vocabulary of 5"):
        cross_entropy(jnp.zeros((2, 3, 4)), jnp.zeros((2, 3), jnp.int32), 5)
    assert {Loss(name).times for name in LOSSES} <= set(times.DRAWS)
