"""S3 word problem with two Householder steps and eigenvalues in [-1, 1].

  python -m scanax.train.main --config configs/word_problem_s3.py --workdir runs/s3
"""

from scanax.configs import base


def get_config():
    config = base.get_config("word_problem")
    config.num_steps = 1500
    config.model.use_short_conv = False
    config.model.use_output_gate = False
    config.model.activation = "identity"
    config.model.intermediate_size = 128
    config.data.curriculum_lengths = (16, 32, 64, 128)
    config.data.curriculum_steps = (0, 300, 500, 700)
    config.optimizer.learning_rate = 3e-3
    config.optimizer.clip_norm = 1.0
    return config
