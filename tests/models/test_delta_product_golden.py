"""The DeltaProduct layer and language model against the published implementation.

The files hold float64 results of flash-linear-attention's own modules (gradients of
parameters rounded to float32). Errors are relative to the largest entry of each array.
"""

import contextlib
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scanax.models import interop, layout
from scanax.models.delta_product import DeltaProduct
from scanax.models.delta_product.interop import config_from_fla, layer_table

LAYERS = (
    "gated_nh2",
    "gated_nh2_expandv2_gva",
    "gated_nh2_leftpad",
    "gated_nh2_varlen",
    "posbeta_nh1",
    "ungated_nh3_nogate_noconv",
)
MODELS = ("gated_nh2_2layer", "statetracking_nh2_1layer", "ungated_nh3_2layer_tied")
# dtype: tolerance of outputs, of gradients, of gradients that are stored in float32
TOLERANCE = {"float32": (2e-5, 1e-4, 1e-4), "float64": (1e-11, 1e-11, 2e-7)}
LAYER_RUNS = [(name, dtype, "xla") for name in LAYERS for dtype in TOLERANCE]
LAYER_RUNS.append(("gated_nh2_varlen", "float64", "reference"))


@dataclasses.dataclass
class Case:
    """A golden file: its arrays, parameters, gradients and configuration, in one dtype."""

    arrays: dict
    params: dict
    gradients: dict
    config: dict
    dtype: str

    @classmethod
    def load(cls, path, dtype):
        arrays = dict(np.load(path))
        part = lambda prefix: {
            name.removeprefix(prefix): array.astype(dtype)
            for name, array in arrays.items()
            if name.startswith(prefix)
        }
        config = json.loads(str(arrays["config"]))
        return cls(arrays, part("param."), part("grad."), config, dtype)

    def layer(self, implementation="xla"):
        """The layer and its parameters."""
        config = config_from_fla(self.config, self.dtype)
        config = dataclasses.replace(config, implementation=implementation)
        return DeltaProduct(config), layout.load(layer_table(config), self.params)


def precision(dtype):
    return jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()


@pytest.mark.parametrize(("name", "dtype", "implementation"), LAYER_RUNS)
def test_layer(golden, jit, check, name, dtype, implementation):
    case = Case.load(golden / f"deltaproduct/layer_{name}.npz", dtype)
    outputs, gradients, stored = TOLERANCE[dtype]
    x, dy = (case.arrays[key].astype(dtype) for key in ("x", "dy"))
    kwargs = {}
    if "attention_mask" in case.arrays:
        kwargs["mask"] = case.arrays["attention_mask"].astype(bool)
    if "cu_seqlens" in case.arrays:
        lengths = np.diff(case.arrays["cu_seqlens"])
        kwargs["segment_ids"] = np.repeat(np.arange(len(lengths)), lengths)[None]

    with precision(dtype):
        module, params = case.layer(implementation)

        @jit
        def run(params, x):
            apply = lambda params, x: module.apply({"params": params}, x, **kwargs)[0]
            y, vjp = jax.vjp(apply, params, x)
            return y, *vjp(jnp.asarray(dy))

        y, dparams, dx = run(params, x)
        dparams = layout.dump(layer_table(module.config), dparams)
    check("y", y, case.arrays["y"], outputs)
    check("dx", dx, case.arrays["dx"], gradients)
    assert dparams.keys() == case.gradients.keys()
    for key, want in case.gradients.items():
        check(key, dparams[key], want, stored)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_layer_decode(golden, jit, check, dtype):
    """A prefill, then one token at a time: outputs, states and convolution histories."""
    case = Case.load(golden / "deltaproduct/layer_decode_gated_nh2.npz", dtype)
    x, prefill = case.arrays["x"].astype(dtype), int(case.arrays["prefill_len"])
    tolerance = TOLERANCE[dtype][0]

    def check_cache(cache, moment):
        check("state", cache.state, case.arrays[f"recurrent_state_{moment}"], tolerance)
        for name in "qkv":  # published: [B, channels, W], with the oldest input that we drop
            want = case.arrays[f"conv_state_{name}_{moment}"][:, :, 1:].swapaxes(1, 2)
            check(f"conv_{name}", getattr(cache, f"conv_{name}"), want, tolerance)

    with precision(dtype):
        module, params = case.layer()
        step = jit(lambda x, cache: module.apply({"params": params}, x, cache=cache))
        y, cache = step(x[:, :prefill], None)
        check_cache(cache, "after_prefill")
        parts = [y]
        for t in range(prefill, x.shape[1]):
            y, cache = step(x[:, t : t + 1], cache)
            parts.append(y)
        check_cache(cache, "final")
        check("y", np.concatenate(parts, axis=1), case.arrays["y"], tolerance)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_model(golden, jit, check, name, dtype):
    case = Case.load(golden / f"deltaproduct/model_{name}.npz", dtype)
    outputs, _, stored = TOLERANCE[dtype]
    ids = case.arrays["input_ids"]

    with precision(dtype):
        module, params = interop.from_torch("fla_delta_product", case.params, case.config)

        def loss(params):
            logits, _ = module.apply({"params": params}, ids)
            scores = jax.nn.log_softmax(logits[:, :-1])
            return -jnp.mean(jnp.take_along_axis(scores, ids[:, 1:, None], axis=-1)), logits

        (value, logits), dparams = jit(jax.value_and_grad(loss, has_aux=True))(params)
        assert logits.dtype == dtype
        dparams = interop.to_torch("fla_delta_product", dparams, case.config)
    check("logits", logits, case.arrays["logits"], outputs)
    check("loss", value, case.arrays["loss"], outputs)
    assert dparams.keys() == case.gradients.keys()
    for key, want in case.gradients.items():
        check(key, dparams[key], want, stored)
