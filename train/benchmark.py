"""Measures a config's throughput: the data alone, and the training step with and without it.

  python -m scanax.train.benchmark --config configs/lm_embedded.py [--data_only] [--steps 50]
  python -m scanax.train.benchmark --config configs/lm_embedded.py --decode 1000,100000

The data alone is timed with a consumer that does nothing. The share of a step spent waiting
is the time in ``next(data)`` over the whole time of the steps, while batches are prepared in
the background as in training. --decode times generation behind prompts of these lengths
instead: for a recurrent model a token costs the same wherever it stands. Nothing is written.
"""

import json
import time

from absl import flags
import jax
import numpy as np

from ..models.generation import Sampling
from . import flags as flags_lib, loop, mesh as mesh_lib, state as state_lib, tasks
from .config import Config, ConfigError
from .step import jit_step, make_step
from .task import Task

flags_lib.define_config()
DATA_ONLY = flags.DEFINE_bool("data_only", False, "Only what concerns the data.")
DECODE = flags.DEFINE_list("decode", [], "Prompt lengths: time generation instead of training.")
STEPS = flags.DEFINE_integer("steps", 50, "Batches and steps to time.", lower_bound=1)
WARM_UP = 5  # batches and steps before the clock starts: threads, caches, compilation


def data_alone(task: Task, config: Config, steps: int) -> dict[str, float]:
    """Milliseconds per batch, examples/s and microseconds per example of the training data."""
    data = task.train_data(0, 1)
    for _ in range(WARM_UP):
        next(data)
    start = time.perf_counter()
    for _ in range(steps):
        next(data)
    seconds = (time.perf_counter() - start) / steps
    return {
        "batch_ms": seconds * 1e3,
        "examples_per_s": config.batch_size / seconds,
        "us_per_example": seconds / config.batch_size * 1e6,
    }


def training(task: Task, config: Config, steps: int) -> dict[str, float]:
    """Milliseconds per step, and the share of them spent waiting for data."""
    mesh, shardings = loop.place(task, config)
    state = jax.jit(lambda: state_lib.create(task, config), out_shardings=shardings)()
    step = jit_step(make_step(task, config, mesh), shardings, mesh)
    sharding = mesh_lib.batch_sharding(mesh)
    given = loop.put_given(task, mesh)
    data = task.train_data(0, 1)
    waited, start, metrics = 0.0, 0.0, None
    for i in range(WARM_UP + steps):
        if i == WARM_UP:
            jax.block_until_ready(metrics)
            waited, start = 0.0, time.perf_counter()
        before = time.perf_counter()
        batch = next(data)
        waited += time.perf_counter() - before
        previous = metrics
        state, metrics = step(state, loop.put_local(batch, sharding), given)
        jax.block_until_ready(previous)  # as the loop does: one step behind
    jax.block_until_ready(metrics)
    seconds = (time.perf_counter() - start) / steps
    tokens = int(np.prod(next(iter(task.batch_spec.values())).shape))
    return {
        "step_ms": seconds * 1e3,
        "examples_per_s": config.batch_size / seconds,
        "elements_per_s": tokens / seconds,
        "waiting_for_data": waited / steps / seconds,
    }


def decoding(task: Task, lengths: list[int], new_tokens: int) -> dict[str, dict[str, float]]:
    """Per prompt length: microseconds per new token, and tokens/s of reading the prompt.

    Parameters are random, there is one row, the likeliest token is taken. Lengths take turns, and
    the fastest of three rounds counts.

    Raises:
      ConfigError: if the task does not continue texts.
    """
    if task.complete is None:
        raise ConfigError("--decode needs a language model")
    params, extra = jax.jit(task.init)(jax.random.key(0))
    text, best = "the quick brown fox ", {}
    options = {"sampling": Sampling(temperature=0.0), "max_tokens": new_tokens}
    for _ in range(3):
        for length in lengths:
            prompt = (text * (length // len(text) + 1))[:length]
            key = jax.random.key(0)
            found = task.complete(params, extra, key, [prompt], stop_at_end=False, **options)
            row = {
                "prompt_tokens": found.prompt_tokens,
                "us_per_new_token": found.decode_seconds / found.new_tokens * 1e6,
                "prompt_tokens_per_s": found.prompt_tokens / found.prefill_seconds,
            }
            old = best.setdefault(str(length), row)
            old["us_per_new_token"] = min(old["us_per_new_token"], row["us_per_new_token"])
            rate = max(old["prompt_tokens_per_s"], row["prompt_tokens_per_s"])
            old["prompt_tokens_per_s"] = rate
    return best


def main() -> None:
    config = flags_lib.config()
    task = tasks.build(config)
    if DECODE.value:
        if not all(length.isdigit() and int(length) for length in DECODE.value):
            raise ConfigError(
                f"--decode {','.join(DECODE.value)} should be lengths like 1000,100000"
            )
        _print(decoding(task, [int(length) for length in DECODE.value], 1000))
        return
    results = {"data": data_alone(task, config, STEPS.value)}
    trained = training(task, config, STEPS.value)
    if DATA_ONLY.value:
        results["data"]["waiting_share_of_step"] = trained["waiting_for_data"]
    else:
        results["training"] = trained
    _print(results)


def _print(results: dict[str, dict[str, float]]) -> None:
    for part, values in results.items():
        for name, value in values.items():
            print(f"{part:9} {name:22} {value:12.4g}")
    print(json.dumps(results))


if __name__ == "__main__":
    flags_lib.launch(main)
