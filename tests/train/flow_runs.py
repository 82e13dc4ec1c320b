"""Flows of a few steps, for tests."""

import jax
import jax.numpy as jnp

from scanax.configs import base, flow_toy
from scanax.train import tasks
from scanax.train.config import from_dict


def toy(**changes):
    """A small run of points; ``changes`` by dotted key."""
    config = flow_toy.get_config()
    small = {
        "num_steps": 4,
        "batch_size": 16,
        "model.hidden_size": 8,
        "evaluation.batches": 1,
        "evaluation.batch_size": 16,
        "evaluation.samples": 0,
        "optimizer.ema_decay": 0.9,
        "sampler.recipe": "euler:4",
        "mesh.data": 1,
    }
    config.update_from_flattened_dict({**small, **changes})
    return config


def digits(**changes):
    """A small run of 8 x 8 digits with classes."""
    config = base.get_config("rectified_flow", "dit")
    small = {
        "num_steps": 2,
        "batch_size": 8,
        "model.hidden_size": 16,
        "model.num_hidden_layers": 1,
        "model.num_heads": 2,
        "model.patch_size": (4, 4),
        "model.num_classes": 10,
        "data.channels": 1,
        "evaluation.batches": 1,
        "evaluation.batch_size": 8,
        "evaluation.samples": 4,
        "sampler.recipe": "rf_euler:2",
        "sampler.invert": "rf_invert_euler:2",
        "sampler.features": "pixels",
        "sampler.recipes": ("rf_euler:1", "rf_rk45:1e-1"),
        "mesh.data": 1,
    }
    config.update_from_flattened_dict({**small, **changes})
    return config


def make(config):
    config = from_dict(config.to_dict())
    return config, tasks.build(config)


def first_loss(config):
    """Loss per example of the first batch, the parameters, batch and keys."""
    frozen, task = make(config)
    params, extra = task.init(jax.random.key(3))
    extra = {**extra, **({"given": task.given()} if task.given() else {})}
    batch = {name: jnp.asarray(x) for name, x in next(task.train_data(0, 1)).items()}
    keys = jax.random.split(jax.random.key(4), frozen.batch_size)
    total, aux = task.loss(params, extra, batch, keys)
    return total / aux.weight, params, batch, keys, aux
