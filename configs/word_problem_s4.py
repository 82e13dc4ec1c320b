"""S4 word problem: two Householder steps, eigenvalues in [-1, 1].

  python -m scanax.train.main --config configs/word_problem_s4.py --workdir runs/s4

As for S3, with more heads; a curriculum that begins at words of two elements, whose product is
learned at once, and doubles from there on; and a learning rate that falls at the end. The run
ends when length 512 is solved. The README has what was measured.
"""

from scanax.configs import word_problem_s3


def get_config():
    config = word_problem_s3.get_config()
    config.num_steps = 2500
    config.batch_size = 16
    config.model.num_heads = 8
    config.data.group = "S4"
    config.data.curriculum_lengths = (2, 4, 8, 16, 32, 64, 128)
    config.data.curriculum_steps = (0, 300, 450, 600, 750, 900, 1050)
    config.data.eval_lengths = (128, 256, 512)
    config.optimizer.schedule = "wsd"
    config.optimizer.decay_steps = 1000
    config.optimizer.final_fraction = 0.1
    config.evaluation.every_steps = 250
    config.evaluation.stop_when = "sequence_accuracy_512>=0.99"
    config.checkpoint.every_steps = 500
    return config
