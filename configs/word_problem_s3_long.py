"""S3 word problem, trained longer and on longer words, for accuracy far beyond the paper's 512.

python -m scanax.train.main --config configs/word_problem_s3_long.py --workdir runs/s3_long

Expected: at least 95 % sequence accuracy at length 4,096 in about seven minutes (3 of 3 seeds).
"""

from scanax.configs import word_problem_s3


def get_config():
    config = word_problem_s3.get_config()
    config.num_steps = 3000
    config.batch_size = 8
    config.data.length = 512
    config.data.curriculum_lengths = (16, 32, 64, 128, 256, 512)
    config.data.curriculum_steps = (0, 200, 350, 500, 700, 1000)
    config.data.eval_lengths = (128, 256, 512, 1024, 2048, 4096)
    config.evaluation.every_steps = 500
    config.evaluation.batches = 8
    config.evaluation.batch_size = 32
    config.checkpoint.every_steps = 500
    return config
