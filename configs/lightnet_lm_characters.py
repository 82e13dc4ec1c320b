"""Causal LightNet on characters, for example of Shakespeare, and its baselines at equal size.

  SCANAX_DATA=... python -m scanax.train.main --config configs/lightnet_lm_characters.py \\
      --workdir runs/characters

Expect 2.44 bits per byte on the last tenth. The README has the command for the baselines.
"""

from scanax.configs import datasets, lightnet_lm_embedded


def get_config():
    config = lightnet_lm_embedded.get_config()
    config.num_steps = 1000
    config.model.num_hidden_layers = 3
    config.data.update(datasets.CHARACTERS)
    config.data.update(datasets.files("tinyshakespeare/input.txt"))
    config.evaluation.every_steps = 500
    return config
