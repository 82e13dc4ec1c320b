"""A small DeltaProduct language model on pieces of words: two commands, the first trains them.

  python -m scanax.train.data.prepare tokenizer --path "gutenberg/*.txt" --clean gutenberg \\
      --vocab_size 2048 --out runs/tokenizer.json
  python -m scanax.train.main --config configs/lm_bpe.py --workdir runs/bpe

Text is looked for under SCANAX_DATA; any other path works:
``--config.data.path="books/*.txt" --config.data.clean=none``.

Expected on the last tenth of three novels (Bleak House, Middlemarch, War and Peace): 1.80 bits
per byte, in three and a half minutes on two cores.
"""

from scanax.configs import datasets, lm_embedded


def get_config():
    config = lm_embedded.get_config()
    config.data.update(datasets.PIECES)
    config.data.update(datasets.files("gutenberg/*.txt"))
    config.data.clean = "gutenberg"
    config.data.holdout = "tail"
    config.data.tokenizer = "runs/tokenizer.json"
    config.data.length = 256
    config.data.random_offset = False
    config.evaluation.batches = 16
    return config
