"""Training steps of RADD against the published trainer: losses, gradients, AdamW, clipping, EMA."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import radd_goldens as goldens

from scanax.models import interop, radd
from scanax.train.optimizer import OptimizerConfig, ema_rate, make_optimizer, make_schedule


def settings(file) -> OptimizerConfig:
    return OptimizerConfig(
        learning_rate=float(file["lr"]),
        schedule="constant",
        warmup_steps=int(file["warmup"]),
        decay_steps=0,
        final_fraction=0.0,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=float(file["weight_decay"]),
        decay_mask="all",
        clip_norm=float(file["grad_clip"]),
        ema_decay=float(file["ema_decay"]),
        ema_start="warmup",
        freeze=(),
        freeze_from=0,
    )


@pytest.mark.parametrize(
    ("name", "loss"), [("lambda", "lambda_dce"), ("tdse", "t_dse"), ("tdce", "t_dce")]
)
def test_golden_steps(name, loss, check, jit):
    file, function = goldens.load(f"train_{name}"), radd.Loss(loss)
    public = {"tokens": 8, "model": {"hidden_size": 16, "n_blocks": 1, "n_heads": 2}}
    # optax mixes types.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        wide = {k: x.astype(np.float64) for k, x in goldens.part(file, "init/").items()}
        module, params = interop.from_torch("radd", wide, public)
        config = settings(file)
        optimizer = make_optimizer(config, None)
        schedule = make_schedule(config, 10**6)

        def nats(params, x0, u, uniforms):
            corruption = function.corrupt(radd.Noise(u, uniforms))
            logits = module.apply({"params": params}, jnp.where(corruption.mask_BT, 8, x0))
            return jnp.mean(radd.value(corruption, radd.cross_entropy(logits, x0, 8)))

        @jit
        def step(params, ema, opt_state, n, x0, u, uniforms):
            loss, grads = jax.value_and_grad(nats)(params, x0, u, uniforms)
            direction, opt_state = optimizer.update(grads, opt_state, params)
            rate = schedule(n).astype(jnp.float64)
            params = jax.tree.map(lambda p, d: p - rate * d, params, direction)
            keep = ema_rate(config, n).astype(jnp.float64)
            ema = jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, ema, params)
            return params, ema, opt_state, loss, grads

        same = lambda prefix, tree, tolerance: [
            check(f"{prefix}/{k}", x, file[f"{prefix}/{k}"], tolerance)
            for k, x in interop.to_torch("radd", tree, public).items()
            if np.any(file[f"{prefix}/{k}"])
        ]
        ema, opt_state = params, optimizer.init(params)
        for n in range(len(file["losses"])):
            inputs = (file[key][n] for key in ("x0", "u", "mask_uniforms"))
            params, ema, opt_state, found, grads = step(
                params, ema, opt_state, jnp.int32(n), *inputs
            )
            check(f"loss {n}", found, file["losses"][n], 1e-9 if n == 0 else 1e-6)
            check(
                f"norm {n}", optax.tree.norm(grads), file["grad_norms"][n], 1e-9 if n == 0 else 1e-6
            )
            if n == 0:
                same("grad1", grads, 1e-9)
                # Rates and averages are float32 here, and the published clipping adds 1e-6.
                same("after1", params, 1e-8)
                same("ema1", ema, 1e-7)
        same("final", params, 1e-6)
        same("ema", ema, 1e-6)
