"""Bidirectional LightNet that fills in pieces of words in film reviews, padded to equal length.

  SCANAX_DATA=... python -m scanax.train.data.prepare tokenizer \\
      --path movie_reviews/movie_reviews.zip --vocab_size 2048 --out runs/reviews/tokenizer.json
  SCANAX_DATA=... python -m scanax.train.main --config configs/lightnet_mlm_reviews.py \\
      --workdir runs/mlm_reviews

Expect 32 % of the hidden pieces found, 3.74 nats each.
"""

from scanax.configs import datasets, lightnet_mlm_embedded


def get_config():
    config = lightnet_mlm_embedded.get_config()
    config.data.update(datasets.files("movie_reviews/movie_reviews.zip"))
    config.data.tokenizer = "runs/reviews/tokenizer.json"
    return config
