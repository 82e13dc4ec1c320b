"""A small DeltaProduct language model on characters, for example of Shakespeare.

  SCANAX_DATA=... python -m scanax.train.main --config configs/lm_characters.py \\
      --config.data.path=tinyshakespeare/input.txt --workdir runs/characters

Expected on the last tenth of tiny Shakespeare: 2.36 bits per byte, in two and a half minutes on
two cores.
"""

from scanax.configs import datasets, lm_embedded


def get_config():
    config = lm_embedded.get_config()
    config.data.update(datasets.CHARACTERS)
    config.data.update(datasets.files("tinyshakespeare/input.txt"))
    return config
