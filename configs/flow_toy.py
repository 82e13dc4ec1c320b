"""Rectified flow between two mixtures of Gaussians in the plane, as in the paper's notebook.

  python -m scanax.train.main --config configs/flow_toy.py --workdir runs/toy1
  python -m scanax.train.generate_pairs --workdir runs/toy1 --out pairs/toy1 --num 100000 \\
      --recipe euler:100 --per_shard 25000 --batch_size 5000
  python -m scanax.train.main --config configs/flow_toy.py --workdir runs/toy2 \\
      --config.init_from=runs/toy1 --config.data.pairs=pairs/toy1
  python -m scanax.train.evaluate --workdir runs/toy2 --analysis toy
  python -m scanax.train.evaluate --workdir runs/toy2 --analysis geometry
"""

from scanax.configs import base


def get_config():
    config = base.get_config("rectified_flow_2d")
    config.num_steps = 6000
    config.batch_size = 1024
    config.optimizer.learning_rate = 5e-3
    config.sampler.recipe = "euler:100"
    config.evaluation.batches = 16
    config.evaluation.batch_size = 1024
    config.evaluation.samples = 1000
    return config
