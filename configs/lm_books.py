"""A small DeltaProduct language model on the bytes of three novels, evaluated on a fourth.

  SCANAX_DATA=... python -m scanax.train.main --config configs/lm_books.py --workdir runs/books
  SCANAX_DATA=... python -m scanax.train.evaluate --workdir runs/books --analysis long_context

Bleak House, Middlemarch and War and Peace; Moby-Dick. Householder steps at equal parameters, with
and without the forget gate:

  python -m scanax.train.sweep --config configs/lm_books.py --workdir runs/books_grid \\
      --grid model.num_householder:model.num_heads=1:6,2:4,3:3 \\
      --grid model.use_forget_gate=false,true --metrics bits_per_byte
"""

from scanax.configs import base, datasets


def get_config():
    config = base.get_config("language_model")
    config.num_steps = 1000
    config.batch_size = 8

    config.model.hidden_size = 128
    config.model.num_hidden_layers = 2
    config.model.num_heads = 4
    config.model.head_dim = 32
    config.model.num_householder = 2
    config.model.intermediate_size = 256
    config.model.use_output_gate = False
    config.model.tie_word_embeddings = True

    config.data.update(datasets.files("gutenberg/*.txt", "mobydick/*.txt"))
    config.data.clean = "gutenberg"
    config.data.layout = "blocks"
    config.data.length = 256
    config.data.random_offset = True

    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.final_fraction = 0.1
    config.optimizer.b2 = 0.95
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip_norm = 1.0

    config.evaluation.batches = 16
    config.evaluation.batch_size = 16
    config.evaluation.samples = 2
    config.checkpoint.every_steps = 500
    return config
