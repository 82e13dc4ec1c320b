"""The equality of the losses on toys that can be enumerated, and what one draw of each varies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import radd_goldens as goldens

from scanax.models.radd import Loss, ar_nats, cross_entropy, exact, schedule, times, value

NETWORKS = {"opt": "cond_exact", "net": "cond_net"}
close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)


@functools.cache
def network(tag: str):
    return exact.look_up(goldens.load("toy_exact")[NETWORKS[tag]])


@functools.cache
def nats(tag: str) -> np.ndarray:
    """Cross entropies of every masked set of every sequence: [16, 81, 4]."""
    file = goldens.load("toy_exact")
    with jax.enable_x64(True):
        return exact.set_nats(jax.jit(network(tag)), file["data"], int(file["mask_id"]))


@pytest.fixture(params=NETWORKS)
def toy(request):
    return nats(request.param), goldens.part(goldens.load("toy_exact"), f"{request.param}/")


def test_sums(toy):
    """Over sets, over sizes, over orders, over lambda: the same, and the reference's."""
    nats_ABL, want = toy
    np.testing.assert_array_equal(exact.masked_sets(4), want["mask_patterns"])
    close(nats_ABL.sum(2), want["pattern_ce_sum"])
    np.testing.assert_array_equal(exact.all_orders(4), want["perms"])
    order_PB = exact.order_nats(nats_ABL, want["perms"])
    close(order_PB, want["perm_nll"])
    close(exact.mixture_nats(order_PB), want["nll_order_mixture"])
    ideal = schedule("log_linear:1e-14")  # from lambda = 0 to 1
    for found in (
        subset_sum(nats_ABL),
        exact.size_means(nats_ABL).sum(0),
        order_PB.mean(0),
        *(exact.moments(Loss(name), nats_ABL).mean_B for name in ("lambda_dce", "k_dce")),
        *(
            exact.moments(Loss(name, ideal, cut=0.0), nats_ABL).mean_B
            for name in ("t_dse", "t_dce", "nelbo")
        ),
    ):
        for key in ("AO", "lambda_DCE", "lambda_DCE_quadrature", "k_DCE"):
            close(found, want[f"loss_{key}"])
        for key in ("DSE_ideal", "t_DCE_ideal"):
            close(found, want[f"loss_{key}"])


def subset_sum(nats_ABL):
    """With the weights written as factorials."""
    size_A = exact.masked_sets(4).sum(1)
    factorial = np.array([1, 1, 2, 6, 24])
    weight_A = np.where(size_A > 0, factorial[size_A - 1] * factorial[4 - size_A] / 24, 0)
    return weight_A @ nats_ABL.sum(2)


def test_optimal_network_is_exact():
    file = goldens.load("toy_exact")
    close(exact.table_nats(file["p"], file["data"]), file["exact_nll"])
    close(exact.size_means(nats("opt")).sum(0), file["exact_nll"])
    p = file["p"].ravel()
    close(p @ file["exact_nll"], file["entropy"])
    with jax.enable_x64(True):
        ours = exact.conditionals_of(file["p"])
        states = jnp.asarray(file["states"], jnp.int32)
        close(np.exp(ours(states)), file["cond_exact"])
        found = exact.bound(ours, file["data"], int(file["mask_id"]))
    close(found, file["exact_nll"])
    # Of a network that contradicts itself, a bound, also of the mixture over orders.
    want = goldens.part(file, "net/")
    assert np.all(want["loss_AO"] >= want["nll_order_mixture"] - 1e-12)
    assert p @ exact.size_means(nats("net")).sum(0) > file["entropy"]


def test_expectation_as_coded(toy):
    """With t cut at 1e-3, and of the second moments."""
    nats_ABL, want = toy
    dse, dce = (exact.moments(Loss(name), nats_ABL) for name in ("t_dse", "t_dce"))
    close(dse.mean_B, want["code_E_t_DSE"])
    close(dce.mean_B, want["code_E_t_DCE"])
    close(dce.mean_B - dse.mean_B, np.full(81, want["code_t_DCE_const"]))
    close(dse.square_B, want["second_moment_t_DSE"])
    close(dce.square_B, want["second_moment_t_DCE"])
    close(exact.moments(Loss("k_dce"), nats_ABL).square_B, want["second_moment_k_DCE"])
    assert np.all(np.isinf(exact.moments(Loss("lambda_dce"), nats_ABL).square_B))
    above_QB = want["lambda_DCE_second_moment_above_cutoff"]
    # It grows with the log of the cut, by what single masked tokens give.
    growth_B = np.log(10) * np.square(nats_ABL[[1, 2, 4, 8]].sum(2)).sum(0)
    np.testing.assert_allclose(above_QB[5] - above_QB[4], growth_B, rtol=1e-3, atol=1e-2)


def test_deviations_of_the_toy():
    """The reference's samples of one sequence; and all data, where k_dce varies least."""
    file = goldens.load("toy_exact")
    i, n = int(file["mc_x0_index"]), int(file["mc_n"])
    for tag in NETWORKS:
        for name, theirs in (("t_dse", "t_DSE"), ("t_dce", "t_DCE"), ("k_dce", "k_DCE")):
            found = exact.moments(Loss(name), nats(tag))
            mean, error = file[f"{tag}/mc_{theirs}_mean_stderr"]
            assert abs(mean - found.mean_B[i]) < 4 * error, (tag, name)
            if name != "t_dce":  # whose tail is so heavy that the measured error is not good
                np.testing.assert_allclose(found.deviation_B[i] / n**0.5, error, rtol=0.05)
    p = file["p"].ravel()
    for name, want in (("k_dce", 1.75), ("t_dse", 4.85), ("t_dce", 20.3)):
        variance = p @ np.square(exact.moments(Loss(name), nats("opt")).deviation_B)
        np.testing.assert_allclose(variance**0.5, want, rtol=2e-3, err_msg=name)


@pytest.mark.parametrize("tag", NETWORKS)
def test_orders_in_a_scan(tag, jit):
    """``ar_nats`` in every order is the enumeration's."""
    file = goldens.load("toy_exact")
    perms = jnp.asarray(file["net/perms"], jnp.int32)
    with jax.enable_x64(True):
        x0_BL = jnp.asarray(np.tile(file["data"][17], (24, 1)), jnp.int32)
        run = jit(lambda x0_BL: ar_nats(network(tag), x0_BL, perms, int(file["mask_id"])))
        close(run(x0_BL), file[f"{tag}/perm_nll"][:, 17])


@pytest.mark.parametrize("name", ["t_dse", "t_dce", "k_dce", "lambda_dce", "nelbo", "md4", "steps"])
def test_draws_average_to_the_sums(name, jit):
    """The losses as a training step calls them, 40000 times: within 4 standard errors."""
    file = goldens.load("toy_exact")
    loss = {
        "md4": Loss("nelbo", schedule("linear")),
        "steps": Loss("nelbo", schedule("cosine"), steps=20),
        "nelbo": Loss("nelbo", schedule("geometric:1e-3:9"), cut=1e-2),
    }.get(name) or Loss(name)
    count, mask_id = 40_000, int(file["mask_id"])
    x0_BL = jnp.asarray(np.tile(file["data"][17], (count, 1)), jnp.int32)

    def run(key):
        noise_key, u_key = jax.random.split(key)
        u_B = times.draw("iid", u_key, count)
        corruption = loss.corrupt(loss.draw(jax.random.split(noise_key, count), u_B, 4))
        x_BL = jnp.where(corruption.mask_BT, mask_id, x0_BL)
        return value(corruption, cross_entropy(network("net")(x_BL), x0_BL, 3))

    found_B = np.asarray(jit(run)(jax.random.key(11)), np.float64)
    want = exact.moments(loss, nats("net"))
    mean = want.mean_B[17]
    error = min(want.deviation_B[17], 20 if name == "lambda_dce" else np.inf) / count**0.5
    assert abs(found_B.mean() - mean) < 4 * error
    if name not in ("lambda_dce", "t_dce", "t_dse"):
        np.testing.assert_allclose(found_B.std(), want.deviation_B[17], rtol=0.1)


def test_grids_of_md4():
    """Many steps become continuous time, which is the bound but for the schedule's two ends."""
    nats_ABL, want = nats("net"), goldens.part(goldens.load("toy_exact"), "net/")
    for name in ("linear", "cosine", "polynomial:2"):
        loss = Loss("nelbo", schedule(name))
        continuous = exact.moments(loss, nats_ABL).mean_B
        fine = exact.moments(Loss("nelbo", schedule(name), steps=20_000), nats_ABL).mean_B
        np.testing.assert_allclose(fine, continuous, rtol=1e-3)
        # Each end of the schedule misses 1e-4 of lambda.
        np.testing.assert_allclose(continuous, want["loss_AO"], rtol=1e-3)


def test_stratified_sizes_lower_the_error(jit):
    """An evaluation with every size equally often varies by the choice of positions alone."""
    file, nats_ABL = goldens.load("toy_exact"), nats("net")
    sets_AL = exact.masked_sets(4)
    x0_L = file["data"][17]
    rows, draws, mask_id = 400, 16, int(file["mask_id"])
    x0_BL = jnp.asarray(np.tile(x0_L, (rows * draws, 1)), jnp.int32)

    def run(key):
        size_key, noise_key = jax.random.split(key)
        k_BN = times.stratified_sizes(jax.random.split(size_key, rows), draws, 4)
        loss = Loss("k_dce")
        keys = jax.random.split(noise_key, rows * draws)
        noise = loss.draw(keys, times.uniform_of(k_BN.reshape(-1), 4), 4)
        corruption = loss.corrupt(noise)
        x_BL = jnp.where(corruption.mask_BT, mask_id, x0_BL)
        nats_B = value(corruption, cross_entropy(network("net")(x_BL), x0_BL, 3))
        return nats_B.reshape(rows, draws).mean(1)

    found = np.asarray(jit(run)(jax.random.key(4)), np.float64)
    want = exact.moments(Loss("k_dce"), nats_ABL)
    sum_A = nats_ABL[:, 17].sum(1)
    within = np.mean([np.var(4 / k * sum_A[sets_AL.sum(1) == k]) for k in range(1, 5)])
    deviation = (within / draws) ** 0.5
    assert deviation < 0.8 * want.deviation_B[17] / draws**0.5
    assert abs(found.mean() - want.mean_B[17]) < 4 * deviation / rows**0.5
    np.testing.assert_allclose(found.std(), deviation, rtol=0.15)


def test_tables():
    """Shapes that divide into parts, states that cannot be, and other lengths."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(2**6)).reshape((2,) * 6)
    p[0] = 0
    p /= p.sum()
    x0 = np.array([[1, 0, 1, 1, 0, 0], [1, 1, 1, 0, 1, 0], [1, 0, 0, 0, 0, 1]])
    with jax.enable_x64(True):
        conditionals = jax.jit(exact.conditionals_of(p))
        want = exact.table_nats(p, x0)
        for rows in (3, 100, 10_000):
            close(exact.bound(conditionals, x0, 2, rows), want)
        impossible = np.exp(conditionals(jnp.asarray([[0, 2, 1, 2, 2, 2]])))
        close(impossible[0], [[1, 0], [0.5, 0.5], [0, 1], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5]])
    # In float32 as well.
    close(exact.bound(exact.conditionals_of(p), x0, 2), want, rtol=1e-5)


def test_limits():
    with pytest.raises(ValueError, match=r"2\^17 masked sets are too many"):
        exact.bound(lambda x: x, np.zeros((1, 17), int), 2)
    with pytest.raises(ValueError, match="9! orders are too many"):
        exact.all_orders(9)
