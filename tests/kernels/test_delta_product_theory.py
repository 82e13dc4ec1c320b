"""What the theory says of products of Householder steps, checked on the kernel (float64).

One token maps the state H to A H with A = exp(g) prod_j (I - beta_j k_j k_j^T) when v is 0,
so A is read off as the state after one token that begins at the identity.
"""

import functools

from delta_product_cases import IMPLEMENTATIONS
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scanax.kernels import delta_product
from scanax.models.delta_product.groups import group, prefix_products

CONSTRUCTIONS = ("S3_perm_nh2", "S3_irrep_nh2", "S4_perm_nh3", "S4_irrep_nh2", "A5_perm_nh4")
CONSTRUCTIONS += ("A5_irrep_nh2", "S5_perm_nh4")


@functools.partial(jax.jit, static_argnames="implementation")
def _state(k, v, beta, g, initial, implementation="reference"):
    q = jnp.zeros((*k.shape[:2], k.shape[3], k.shape[4]), k.dtype)
    options = {"initial_state": initial, "implementation": implementation}
    return delta_product(q, k, v, beta, g, **options)[1]


def transition(keys_NK: np.ndarray, beta_N: np.ndarray, g: float = 0.0) -> np.ndarray:
    """A [K, K] of one token with unit keys."""
    steps, size = keys_NK.shape
    with jax.enable_x64(True):
        k = jnp.asarray(keys_NK, jnp.float64)[None, None, :, None]
        beta = jnp.asarray(beta_N, jnp.float64)[None, None, :, None]
        decay = jnp.full((1, 1, 1), g, jnp.float64)
        initial = jnp.eye(size, dtype=jnp.float64)[None, None]
        zero = jnp.zeros((1, 1, steps, 1, size), jnp.float64)
        return np.asarray(_state(k, zero, beta, decay, initial)[0, 0])


def units(generator: np.random.Generator, *shape: int) -> np.ndarray:
    x = generator.normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def reflections(permutation: np.ndarray) -> np.ndarray:
    """Unit keys (e_a - e_b) / sqrt 2 of transpositions whose product, first one first, has a 1
    at column permutation[i] of row i; points - cycles of them."""
    left, keys = list(permutation), []
    for i in range(len(left)):
        while left[i] != i:  # swapping the rows i and left[i] puts left[i] into its place
            j = left[i]
            key = np.zeros(len(left))
            key[i], key[j] = np.sqrt(0.5), -np.sqrt(0.5)
            keys.append(key)
            left[i], left[j] = left[j], left[i]
    return np.asarray(keys[::-1]).reshape(-1, len(left))


@pytest.mark.parametrize("name", ["S3", "S4", "S5"])
def test_every_permutation_is_at_most_points_minus_one_reflections(name):
    for permutation in group(name).permutations:
        points = len(permutation)
        keys, beta = np.eye(points)[: points - 1].copy(), np.zeros(points - 1)
        found = reflections(permutation)
        assert len(found) <= points - 1
        keys[: len(found)], beta[: len(found)] = found, 2  # the rest are switched off
        expected = np.eye(points)[permutation]
        np.testing.assert_allclose(transition(keys, beta), expected, atol=1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_hand_built_layers_solve_their_group(golden, name, implementation):
    """Words of 2,048 elements, four times the paper's longest: every prefix product is right."""
    with np.load(golden / "deltaproduct" / f"construct_{name}.npz") as file:
        table = dict(file)
    words = np.random.default_rng(0).integers(len(table["beta"]), size=(2, 2048))
    k = table["keys"][words][:, :, :, None].astype(np.float32)
    beta = table["beta"][words][..., None].astype(np.float32)
    size = k.shape[-1]
    q = np.broadcast_to(table["q"].astype(np.float32), (*words.shape, 1, size))
    initial = np.broadcast_to(np.eye(size, dtype=np.float32), (2, 1, size, size))
    options = {"scale": 1.0, "initial_state": initial, "implementation": implementation}
    run = jax.jit(functools.partial(delta_product, **options))
    o, _ = run(*(jnp.asarray(x) for x in (q, k, np.zeros_like(k), beta)))
    distance = np.linalg.norm(np.asarray(o) - table["codebook"], axis=-1)
    labels = prefix_products(group(name[:2]), words)
    np.testing.assert_array_equal(np.argmin(distance, axis=-1), labels)
    assert distance.min(axis=-1).max() < table["min_gap"] / 4


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_rank_and_sign_bound_what_one_token_can_do(steps):
    generator = np.random.default_rng(steps)
    for _ in range(10):
        keys = units(generator, steps, 6)
        a = transition(keys, generator.uniform(0, 2, steps))
        assert np.linalg.matrix_rank(a - np.eye(6), tol=1e-9) <= steps
        pinned = transition(keys, np.full(steps, 2.0))
        np.testing.assert_allclose(np.linalg.det(pinned), (-1.0) ** steps, atol=1e-12)
    cycle = np.eye(5)[[1, 2, 3, 4, 0]]
    assert np.linalg.matrix_rank(cycle - np.eye(5)) == 4  # out of reach of fewer steps


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_transitions_never_grow(steps):
    generator = np.random.default_rng(steps)
    for _ in range(10):
        keys, beta = units(generator, steps, 5), generator.uniform(0, 2, steps)
        a, g = transition(keys, beta), -generator.uniform(0, 1)
        assert np.linalg.norm(a, 2) <= 1 + 1e-12
        ones = np.abs(np.linalg.eigvals(a) - 1) < 1e-9
        assert ones.sum() >= 5 - steps
        gated = transition(keys, beta, g)
        np.testing.assert_allclose(gated, np.exp(g) * a, atol=1e-12)
        determinant = np.prod(1 - beta) * np.exp(5 * g)
        np.testing.assert_allclose(np.linalg.det(gated), determinant, atol=1e-12)


def test_equal_keys_are_one_step():
    generator = np.random.default_rng(0)
    key, beta = units(generator, 5), generator.uniform(0, 2, 3)
    expected = np.eye(5) - (1 - np.prod(1 - beta)) * np.outer(key, key)
    np.testing.assert_allclose(transition(np.stack([key] * 3), beta), expected, atol=1e-12)


def test_orthogonal_keys_commute():
    generator = np.random.default_rng(0)
    keys = np.linalg.qr(generator.normal(size=(5, 5)))[0].T[:3]
    beta = generator.uniform(0, 2, 3)
    a = transition(keys, beta)
    np.testing.assert_allclose(a, a.T, atol=1e-12)
    np.testing.assert_allclose(transition(keys[::-1], beta[::-1]), a, atol=1e-12)


@pytest.mark.parametrize("angle", [0.1, 0.7, np.pi / 3])
def test_two_reflections_are_a_rotation_by_twice_their_angle(angle):
    keys = np.asarray([[1.0, 0.0], [np.cos(angle), np.sin(angle)]])
    a = transition(keys, np.full(2, 2.0))
    c, s = np.cos(2 * angle), np.sin(2 * angle)
    np.testing.assert_allclose(a, [[c, -s], [s, c]], atol=1e-12)
    assert np.abs(np.linalg.eigvals(a).imag).min() == pytest.approx(s)


def test_parity_needs_negative_eigenvalues():
    """One step: with beta in [0, 1] all eigenvalues are in [0, 1]; with beta = 2, one is -1."""
    generator = np.random.default_rng(0)
    for _ in range(10):
        key = units(generator, 1, 4)
        values = np.linalg.eigvalsh(transition(key, generator.uniform(0, 1, 1)))
        assert values.min() >= -1e-12 and values.max() <= 1 + 1e-12
        assert np.linalg.eigvalsh(transition(key, np.asarray([2.0]))).min() == pytest.approx(-1)


def test_one_step_is_gated_delta_net():
    """H_t = e^g (I - beta k k^T) H + beta k v^T, written out (Yang et al. 2025)."""
    generator = np.random.default_rng(0)
    T, K, V = 7, 4, 3
    k, v = units(generator, T, K), generator.normal(size=(T, V))
    beta, g = generator.uniform(0, 2, T), -generator.uniform(0, 1, T)
    expected = np.zeros((K, V))
    for t in range(T):
        decayed = np.exp(g[t]) * expected
        expected = decayed + beta[t] * np.outer(k[t], v[t] - k[t] @ decayed)
    with jax.enable_x64(True):
        arrays = (k[None, :, None, None], v[None, :, None, None], beta[None, :, None, None])
        arrays = tuple(jnp.asarray(x) for x in (*arrays, g[None, :, None]))
        found = _state(*arrays, jnp.zeros((1, 1, K, V), jnp.float64))
    np.testing.assert_allclose(found[0, 0], expected, atol=1e-12)
