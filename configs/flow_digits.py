"""Rectified flow of 8 x 8 digits, from the first flow to one step; FILE:STAGE chooses the stage.

  F="--config configs/flow_digits.py"
  python -m scanax.train.main --config configs/digits_convnet.py --workdir runs/convnet
  python -m scanax.train.main $F:first --workdir runs/first
  python -m scanax.train.generate_pairs --workdir runs/first --out pairs/first --num 10000
  python -m scanax.train.main $F:reflow --workdir runs/reflow \\
      --config.init_from=runs/first --config.data.pairs=pairs/first
  python -m scanax.train.generate_pairs --workdir runs/reflow --out pairs/reflow --num 10000
  python -m scanax.train.main $F:distill --workdir runs/distill \\
      --config.init_from=runs/reflow --config.data.pairs=pairs/reflow

  python -m scanax.train.main $F:rfpp --workdir runs/rfpp \\
      --config.init_from=runs/first --config.data.pairs=pairs/first

  python -m scanax.train.main $F:anneal --workdir runs/anneal \\
      --config.data.teacher=runs/first --config.data.pairs=pairs/first
  python -m scanax.train.generate_pairs --workdir runs/anneal --out pairs/anneal --num 10000
  python -m scanax.train.main $F:guided --workdir runs/guided --config.init_from=runs/anneal \\
      --config.data.pairs=pairs/anneal --config.objective.teacher=runs/anneal

  python -m scanax.train.evaluate --workdir runs/reflow --analysis quality \\
      --sampler features=classifier:runs/convnet

Stages: "first" (independent noise), "reflow" (l2 on the first's pairs), "rfpp" (the same pairs with
2-RF++'s times and loss, a stand-in for LPIPS), "distill" (one step of the reflow), "anneal"
(annealing reflow of a network a quarter the size, from scratch) and "guided" (flow-guided
distillation of that into one step). The README has the results.
"""

from scanax.configs import base

STAGES = ("first", "reflow", "rfpp", "distill", "anneal", "guided")


def get_config(stage: str = "first"):
    if stage not in STAGES:
        raise ValueError(f"the stage must be one of {', '.join(STAGES)}, not {stage!r}")
    config = base.get_config("rectified_flow", "dit")
    config.num_steps = 5000
    config.batch_size = 128

    small = stage in ("anneal", "guided")
    config.model.hidden_size = 32 if small else 64
    config.model.num_hidden_layers = 4
    config.model.num_heads = 4
    config.model.num_classes = 10

    config.data.channels = 1
    config.data.eval_fraction = 0.05

    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 200
    config.optimizer.clip_norm = 1.0
    config.optimizer.ema_decay = 0.999
    config.evaluation.samples = 100
    config.evaluation.batches = 0

    if stage == "rfpp":
        config.objective.loss = "lpips_huber_divt"
        config.objective.distance = "random_conv"
        config.objective.times = "u_shaped"
    if stage == "anneal":
        config.objective.annealing = "linear:3000"
    if stage in ("distill", "guided"):
        config.num_steps = 3000
        config.objective.times = "t0"
        config.objective.loss = "distill_lpips_l2"
        config.objective.distance = "random_conv"
        config.sampler.recipe = "rf_euler:1"
    if stage == "guided":
        config.objective.guidance = 1.0
    return config
