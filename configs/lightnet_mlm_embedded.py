"""A small bidirectional LightNet that fills in bytes of Python's manual, one topic to a row.

python -m scanax.train.main --config configs/lightnet_mlm_embedded.py --workdir runs/mlm
python -m scanax.train.sample --workdir runs/mlm --num 2

Expect 71 % of the hidden bytes found, 1.06 nats each, in nine minutes on one core.
"""

from scanax.configs import base


def get_config():
    config = base.get_config("masked_language_model", "lightnet")
    config.num_steps = 1000
    config.batch_size = 16

    config.model.hidden_size = 128
    config.model.num_hidden_layers = 3
    config.model.num_heads = 4
    config.model.intermediate_size = 256

    config.data.length = 256
    config.data.long_documents = "split"

    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.b2 = 0.98
    config.optimizer.weight_decay = 0.05
    config.optimizer.clip_norm = 1.0

    config.evaluation.every_steps = 500
    config.evaluation.batches = 0
    config.evaluation.samples = 2
    return config
