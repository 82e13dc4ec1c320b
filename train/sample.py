"""Samples from a checkpoint; everything else is read from it.

  python -m scanax.train.sample --workdir runs/s3 [--num N] [--seed S] [--step N]

Flows draw a picture, with the run's sampler or another:

  python -m scanax.train.sample --workdir runs/flow --sampler recipe=rf_euler:1 [--out one.png]

Language models continue prompts, of any number and any lengths, --num times each:

  python -m scanax.train.sample --workdir runs/lm --prompt "It was" --prompt_file letter.txt \\
      --num 2 --max_tokens 200 --temperature 0.8 --top_p 0.95 [--stop "\\n\\n"]

Masked diffusions do so too, and fill gaps, [[N]] for N tokens:

  python -m scanax.train.sample --workdir runs/radd --infill "It was [[40]] and then [[20]]."
"""

import pathlib

from absl import flags
import jax

from ..models.generation import Generated, Sampling
from . import evaluation, flags as flags_lib, run as run_lib
from .config import ConfigError

flags_lib.define_workdir()
flags_lib.define_sampler()
STEP = flags.DEFINE_integer("step", None, "A saved step; the newest by default.")
NUM = flags.DEFINE_integer("num", None, "Samples; of each prompt, if there are any.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Of the samples.", lower_bound=0)
OUT = flags.DEFINE_string("out", "", "The PNG of samples that are pictures; else in the workdir.")
PROMPT = flags.DEFINE_multi_string("prompt", [], "A text to continue; repeat it for more.")
PROMPT_FILE = flags.DEFINE_multi_string("prompt_file", [], "A file with a text to continue.")
INFILL = flags.DEFINE_multi_string("infill", [], "A text with gaps [[N]] to fill; repeat it.")
MAX_TOKENS = flags.DEFINE_integer("max_tokens", 256, "New tokens per sample.", lower_bound=1)
STOP = flags.DEFINE_multi_string("stop", [], r"A text that ends a sample; \n is a new line.")
IGNORE_END = flags.DEFINE_bool("ignore_end", False, "Go on after the end of a document.")
TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "0 takes the likeliest token.")
TOP_K = flags.DEFINE_integer("top_k", 0, "Only the k likeliest tokens; 0 = all.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "Only the likeliest tokens of this total probability.")
MIN_P = flags.DEFINE_float("min_p", 0.0, "Only tokens this likely relative to the likeliest.")
PENALTY = flags.DEFINE_float("repetition_penalty", 1.0, "Above 1 discourages repeated tokens.")


def main() -> None:
    workdir = flags_lib.workdir()
    options = [f.name for f in _GENERATION if flags.FLAGS[f.name].present]
    prompts = [*PROMPT.value, *map(_read, PROMPT_FILE.value)]
    if not all(prompts):
        raise ConfigError("a prompt is empty; leave it out to begin a document")
    if not all(STOP.value):
        raise ConfigError("--stop is empty: give a text, or leave it out")
    if INFILL.value and options:
        raise ConfigError(
            f"--infill does not go with --{options[0]}: set how tokens are drawn with --sampler"
        )
    sampling = None  # what is the task's own
    if any(flags.FLAGS[f.name].present for f in _SAMPLING):
        try:
            sampling = Sampling(
                temperature=TEMPERATURE.value,
                top_k=TOP_K.value,
                top_p=TOP_P.value,
                min_p=MIN_P.value,
                repetition_penalty=PENALTY.value,
            )
        except ValueError as error:
            raise ConfigError(f"--{error}") from error
    run = run_lib.load(workdir, STEP.value, sampler=flags_lib.sampler())
    if run.task.sample is None:
        raise ConfigError(f"task {run.config.task} has nothing to sample")
    if INFILL.value:
        print(infill(run, INFILL.value, NUM.value or 1))
        return
    if not options:
        drawn = evaluation.draw_samples(
            run.task, run.params, run.extra, SEED.value, NUM.value or 16
        )
        if not isinstance(drawn, str):
            path = pathlib.Path(OUT.value or workdir / f"samples_{run.step:08d}.png")
            drawn = evaluation.write_picture(drawn, path)
        print(drawn)
        return
    if run.task.complete is None:
        raise ConfigError(f"task {run.config.task} does not take --{options[0]}")
    number = NUM.value or 1
    texts = [text for text in prompts or [""] for _ in range(number)]
    generated = run.task.complete(
        run.params,
        run.extra,
        jax.random.key(SEED.value),
        texts,
        sampling=sampling,
        max_tokens=MAX_TOKENS.value,
        stops=[text.replace("\\n", "\n") for text in STOP.value],
        stop_at_end=not IGNORE_END.value,
    )
    print(render(generated, texts, number, run.task.decode))


def infill(run: run_lib.Run, texts: list[str], number: int) -> str:
    """Texts with their gaps filled, each ``number`` times."""
    if run.task.infill is None or run.task.decode is None:
        raise ConfigError(f"task {run.config.task} does not take --infill")
    every = [text for text in texts for _ in range(number)]
    key = jax.random.key(SEED.value)
    tokens, lengths = run.task.infill(run.params, run.extra, key, every)
    lines = []
    for i, (ids, length) in enumerate(zip(tokens, lengths, strict=True)):
        lines.append(f"--- text {i // number}, sample {i % number} ---")
        lines.append(run.task.decode(ids[:length]))
    return "\n".join(lines)


def render(generated: Generated, texts: list[str], number: int, decode) -> str:
    """Prompts with their continuations, why they ended, and how fast it went."""
    lines = []
    for i, tokens in enumerate(generated.tokens):
        why = "stopped" if generated.stopped[i] else "cut"
        name = f"prompt {i // number}, sample {i % number}"
        lines += [f"--- {name}: {len(tokens)} tokens, {why} ---", texts[i] + decode(tokens)]
    for what, tokens, seconds in (
        ("prompts", generated.prompt_tokens, generated.prefill_seconds),
        ("new", generated.new_tokens, generated.decode_seconds),
    ):
        if seconds:
            rate = f"{tokens / seconds:.4g} tokens/s"
            lines.append(f"{what}: {tokens} tokens in {seconds:.3g} s, {rate}")
    return "\n".join(lines)


def _read(path: str) -> str:
    try:
        return pathlib.Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompt_file {path} cannot be read: {error}") from error


_SAMPLING = (TEMPERATURE, TOP_K, TOP_P, MIN_P, PENALTY)
_GENERATION = (PROMPT, PROMPT_FILE, MAX_TOKENS, STOP, IGNORE_END, *_SAMPLING)

if __name__ == "__main__":
    flags_lib.launch(main)
