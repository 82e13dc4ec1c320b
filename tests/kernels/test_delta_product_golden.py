"""DeltaProduct against values that the published implementation produced (float64).

Goldens of different sizes are padded with no-op tokens, rows, heads and features to a few
common shapes, so that they share compiled programs. The errors are max|x - ref| / max|ref|.
"""

import functools
import pathlib

from delta_product_cases import IMPLEMENTATIONS
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scanax.kernels import delta_product, delta_product_step
from scanax.kernels.delta_product import chunk as chunk_lib

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "deltaproduct"
CASES = sorted(path.stem for path in GOLDEN.glob("rec_*.npz"))
# Same shape after padding: enough to see that the definition itself is exact.
CASES_REFERENCE_FLOAT64 = [name for name in CASES if name.startswith("rec_nh2_gated")]
TOLERANCES = {"float32": (2e-5, 5e-5), "float64": (1e-11, 1e-11)}  # outputs, gradients
PADDED = {"B": 4, "H": 3, "K": 32, "V": 32}
INPUTS = ("q", "k", "v", "beta", "g", "initial_state")
RUNS = [
    (name, implementation, dtype)
    for implementation in IMPLEMENTATIONS
    for dtype in TOLERANCES
    for name in (
        CASES_REFERENCE_FLOAT64 if (implementation, dtype) == ("reference", "float64") else CASES
    )
]


@pytest.mark.parametrize(("name", "implementation", "dtype"), RUNS)
def test_golden(name, implementation, dtype):
    expected, inputs, cotangents, unpad = load(name)
    with jax.enable_x64(dtype == "float64"):
        cast = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, dtype))
        outputs, gradients = value_and_gradients(
            cast(inputs), cast(cotangents), float(expected["scale"]), implementation, name
        )
        assert outputs["final_state"].dtype == dtype
    for values, tolerance in zip((outputs, gradients), TOLERANCES[dtype], strict=True):
        for key in values:
            if key == "dinitial_state" and key not in expected:
                continue  # the golden has no initial state; zeros stand in for it
            assert error(unpad(key, values[key]), expected[key]) <= tolerance, key


def value_and_gradients(inputs, cotangents, scale, implementation, name):
    """Outputs and gradients, named as in the golden files.

    The scale is multiplied into q here, so that all cases share one program per shape.
    """
    pull_normalise = None
    if "l2norm" in name:
        (q, k), pull_normalise = jax.vjp(normalise, inputs["q"], inputs["k"])
        inputs = inputs | {"q": q, "k": k}
    scaled = inputs | {"q": inputs["q"] * scale}
    outputs, gradients = program(implementation)(scaled, cotangents)
    gradients = gradients | {"q": gradients["q"] * scale}
    if pull_normalise is not None:
        dq, dk = pull_normalise((gradients["q"], gradients["k"]))
        gradients = gradients | {"q": dq, "k": dk}
    return outputs, {f"d{key}": value for key, value in gradients.items()}


def normalise(*arrays):
    return tuple(x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-6) for x in arrays)


@functools.cache
def program(implementation: str):
    """A compiled function of (inputs, cotangents): outputs and gradients of the inputs."""

    @jax.jit
    def run(inputs, cotangents):
        op = lambda inputs: delta_product(**inputs, scale=1.0, implementation=implementation)
        (o, state), pull = jax.vjp(op, inputs)
        return {"o": o, "final_state": state}, pull(cotangents)[0]

    return run


def load(name: str):
    """Returns the golden arrays, the padded inputs and cotangents, and the undoing of padding."""
    golden = dict(np.load(GOLDEN / f"{name}.npz"))
    steps = int(golden["num_householder"])
    lengths = np.diff(golden["cu_seqlens"]) if "cu_seqlens" in golden else None

    def rows(key):  # [1, sum of lengths, ...] -> [rows, longest, ...]
        x = golden[key]
        x = x.reshape(x.shape[0], -1, steps, *x.shape[2:]) if key in ("k", "v", "beta") else x
        if lengths is None or key in ("initial_state", "dht"):
            return x
        split = np.split(x[0], np.cumsum(lengths)[:-1])
        return np.stack([pad(row, (lengths.max(), *x.shape[2:])) for row in split])

    arrays = {key: rows(key) for key in (*INPUTS, "do", "dht") if key in golden}
    tokens = 130 if arrays["q"].shape[1] <= 130 else 260
    target = PADDED | {"T": tokens, "N": steps}
    padded = {key: pad(x, [target[d] for d in DIMENSIONS[key]]) for key, x in arrays.items()}
    cotangents = padded.pop("do"), padded.pop("dht")
    if "initial_state" not in padded:  # zeros are the default; one program for both
        padded["initial_state"] = np.zeros_like(cotangents[1])

    def unpad(key, x):
        source = {"o": "do", "final_state": "dht", "dinitial_state": "dht"}.get(key, key[1:])
        source = key if key in arrays else source
        source = arrays.get(source, arrays["dht"] if "state" in key else None)
        x = np.asarray(x)[tuple(slice(n) for n in source.shape)]
        if lengths is not None and "state" not in key:
            x = np.concatenate([x[i, :n] for i, n in enumerate(lengths)])[None]
        return x.reshape(golden[key].shape)

    return golden, padded, cotangents, unpad


DIMENSIONS = {
    **{"q": "BTHK", "k": "BTNHK", "v": "BTNHV", "beta": "BTNH", "g": "BTH", "do": "BTHV"},
    **{"initial_state": "BHKV", "dht": "BHKV"},
}


def pad(x, shape):
    return np.pad(x, [(0, n - m) for n, m in zip(shape, x.shape, strict=True)])


def error(x, reference) -> float:
    assert x.shape == reference.shape
    return np.max(np.abs(x - reference)) / np.max(np.abs(reference))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed_golden(implementation):
    golden = dict(np.load(GOLDEN / "rec_nh3_ungated_varlen.npz"))
    lengths = np.diff(golden["cu_seqlens"])
    steps = lambda x: x.reshape(1, -1, 3, *x.shape[2:])
    o, state = delta_product(
        *(golden["q"], steps(golden["k"]), steps(golden["v"]), steps(golden["beta"])),
        scale=float(golden["scale"]),
        segment_ids=jnp.asarray(np.repeat(np.arange(len(lengths)), lengths)[None], jnp.int32),
        implementation=implementation,
    )
    assert error(np.asarray(o), golden["o"]) <= 2e-5
    assert error(np.asarray(state), golden["final_state"][-1:]) <= 2e-5


@pytest.fixture(scope="module")
def trajectory():
    return dict(np.load(GOLDEN / "trajectory_wy_nh3.npz"))


def test_trajectory_of_one_chunk(trajectory):
    """Every intermediate quantity of the WY form, with the sequence as a single chunk."""
    t = trajectory
    with jax.enable_x64(True):
        tokens = t["q"].shape[0]
        decay = chunk_lib.decays(jnp.asarray(t["g"]), None, None, (tokens,), jnp.float64)
        arrays = (t["q"] * t["scale"], t["k"], t["v"], t["beta"])
        chunk = chunk_lib.prepare(*map(jnp.asarray, arrays), decay)
        state = jnp.asarray(t["initial_state"])
        read, _, u, final = chunk_lib.pass_state(chunk, state)
        enter_L1 = chunk.enter_R1[tokens:]
        found = {
            "A": chunk.beta_L1 * chunk.w_RL[tokens:],
            "T_inv": chunk.inverse_LL,
            "W": chunk.inverse_LL @ (chunk.beta_L1 * enter_L1 * chunk.k_LK),
            "U_tilde": chunk.inverse_LL @ (chunk.beta_L1 * chunk.v_LV),
            "U": u,
            "P_mask": chunk.decay_RL[:tokens],
            "o": chunk_lib.outputs(chunk, read, u),
        }
        for key, value in found.items():
            assert error(np.asarray(value), t[key]) <= 1e-12, key
        assert error(np.asarray(final), t["state_after_token"][-1]) <= 1e-12


def test_trajectory_of_steps(trajectory):
    t = trajectory
    with jax.enable_x64(True):
        tokens, key_dim = t["q"].shape
        k, v, beta = (t[key].reshape(tokens, 3, 1, -1) for key in ("k", "v", "beta"))
        state = jnp.asarray(t["initial_state"])[None, None]
        step = jax.jit(delta_product_step)
        for i in range(tokens):
            q, g = t["q"][i, None, None], t["g"][i, None, None]
            o, state = step(q, k[i, None], v[i, None], beta[i, None, :, :, 0], g, state)
            assert error(np.asarray(o[0, 0]), t["o"][i]) <= 1e-12
            assert error(np.asarray(state[0, 0]), t["state_after_token"][i]) <= 1e-12
        assert np.isclose(t["scale"], key_dim**-0.5)
