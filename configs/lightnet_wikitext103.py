"""Causal LightNet with 45M parameters on WikiText-103: six layers of 512.

  python -m scanax.train.main --config configs/lightnet_wikitext103.py --workdir runs/wikitext103 \\
      --config.data.path=wikitext103/train.txt --config.data.eval_path=wikitext103/valid.txt \\
      --config.data.tokenizer=gpt2

50,000 updates of 65,536 tokens at a peak rate of 5e-4, the setting of the linear models that this
one is compared with; weight decay and warmup are ours.

Not trained here: the parameter count is checked, no result is claimed.
"""

from scanax.configs import base, datasets


def get_config():
    config = base.get_config("language_model", "lightnet")
    config.num_steps = 50_000
    config.batch_size = 128

    config.model.hidden_size = 512
    config.model.num_hidden_layers = 6
    config.model.num_heads = 4
    config.model.intermediate_size = 1280
    config.model.gate_low_rank_dim = 128
    config.model.vocab_size = 50304  # GPT-2's 50,257, rounded up to a multiple of 128
    config.model.tie_word_embeddings = True
    config.model.dtype = "bfloat16"

    config.data.update(datasets.files("wikitext103/train.txt", "wikitext103/valid.txt"))
    config.data.clean = "wikitext"
    config.data.tokenizer = "gpt2"  # a folder with its vocab.json and merges.txt
    config.data.length = 512
    config.data.random_offset = True

    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 4000
    config.optimizer.b2 = 0.98
    config.optimizer.weight_decay = 0.1
    config.optimizer.clip_norm = 1.0

    config.evaluation.every_steps = 2500
    config.evaluation.batches = 0
    config.evaluation.samples = 2
    config.checkpoint.every_steps = 1000
    return config
