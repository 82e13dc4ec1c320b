"""The event-driven sampler: its law, its counts of calls, and rows that do not see each other."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from radd_samplers import SCHEDULES, load, table
import scipy.stats

from scanax.models.generation import Sampling
from scanax.models.radd import adaptive, blocks, events, rates
from scanax.models.radd.network import Network

VOCAB, LENGTH, ROWS = 5, 16, 9
EMBEDDING = np.random.default_rng(0).normal(size=(VOCAB + 1, 8)).astype(np.float32)
HEAD = np.random.default_rng(1).normal(size=(8, VOCAB + 2)).astype(np.float32)
HEAD[:, VOCAB:] = 9  # columns that must not matter
NETWORK = Network(
    lambda ids_BT: jnp.sin(jnp.cumsum(jnp.asarray(EMBEDDING)[ids_BT], axis=1)),
    lambda hidden: hidden @ jnp.asarray(HEAD),
    VOCAB,
)


def cdf(n: int, schedule: str = "loglinear", method: str = "tweedie"):
    return rates.step_probabilities(rates.unmask_rates(SCHEDULES[schedule], n, method))[1]


@pytest.fixture(scope="module")
def run(jit):
    """Plans and samples: (key or keys, start, slots) -> plan, sampled."""

    @functools.partial(jit, static_argnames=("slots", "sampling"))
    def run(key, start_RT, slots, sampling=None):
        plan = events.diffusion_plan(key, start_RT == VOCAB, cdf(24))
        return plan, events.sample(NETWORK, key, start_RT, plan, sampling, slots)

    return run


@pytest.fixture(scope="module")
def start_RT():
    """Nothing given, all given, and prompts anywhere."""
    rng = np.random.default_rng(2)
    start_RT = np.full((ROWS, LENGTH), VOCAB, np.int32)
    start_RT[1] = rng.integers(0, VOCAB, LENGTH)
    for row in range(2, ROWS):
        given = rng.permutation(LENGTH)[: row + 2]
        start_RT[row, given] = rng.integers(0, VOCAB, len(given))
    return jnp.asarray(start_RT)


def test_counts_and_prompts(run, start_RT):
    """Events are the distinct steps of a row; a row without masks costs nothing."""
    plan, found = run(jax.random.key(0), start_RT, 4)
    rank_RT = np.asarray(plan.rank)
    for row in range(ROWS):
        free_T = np.asarray(start_RT[row]) == VOCAB
        assert (rank_RT[row] >= 0).tolist() == free_T.tolist()
        assert sorted(set(rank_RT[row][free_T])) == list(range(plan.events[row]))
    assert plan.events[1] == 0 and plan.events[0] > 8
    np.testing.assert_array_equal(found.evaluations, plan.events)
    given_RT = np.asarray(start_RT) < VOCAB
    np.testing.assert_array_equal(np.asarray(found.tokens)[given_RT], start_RT[given_RT])
    assert 0 <= found.tokens.min() and found.tokens.max() < VOCAB  # never the mask
    total = int(plan.events.sum())
    assert max(plan.events.max(), -(-total // 4)) <= found.batch_evaluations < total


def test_rows_do_not_see_each_other(run, start_RT):
    """Whatever the slots, the order of requests and their number: a request's key decides."""
    keys_R = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(ROWS))
    _, found = run(jax.random.key(0), start_RT, 4)
    for slots in (1, 4, ROWS + 3):
        _, other = run(keys_R, start_RT, slots)
        np.testing.assert_array_equal(other.tokens, found.tokens)
        np.testing.assert_array_equal(other.evaluations, found.evaluations)
    order = np.random.default_rng(3).permutation(ROWS)
    _, other = run(keys_R[order], start_RT[order], 4)
    np.testing.assert_array_equal(other.tokens, found.tokens[order])
    _, other = run(keys_R[5:7], start_RT[5:7], 1)
    np.testing.assert_array_equal(other.tokens, found.tokens[5:7])
    assert other.batch_evaluations == found.evaluations[5:7].sum()
    _, other = run(keys_R[1:2], start_RT[1:2], 1)
    assert other.batch_evaluations == 0


def test_head_runs_where_needed(jit, start_RT):
    """At the positions of an event, rounded up to a power of two for the batch."""
    sizes, rows = [], []

    def head(hidden_BCD):
        jax.debug.callback(lambda h: sizes.append(h.shape), hidden_BCD)
        return NETWORK.head(hidden_BCD)

    def body(ids_BT):
        jax.debug.callback(lambda x: rows.append(x.shape), ids_BT)
        return NETWORK.body(ids_BT)

    keys_R = jax.random.split(jax.random.key(1), ROWS)
    plan = events.diffusion_plan(keys_R, start_RT == VOCAB, cdf(24))
    one = lambda: events.sample(Network(body, head, VOCAB), keys_R, start_RT, plan, slots=1)
    found = jax.block_until_ready(jit(one)())
    jax.effects_barrier()
    counts = [
        int((np.asarray(plan.rank[row]) == event).sum())
        for row in range(ROWS)
        for event in range(plan.events[row])
    ]
    want = sorted(1 << (count - 1).bit_length() for count in counts)
    assert sorted(shape[1] for shape in sizes) == want
    assert rows == [(1, LENGTH)] * int(found.batch_evaluations)


def test_many_positions_at_once(jit):
    """More than the head sees at once: in pieces, as if in one."""
    tokens = 2 * events.PIECE + 9
    start_RT = jnp.full((2, tokens), VOCAB, jnp.int32)
    plan = events.plan_of_steps(jnp.zeros((2, tokens), jnp.int32), start_RT == VOCAB)
    noise_RTV = jax.random.uniform(jax.random.key(0), (2, tokens, VOCAB))
    sample = lambda: events.sample(
        NETWORK, jax.random.key(0), start_RT, plan, uniforms_RTV=noise_RTV
    )
    found = jit(sample)()
    assert found.batch_evaluations == 1
    probs = jax.nn.softmax(NETWORK.head(NETWORK.body(start_RT))[..., :VOCAB])
    want = jnp.argmax(probs / (1e-10 - jnp.log(noise_RTV + 1e-10)), axis=-1)
    np.testing.assert_array_equal(found.tokens, want)


def test_orders(jit, start_RT):
    free_RT = np.asarray(start_RT) == VOCAB
    order_RT = np.stack([np.random.default_rng(row).permutation(LENGTH) for row in range(ROWS)])
    plans = {
        "forward": events.order_plan("forward", free_RT),
        "backward": events.order_plan("backward", free_RT),
        "random": events.order_plan("random", free_RT, jax.random.key(0)),
        "given": events.order_plan(order_RT, free_RT),
    }
    first_hitting, times_RT = events.first_hitting_plan(jax.random.key(0), free_RT)
    np.testing.assert_array_equal(first_hitting.rank, plans["random"].rank)
    for plan in plans.values():
        np.testing.assert_array_equal(plan.events, free_RT.sum(axis=1))
        for row in range(ROWS):
            ranks = np.asarray(plan.rank[row])[free_RT[row]]
            assert sorted(ranks) == list(range(len(ranks)))
    for row in range(ROWS):
        forward = np.asarray(plans["forward"].rank[row])[free_RT[row]]
        np.testing.assert_array_equal(forward, np.arange(free_RT[row].sum()))
        backward = np.asarray(plans["backward"].rank[row])[free_RT[row]]
        np.testing.assert_array_equal(backward, forward[::-1])
        given = np.asarray(plans["given"].rank[row])[order_RT[row]]
        np.testing.assert_array_equal(given[given >= 0], np.arange(free_RT[row].sum()))
        times = np.asarray(times_RT[row])
        assert np.all(np.diff(times[: free_RT[row].sum()]) < 0) and np.all(times >= 0)
        assert np.all(times[free_RT[row].sum() :] == 0) and np.all(times < 1)


def test_first_hitting_times():
    """A mask lasts until a uniform time, so all times together are uniform."""
    _, times_RT = jax.jit(events.first_hitting_plan)(jax.random.key(0), jnp.ones((4000, 8), bool))
    assert scipy.stats.kstest(np.asarray(times_RT[:, 0]), lambda t: t**8).pvalue > 1e-4
    assert scipy.stats.kstest(np.asarray(times_RT).reshape(-1), "uniform").pvalue > 1e-4


def test_ordered_golden(jit):
    """One position after another, with the published draws."""
    file = load("traj_toy")
    rows, tokens, vocab = (int(file[name]) for name in ("batch", "length", "vocab"))
    with jax.enable_x64(True):
        noise_RTV = np.zeros((rows, tokens, vocab))
        noise_RTV[:, file["ordered_order"]] = file["ordered_uniforms"].transpose(1, 0, 2)
        start_RT = jnp.full((rows, tokens), vocab, jnp.int32)
        plan = events.order_plan(file["ordered_order"], start_RT == vocab)
        sample = lambda noise_RTV: events.sample(
            table(), jax.random.key(0), start_RT, plan, slots=2, uniforms_RTV=noise_RTV
        )
        found = jit(sample)(noise_RTV)
    np.testing.assert_array_equal(found.tokens, file["ordered_x"])


@pytest.mark.parametrize("strategy", [Sampling(top_p=0.9), Sampling(top_k=2)])
def test_published_draws(jit, strategy):
    """The published two-stage sampler's rows, from its steps: the event sampler is that sampler."""
    file, key = load("traj_toy"), "top_p" if strategy.top_k == 0 else "top_k"
    psi_N = rates.unmask_rates(SCHEDULES["loglinear"], int(file["steps"]))
    step_RT = np.argmax(file["U_unmask"] < psi_N[:, None, None], axis=0)
    noise_RTV = np.take_along_axis(file["U_cat"], step_RT[None, ..., None], axis=0)[0, ..., :3]
    with jax.enable_x64(True):
        start_RT = jnp.full(step_RT.shape, 3, jnp.int32)
        plan = events.plan_of_steps(step_RT, start_RT == 3)
        sample = lambda noise_RTV: events.sample(
            table(), jax.random.key(0), start_RT, plan, strategy, 3, uniforms_RTV=noise_RTV
        )
        found = jit(sample)(noise_RTV)
    np.testing.assert_array_equal(found.tokens, file[f"x_{key}_tweedie_loglinear"][-1])
    want = 1 + file[f"needs_eval_{key}_tweedie_loglinear"][1:].sum(axis=0)
    states = file[f"x_{key}_tweedie_loglinear"]
    np.testing.assert_array_equal(
        found.evaluations, np.any(states[1:] != states[:-1], axis=-1).sum(axis=0)
    )
    assert np.all(found.evaluations <= want)


@pytest.mark.parametrize("conditionals", ["opt", "net"])
@pytest.mark.parametrize(
    "name", ["loglinear_tweedie", "geometric_tweedie", "loglinear_euler", "geometric_euler"]
)
def test_exact_law(conditionals, name):
    """Over all unmask steps of all positions: the law of the published sampler."""
    file = load("toy_exact")
    conditional = file["cond_exact" if conditionals == "opt" else "cond_net"]
    schedule, method = name.split("_")
    for n in (16,) if name == "geometric_euler" else (1, 2, 4, 16):
        p_N = rates.step_probabilities(rates.unmask_rates(SCHEDULES[schedule], n, method))[0]
        steps_RT = np.stack(np.unravel_index(np.arange(n**4), (n,) * 4), axis=1)
        plan = events.plan_of_steps(steps_RT, np.ones(steps_RT.shape, bool))
        patterns, which = np.unique(np.asarray(plan.rank), axis=0, return_inverse=True)
        weights = np.bincount(which.reshape(-1), np.prod(p_N[steps_RT], axis=1))
        law = sum(w * terminal_law(conditional, r) for w, r in zip(weights, patterns, strict=True))
        np.testing.assert_allclose(
            law, file[f"{conditionals}/law_{name}_n{n}"].reshape(-1), rtol=0, atol=1e-10
        )


def terminal_law(conditional, rank_T):
    """Of all 81 rows, for given events."""
    data = np.array(list(itertools.product(range(3), repeat=4)))
    law = np.ones(len(data))
    for position, rank in enumerate(rank_T):
        seen = np.where(rank_T[None] < rank, data, 3)
        state = seen @ 4 ** np.arange(3, -1, -1)
        law *= conditional[state, position, data[:, position]]
    return law


@pytest.mark.parametrize("name, n", [("loglinear_tweedie", 4), ("geometric_euler", 16)])
def test_law_of_draws(jit, name, n):
    """40000 rows through 5000 slots against the exact law, and events against their mean."""
    rows, (schedule, method) = 40000, name.split("_")
    p_N, cdf_N = rates.step_probabilities(rates.unmask_rates(SCHEDULES[schedule], n, method))

    def run(key):
        start_RT = jnp.full((rows, 4), 3, jnp.int32)
        plan = events.diffusion_plan(key, start_RT == 3, cdf_N)
        return events.sample(table(jnp.float32), key, start_RT, plan, slots=5000)

    found = jit(run)(jax.random.key(7))
    counts = np.bincount(np.asarray(found.tokens) @ 3 ** np.arange(3, -1, -1), minlength=81)
    law = load("toy_exact")[f"opt/law_{name}_n{n}"].reshape(-1)
    assert scipy.stats.chisquare(counts, rows * law).pvalue > 1e-4
    events_R = np.asarray(found.evaluations)
    error = abs(events_R.mean() - rates.expected_evaluations(p_N, 4))
    assert error < 4 * events_R.std() / rows**0.5


@pytest.mark.parametrize("order", adaptive.ORDERS)
def test_surest_first(jit, start_RT, order):
    """As many positions as the plan has, those of the clearest distributions."""
    sampling = Sampling(temperature=0.0)
    free_RT = np.asarray(start_RT) == VOCAB
    plan = events.diffusion_plan(jax.random.key(4), free_RT, cdf(6))
    sample = lambda: adaptive.sample(
        NETWORK, jax.random.key(0), start_RT, plan, sampling, 2, order=order
    )
    found = jit(sample)()
    logits = jit(lambda ids: NETWORK.head(NETWORK.body(ids))[..., :VOCAB])
    want_RT, rank_RT = np.array(start_RT), np.asarray(plan.rank)
    for event in range(int(plan.events.max())):
        probs = np.asarray(jax.nn.softmax(logits(want_RT)), np.float64)
        doubt = -probs.max(-1) if order == "confidence" else -(probs * np.log(probs)).sum(-1)
        for row in range(ROWS):
            masked = np.flatnonzero(want_RT[row] == VOCAB)
            count = (rank_RT[row] == event).sum()
            chosen = masked[np.argsort(doubt[row][masked], kind="stable")[:count]]
            want_RT[row, chosen] = probs[row, chosen].argmax(-1)
    np.testing.assert_array_equal(found.tokens, want_RT)
    np.testing.assert_array_equal(found.evaluations, plan.events)


def test_beyond_the_context(jit):
    """Each window samples a block after the last ones that it keeps."""
    context, block, extra = 8, 3, 4
    start_RT = jnp.full((5, context), VOCAB, jnp.int32).at[:, :2].set(1)
    make_plan = lambda keys, free_RT: events.diffusion_plan(keys, free_RT, cdf(24))
    extend = lambda key, count: blocks.extend(
        NETWORK, key, start_RT, make_plan, slots=3, block=block, blocks=count
    )
    both = jit(lambda key: (extend(key, extra), extend(key, 0)))
    found, first = both(jax.random.key(0))
    assert found.tokens.shape == (5, context + extra * block)
    assert np.all(np.asarray(found.tokens[:, :2]) == 1) and np.asarray(found.tokens).max() < VOCAB
    np.testing.assert_array_equal(found.tokens[:, :context], first.tokens)
    assert np.all(found.evaluations - first.evaluations <= extra * block)
    # A window by hand: the second.
    keys_R = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(5))
    keys_R = jax.vmap(jax.random.fold_in, (0, None))(keys_R, 1)
    window_RT = jnp.pad(first.tokens[:, block:], ((0, 0), (0, block)), constant_values=VOCAB)
    plan = make_plan(keys_R, window_RT == VOCAB)
    second = jit(lambda: events.sample(NETWORK, keys_R, window_RT, plan, slots=2))()
    np.testing.assert_array_equal(found.tokens[:, block : block + context], second.tokens)


def test_mistakes():
    start_RT = jnp.full((2, 4), 3, jnp.int32)
    free_RT, net, key = start_RT == 3, table(jnp.float32), jax.random.key(0)
    plan = events.order_plan("forward", free_RT)
    for wrong, message in (
        (lambda: events.sample(net, key, start_RT + 1, plan), r"in \[0, 3\]"),
        (lambda: events.sample(net, key, start_RT - 4, plan), r"in \[0, 3\]"),
        (lambda: events.sample(net, key, start_RT, plan, slots=0), "slots"),
        (lambda: events.sample(net, key, start_RT[:1], plan), "the plan is for"),
        (lambda: events.sample(net, key, start_RT.astype(jnp.int16), plan), "int32"),
        (lambda: events.sample(net, jax.random.split(key, 3), start_RT, plan), "one per row"),
        (
            lambda: events.sample(net, key, start_RT, plan, Sampling(repetition_penalty=2.0)),
            "repetition_penalty",
        ),
        (lambda: adaptive.sample(net, key, start_RT, plan, order="luck"), "order must be one of"),
        (lambda: blocks.extend(net, key, start_RT, None, block=5, blocks=1), r"in \[1, 4\]"),
        (lambda: blocks.extend(net, key, start_RT, None, block=1, blocks=-1), "negative"),
        (lambda: events.order_plan("sideways", free_RT), "order must be one of"),
        (lambda: events.order_plan("random", free_RT), "needs a key"),
        (lambda: events.order_plan(np.array([0, 1, 1, 2]), free_RT), "each position once"),
        (lambda: events.order_plan(np.arange(3), free_RT), "order must be"),
        (lambda: events.diffusion_plan(key, free_RT, np.array([0.5, 0.9])), "rise to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
