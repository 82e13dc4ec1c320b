"""Bidirectional LightNet in the shape of BERT-base, on rows of tokens prepared beforehand.

  python -m scanax.train.data.prepare text --path "books/*.txt" --name books --data_dir data \\
      --tokenizer bert/tokenizer.json --length 128
  python -m scanax.train.main --config configs/lightnet_mlm_base.py --workdir runs/mlm_base \\
      --config.data.data_dir=data --config.num_steps=100000

12 layers of 768 with 12 heads; rows of 128 tokens, a quarter of them predicted, no dropout, rate
1e-3 and a linear decay, which is how a language model is crammed into a day on one node (Geiping
and Goldstein 2022); num_steps is what the day allows.

Not trained here: the parameter count is checked, no result is claimed.
"""

from scanax.configs import base, datasets


def get_config():
    config = base.get_config("masked_language_model", "lightnet")
    config.num_steps = 100_000
    config.batch_size = 4096

    config.model.hidden_size = 768
    config.model.num_hidden_layers = 12
    config.model.num_heads = 12
    config.model.gate_low_rank_dim = 64
    config.model.vocab_size = 32768
    config.model.tie_word_embeddings = True
    config.model.dtype = "bfloat16"

    config.data.update(datasets.tfds("books", "", "train[:99%]", "train[99%:]"))
    config.data.layout = "rows"
    config.data.tokenizer = "bert/tokenizer.json"
    config.data.length = 128
    config.data.mask_rate = 0.25

    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "wsd"
    config.optimizer.warmup_steps = 1000
    config.optimizer.decay_steps = 98_000
    config.optimizer.b2 = 0.98
    config.optimizer.eps = 1e-12
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip_norm = 0.5

    config.evaluation.every_steps = 5000
    config.evaluation.batches = 16
    config.evaluation.samples = 0
    config.checkpoint.every_steps = 1000
    return config
