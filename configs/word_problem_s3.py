"""S3 word problem: two Householder steps, eigenvalues in [-1, 1].

  python -m scanax.train.main --config configs/word_problem_s3.py --workdir runs/s3

One layer, trained on words of up to 128 elements. The learning rate stays high to the end: its
noise keeps pushing the steps towards exact reflections, which is what carries over to longer
words, and the average of the parameters removes the noise. With a decaying rate, or a larger
Adam epsilon, training is smooth, solves length 128 sooner, and generalises worse.

Expected: at least 99 % sequence accuracy at length 128 and 95 % at 512, in two to three minutes
on two cores (5 of 5 seeds when last measured; the README has the table).
"""

from scanax.configs import base


def get_config():
    config = base.get_config("word_problem")
    config.num_steps = 1200
    config.batch_size = 32

    config.model.hidden_size = 64
    config.model.num_heads = 2
    config.model.head_dim = 16
    config.model.num_householder = 2
    config.model.allow_neg_eigval = True
    config.model.intermediate_size = 128
    config.model.use_short_conv = False
    config.model.use_output_gate = False
    config.model.activation = "identity"

    config.data.group = "S3"
    config.data.length = 128
    config.data.curriculum_lengths = (16, 32, 64, 128)
    config.data.curriculum_steps = (0, 200, 350, 500)

    config.optimizer.learning_rate = 5e-3
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 50
    config.optimizer.b2 = 0.99
    config.optimizer.clip_norm = 1.0
    config.optimizer.ema_decay = 0.995

    config.evaluation.every_steps = 400
    config.checkpoint.every_steps = 400
    return config
