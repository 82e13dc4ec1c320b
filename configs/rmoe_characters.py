"""Six routers on the characters of Shakespeare: the paper's small model and its protocol, in small.

  SCANAX_DATA=... python -m scanax.train.main --config configs/rmoe_characters.py \\
      --workdir runs/rmoe

Streams of text whose cache is carried from row to row; no dropout, a constant learning rate.
Expect 2.58 bits per byte, the mean of three seeds, in four minutes on one core. Each router is:

  SCANAX_DATA=... python -m scanax.train.sweep --config configs/rmoe_characters.py \\
      --workdir runs/routers --seeds 3 --metrics bits_per_byte,balance_loss \\
      --config.model.router_head_dim=64 \\
      --grid "model.router_cell:model.router_memory:model.router_head=gru:full:linear,\\
  none:full:linear,gru:none:linear,gru:detach:linear,none:full:mlp,none:full:random"

and the deeper study --grid "model.router_cell=gru,none" with --config.model.num_hidden_layers=12
--config.num_steps=1000 --config.evaluation.every_steps=0.
"""

from scanax.configs import base, datasets


def get_config():
    config = base.get_config("language_model", "rmoe_seq")
    config.num_steps = 2000
    config.batch_size = 16

    config.model.num_hidden_layers = 4
    config.model.hidden_size = 64
    config.model.intermediate_size = 64
    config.model.num_experts = 8
    config.model.experts_per_token = 2
    config.model.router_dim = 32
    config.model.span = 128

    config.data.update(datasets.CHARACTERS)
    config.data.update(datasets.files("tinyshakespeare/input.txt"))
    config.data.update(datasets.STREAMS)
    config.data.update({"length": 64, "random_offset": False})

    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 100

    config.evaluation.every_steps = 500
    config.evaluation.batch_size = 8
    config.evaluation.batches = 0
    config.evaluation.samples = 2
    return config
