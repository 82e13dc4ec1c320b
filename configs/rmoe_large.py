"""The paper's 0.91B model: 24 layers of 16 SwiGLU experts, of which a token goes to four.

  python -m scanax.train.data.prepare text --path "corpus/*.txt" --name corpus --data_dir data \\
      --tokenizer corpus/tokenizer.json --length 4096
  python -m scanax.train.main --config configs/rmoe_large.py --workdir runs/rmoe_large \\
      --config.data.data_dir=data --config.mesh.fsdp=8

Widths, rates, betas, decay, clipping, warmup and balance coefficient are the paper's; its data and
tokenizer of 96,512 pieces are private. These widths have 1,069M parameters, 822M of them beside
the embeddings, where the paper prints 0.91B and 664M, which do not follow from its widths. The
recurrent router adds 3.59M to an ordinary one, as the paper says.

Not trained here: the parameter count is checked, no result is claimed.
"""

from scanax.configs import base


def get_config():
    config = base.get_config("language_model", "rmoe")
    config.num_steps = 10_000  # 40 billion tokens, nearly
    config.batch_size = 1120
    config.microbatches = 140  # a row per device of eight

    config.model.vocab_size = 96512
    config.model.hidden_size = 1280
    config.model.num_hidden_layers = 24
    config.model.num_heads = 20
    config.model.intermediate_size = 448
    config.model.num_experts = 16
    config.model.experts_per_token = 4
    config.model.router_dim = 128
    config.model.dtype = "bfloat16"
    config.model.remat = True

    config.data.source = "tfds"
    config.data.name = "corpus"
    config.data.split = "train[:99%]"
    config.data.eval_split = "train[99%:]"
    config.data.layout = "rows"
    config.data.tokenizer = "corpus/tokenizer.json"
    config.data.length = 4096

    config.optimizer.learning_rate = 4.2e-4
    config.optimizer.warmup_steps = 2000
    config.optimizer.final_fraction = 0.1
    config.optimizer.b2 = 0.95
    config.optimizer.weight_decay = 0.1
    config.optimizer.clip_norm = 1.0

    config.evaluation.every_steps = 1000
    config.evaluation.batches = 128
    config.evaluation.batch_size = 8
    config.evaluation.samples = 0
    return config
