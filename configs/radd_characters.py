"""Masked diffusion on characters, for example of Shakespeare; FILE:MODEL for what is beside it.

  SCANAX_DATA=... python -m scanax.train.main --config configs/radd_characters.py \\
      --workdir runs/radd

MODEL is radd, lightnet (the same diffusion with LightNet in place of attention) or ar (a causal
model with attention that predicts the next character). All see blocks of 64 characters, the first
of them without anything before it. The losses, each with three seeds:

  SCANAX_DATA=... python -m scanax.train.sweep --config configs/radd_characters.py \\
      --workdir runs/losses --metrics bits_per_byte,standard_error --seeds 3 \\
      --grid "objective.loss=t_dse,t_dce,lambda_dce,k_dce"

The README has what came out.
"""

from scanax.configs import base, datasets


def get_config(model: str = "radd"):
    task, family = {
        "radd": ("masked_diffusion", "radd"),
        "lightnet": ("masked_diffusion", "lightnet"),
        "ar": ("language_model", "lightnet"),
    }[model]
    config = base.get_config(task, family)
    config.num_steps = 1000
    config.batch_size = 32

    config.model.hidden_size = 128
    config.model.num_hidden_layers = 4
    config.model.num_heads = 4
    if family == "lightnet":
        config.model.intermediate_size = 320
        config.model.mixer = "softmax" if model == "ar" else "lightnet"

    config.data.update(datasets.MASKED_CHARACTERS)
    config.data.update(datasets.files("tinyshakespeare/input.txt"))
    config.data.length = 64
    if task == "masked_diffusion":
        config.objective.eval_draws = 8
        config.sampler.block = 32

    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.weight_decay = 0.03
    config.optimizer.clip_norm = 1.0

    config.evaluation.batches = 0
    config.evaluation.samples = 4
    return config
