"""RADD as published (Ou et al. 2025) on OpenWebText with GPT-2's tokens; FILE:SIZE.

  python -m scanax.train.data.prepare text --path openwebtext --name openwebtext \\
      --data_dir DATA --tokenizer GPT2 --length 1024
  python -m scanax.train.main --config configs/radd_openwebtext.py:small --workdir runs/radd \\
      --config.data.data_dir=DATA --config.data.tokenizer=GPT2

SIZE is small (162,265,682 parameters) or medium (405,191,762); GPT2 is a folder with GPT-2's
vocabulary. For eight GPUs: four rows at a time on each. 400,000 steps of 512 rows at a constant
rate after the warmup; the published weight decay is 0.03 in the paper and 0 in its configuration,
and applies to all parameters. Perplexities are then

  python -m scanax.train.evaluate --workdir runs/radd --analysis likelihood --rows 1000

Not trained here. Published weights: python -m scanax.models.interop --from DOWNLOAD --to runs/radd
--config configs/radd_openwebtext.py:small.
"""

from scanax.configs import base, datasets
from scanax.models.radd import SIZES


def get_config(size: str = "small"):
    config = base.get_config("masked_diffusion", "radd")
    config.num_steps = 400_000
    config.batch_size = 512
    config.microbatches = 16
    config.model.update(SIZES[size])
    config.model.dtype = "bfloat16"
    config.model.remat = True

    config.data.update(datasets.MASKED)
    config.data.update(datasets.tfds("openwebtext", "", "train[:99%]", "train[99%:]"))
    config.data.layout = "rows"
    config.data.tokenizer = "gpt2"

    config.optimizer.learning_rate = 3e-4
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 2500
    config.optimizer.weight_decay = 0.03
    config.optimizer.decay_mask = "all"
    config.optimizer.clip_norm = 1.0
    config.optimizer.ema_decay = 0.9999

    config.evaluation.every_steps = 10_000
    config.evaluation.batch_size = 32
    config.sampler.steps = 1024
    config.checkpoint.every_steps = 5_000
    return config
