"""The paper's small models on enwik8: SIZE is small, medium, or 12, 18, 24 or 32 layers.

  python -m scanax.train.main --config configs/rmoe_enwik8.py:medium --workdir runs/enwik8 \\
      --config.data.path=enwik8/train.txt --config.data.eval_path=enwik8/valid.txt

Protocol of the paper and of the public code that it stands on: streams of 512 tokens whose cache
of 2,048 is carried on, Adam at a constant 7e-4 without decay or clipping, each update in two
microbatches, balance loss of 0.01 on each layer. Steps and warmup of the deeper models are not
known: those of "small" stand in. Text is read as 257 bytes where the public preprocessing has 205
symbols; bits_per_byte is the paper's BPC. --config.model.router_cell=none is its SMoE.

Not trained here: parameter counts are checked (tests), no result is claimed.
"""

from scanax.configs import base, datasets

SIZES = {  # layers, width, steps
    "small": (6, 264, 60_000),
    "medium": (8, 352, 80_000),
    **{str(layers): (layers, 264, 60_000) for layers in (12, 18, 24, 32)},
}


def get_config(size: str = "medium"):
    """Args: size: a key of ``SIZES``."""
    if size not in SIZES:
        raise ValueError(f"size {size!r} must be one of {', '.join(SIZES)}")
    layers, width, steps = SIZES[size]
    config = base.get_config("language_model", "rmoe_seq")
    config.num_steps = steps
    config.batch_size = 48
    config.microbatches = 2

    config.model.num_hidden_layers = layers
    config.model.hidden_size = width
    config.model.intermediate_size = width
    config.model.num_heads = 8
    config.model.num_experts = 16
    config.model.router_dim = 128
    config.model.span = 2048
    config.model.dropout = 0.1

    config.data.update(datasets.files("enwik8/train.txt", "enwik8/valid.txt"))
    config.data.update(datasets.STREAMS)
    config.data.end_of_document = False

    config.optimizer.learning_rate = 7e-4
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = steps // 20

    config.evaluation.every_steps = 5000
    config.evaluation.batch_size = 8
    config.evaluation.batches = 0
    config.evaluation.samples = 2
    config.checkpoint.every_steps = 1000
    return config
