"""The additive scan against float64 values that agree with the published kernels.

Goldens of different sizes are padded with tokens, rows, heads and channels that are not there,
so that they share a compiled program.
"""

import functools
import json
import pathlib

from additive_scan_cases import IMPLEMENTATIONS
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scanax.kernels import additive_attention, additive_scan, additive_step
from scanax.kernels.additive_scan import attention

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "lightnet"
CAUSAL = dict(np.load(GOLDEN / "additive_causal.npz"))
MASKED = dict(np.load(GOLDEN / "additive_masked_packed.npz"))
ONCE = dict(np.load(GOLDEN / "noncausal.npz"))
FIELDS = {
    **{"q": "BTHK", "k": "BTHK", "v": "BTHV", "S0": "BHKV", "z0": "BHK", "mask": "BT"},
    **{"do": "BTHV", "dS_T": "BHKV", "dz_T": "BHK"},
}
PADDED = {"B": 5, "T": 130, "H": 3, "K": 16, "V": 16}
EXTREME = ("extreme50", "ramp_up", "ramp_down", "d2_extreme")
RUNS = [(i, d) for i in IMPLEMENTATIONS for d in ("float32", "float64")]


def cases(file) -> dict[str, dict]:
    return json.loads(str(file["meta"]))


def case_of(file, name: str) -> dict[str, np.ndarray]:
    prefix = f"{name}__"
    return {key.removeprefix(prefix): x for key, x in file.items() if key.startswith(prefix)}


def rows(golden: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Adds a mask; segments that have a state of their own become rows."""
    ends = golden.pop("cu_seqlens", None)
    if ends is None:
        return {"mask": np.ones(golden["q"].shape[:2]), **golden}
    lengths = np.diff(ends)
    for key, array in golden.items():
        if len(array) == 1:  # of the row, not of the segments
            row = np.zeros((len(lengths), lengths.max(), *array.shape[2:]), array.dtype)
            for i, (start, length) in enumerate(zip(ends, lengths, strict=False)):
                row[i, :length] = array[0, start : start + length]
            golden[key] = row
    return {"mask": np.arange(lengths.max()) < lengths[:, None], **golden}


def tolerance(name: str, dtype: str, key: str, reference: np.ndarray) -> float:
    """Absolute, as the goldens' documentation gives it."""
    if dtype == "float64":
        return 1e-11 * max(1, float(np.abs(reference).max()))
    large = name in EXTREME or name == "big_offset"
    if key.startswith("d"):
        return (1e-4 if large and name != "d2_extreme" else 2e-5) * float(np.abs(reference).max())
    if key.startswith("z"):
        return 1e-4 if name == "big_offset" else 1e-5
    return {"big_offset": 1e-4, "d2_extreme": 2e-5}.get(name, 5e-5 if large else 5e-6)


def assert_close(name, dtype, key, actual, expected):
    __tracebackhide__ = True
    assert actual.shape == expected.shape, key
    there = np.isfinite(expected)  # z is -inf where nothing has come
    np.testing.assert_array_equal(np.isfinite(actual), there, err_msg=key)
    finite = np.where(there, expected, 0)
    error = np.abs(np.where(there, actual, 0) - finite).max()
    assert error <= tolerance(name, dtype, key, finite), (key, error)


@functools.cache
def program(implementation: str):
    """A compiled function of inputs and cotangents: outputs and gradients, by golden names."""

    @jax.jit
    def run(inputs, cotangents):
        def op(inputs):
            o, (s, z) = additive_scan(
                *(inputs["q"], inputs["k"], inputs["v"]),
                scale=1.0,
                initial_state=(inputs["S0"], inputs["z0"]),
                mask=cotangents["mask"],
                implementation=implementation,
            )
            return o, s, z

        (o, s, z), pull = jax.vjp(op, inputs)
        gradients = pull(tuple(cotangents[key] for key in ("do", "dS_T", "dz_T")))[0]
        return {"o": o, "S_T": s, "z_T": z, **{f"d{key}": x for key, x in gradients.items()}}

    return run


@pytest.mark.parametrize(("implementation", "dtype"), RUNS)
@pytest.mark.parametrize("name", [*cases(CAUSAL), "mask", "mask_state", "packed_state"])
def test_causal(name, implementation, dtype):
    file = CAUSAL if name in cases(CAUSAL) else MASKED
    golden = rows(case_of(file, name))
    scale = cases(file)[name].get("scale", golden["q"].shape[-1] ** -0.5)
    golden["q"] = golden["q"].astype(np.float64) * scale  # one program for all scales
    fill = {"k": -np.inf, "z0": -np.inf}
    with jax.enable_x64(dtype == "float64"):
        padded = {}
        for key, dimensions in FIELDS.items():
            array = np.full([PADDED[d] for d in dimensions], fill.get(key, 0.0))
            if key in golden:
                array[tuple(slice(n) for n in golden[key].shape)] = golden[key]
            padded[key] = jnp.asarray(array, bool if key == "mask" else dtype)
        inputs = {key: padded.pop(key) for key in ("q", "k", "v", "S0", "z0")}
        outputs = jax.device_get(program(implementation)(inputs, padded))
    assert outputs["o"].dtype == outputs["S_T"].dtype == dtype
    outputs["dq"] = outputs["dq"] * scale
    for key, value in outputs.items():
        if key in ("dS0", "dz0") and key not in golden:
            assert np.isfinite(value).all()
        else:
            shape = golden[key].shape
            assert_close(name, dtype, key, value[tuple(map(slice, shape))], golden[key])


@pytest.mark.parametrize(("implementation", "dtype"), RUNS)
def test_packed(implementation, dtype):
    golden = case_of(MASKED, "packed")
    lengths = np.diff(golden["cu_seqlens"])
    ids = np.repeat(np.arange(len(lengths)), lengths)[None]
    with jax.enable_x64(dtype == "float64"):
        arrays = [jnp.asarray(golden[key], dtype) for key in ("q", "k", "v")]
        options = {"implementation": implementation, "chunk_size": 8}

        def op(q, k, v):
            return additive_scan(q, k, v, segment_ids=jnp.asarray(ids, jnp.int32), **options)

        (o, (s, z)), pull = jax.vjp(jax.jit(op), *arrays)
        zeros = jax.tree.map(jnp.zeros_like, (s, z))
        gradients = pull((jnp.asarray(golden["do"], dtype), zeros))
    golden |= {key: golden[key][-1:] for key in ("S_T", "z_T")}  # of the last segment
    found = {"o": o, "S_T": s, "z_T": z, **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}
    for key, value in found.items():
        assert_close("packed", dtype, key, np.asarray(value), golden[key])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", cases(ONCE))
def test_without_order(name, dtype):
    golden, scale = case_of(ONCE, name), cases(ONCE)[name]["scale"]
    flat = lambda x: x.reshape(x.shape[0], -1, *x.shape[-2:])
    mask = golden.get("mask")
    with jax.enable_x64(dtype == "float64"):
        mask = None if mask is None else jnp.asarray(mask.reshape(len(mask), -1), bool)
        arrays = [jnp.asarray(flat(golden[key]), dtype) for key in ("q", "k", "v")]
        attend = lambda q, k, v: additive_attention(q, k, v, scale=scale, mask=mask)
        o, pull = jax.vjp(jax.jit(attend), *arrays)
        gradients = pull(jnp.asarray(flat(golden["do"]), dtype))
        k = arrays[1] if mask is None else jnp.where(mask[..., None, None], arrays[1], -jnp.inf)
        s, z = attention.summary(k, arrays[2], None, jnp.dtype(dtype))
        # The same state as the last one of the causal scan, in any order.
        _, (s_causal, z_causal) = additive_scan(*arrays, mask=mask)
    for key, value in {"S": s, "z": z}.items():
        assert_close(name, dtype, key, np.asarray(value), golden[key])
    for key, value in {"S": s_causal, "z": z_causal}.items():
        assert_close(name, dtype, key, np.asarray(value), golden[key])
    for key, value in zip(("o", "dq", "dk", "dv"), (o, *gradients), strict=True):
        assert_close(name, dtype, key, np.asarray(value).reshape(golden[key].shape), golden[key])


@pytest.mark.parametrize("name", ["decode1", "init", "extreme50"])
def test_steps(name):
    golden, scale = case_of(CAUSAL, name), cases(CAUSAL)[name]["scale"]
    batch, tokens, heads, key_dim = golden["q"].shape
    s = golden.get("S0", np.zeros((batch, heads, key_dim, golden["v"].shape[-1]), np.float32))
    z = golden.get("z0", np.full((batch, heads, key_dim), -np.inf, np.float32))
    state, step = (jnp.asarray(s), jnp.asarray(z)), jax.jit(additive_step)
    for t in range(tokens):
        q, k, v = (jnp.asarray(golden[key][:, t]) for key in ("q", "k", "v"))
        o, state = step(q, k, v, state, scale=scale)
        assert_close(name, "float32", "o", np.asarray(o), golden["o"][:, t])
    assert_close(name, "float32", "S_T", np.asarray(state[0]), golden["S_T"])
    assert_close(name, "float32", "z_T", np.asarray(state[1]), golden["z_T"])
