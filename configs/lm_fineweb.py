"""The paper's language models on FineWeb: SIZE is 213m, 392m or 805m, N is 1, 2 or 3.

  python -m scanax.train.data.prepare text --path "fineweb/*.txt" --name fineweb --data_dir data \\
      --tokenizer mistral/tokenizer.json --length 4096
  python -m scanax.train.main --config configs/lm_fineweb.py:392m,2 --workdir runs/392m_2 \\
      --config.data.data_dir=data --config.mesh.fsdp=8

24 layers, heads of 128, short convolution, no gates, tied embeddings; width and heads shrink with
N, so that every model of a size has about the same number of parameters. Steps and tokens are
the paper's (19, 35 and 55 billion tokens at 524,288 a step), and so are rate, betas, decay,
clipping and warmup; the paper's minimum of the cosine could not be found, a tenth is ours.

Not trained here: the parameter counts and the compiled step are checked, no result is claimed.
"""

from scanax.configs import base

SIZES = {  # steps, and per N: hidden size, heads
    "213m": (36240, {1: (768, 8), 2: (736, 6), 3: (768, 4)}),
    "392m": (66758, {1: (1024, 12), 2: (1024, 8), 3: (1024, 6)}),
    "805m": (104905, {1: (1536, 16), 2: (1468, 12), 3: (1536, 8)}),
}


def get_config(preset: str = "213m,2"):
    """Args: preset: "SIZE,N"."""
    size, _, householder = preset.partition(",")
    presets = {f"{s},{n}" for s, (_, shapes) in SIZES.items() for n in shapes}
    if preset not in presets:
        raise ValueError(f"preset {preset!r} must be one of {' '.join(sorted(presets))}")
    num_steps, shapes = SIZES[size]
    hidden_size, num_heads = shapes[int(householder)]

    config = base.get_config("language_model")
    config.seed = 42
    config.num_steps = num_steps
    config.batch_size = 128

    config.model.vocab_size = 32000
    config.model.hidden_size = hidden_size
    config.model.num_hidden_layers = 24
    config.model.num_heads = num_heads
    config.model.head_dim = 128
    config.model.num_householder = int(householder)
    config.model.use_output_gate = False
    config.model.tie_word_embeddings = True
    config.model.initializer_range = 0.006
    config.model.dtype = "bfloat16"
    config.model.remat = True

    config.data.source = "tfds"
    config.data.name = "fineweb"
    config.data.split = "train[:99%]"
    config.data.eval_split = "train[99%:]"
    config.data.layout = "rows"
    config.data.tokenizer = "mistral/tokenizer.json"  # of Mistral-7B-v0.1
    config.data.length = 4096

    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 512
    config.optimizer.final_fraction = 0.1
    config.optimizer.b2 = 0.95
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip_norm = 1.0

    config.evaluation.every_steps = 5000
    config.evaluation.batches = 16
    config.evaluation.samples = 0
    config.checkpoint.every_steps = 1000
    return config
