"""A small causal LightNet on text that every Python carries: bytes of its manual.

python -m scanax.train.main --config configs/lightnet_lm_embedded.py --workdir runs/lightnet_lm
python -m scanax.train.sample --workdir runs/lightnet_lm --prompt "The statement"
python -m scanax.train.evaluate --workdir runs/lightnet_lm --analysis saturation
"""

from scanax.configs import base


def get_config():
    config = base.get_config("language_model", "lightnet")
    config.num_steps = 600
    config.batch_size = 8

    config.model.hidden_size = 128
    config.model.num_hidden_layers = 2
    config.model.num_heads = 4
    config.model.intermediate_size = 256

    config.data.length = 256
    config.data.random_offset = True

    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.final_fraction = 0.1
    config.optimizer.b2 = 0.98
    config.optimizer.weight_decay = 0.1
    config.optimizer.clip_norm = 1.0

    config.evaluation.every_steps = 200
    config.evaluation.batches = 0
    config.evaluation.batch_size = 16
    config.evaluation.samples = 2
    return config
