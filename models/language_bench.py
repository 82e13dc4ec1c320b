"""What training a language model costs: DeltaProduct and LightNet, beside the same in PyTorch.

  python -m scanax.models.language_bench [--family delta_product,lightnet] [--out FILE.json]

About 10 million parameters each, in float32. Both sides begin with the same weights, read the same
rows of a fixed Markov chain on the same cores, and take the same steps of AdamW: the losses of the
first ``--steps`` must be equal to ``AGREEMENT`` before anything is timed. PyTorch runs twice: with
the recurrences that the package of the published layers, fla, has in plain torch, and with the
fastest known ("torch"); see ``language_bench_torch``. Repetitions of all are interleaved: quote the
ratios, not the times, and of an idle machine, as a busy one hurts PyTorch more. Memory is the
compiler's figure for temporary buffers. ``--peers=torch`` takes minutes on two cores; fla's, which
goes token by token, half an hour, and for DeltaProduct some 20 GB.

The second table says where our step spends its time: every part is compiled alone at the model's
shapes, forward and backward (``language_bench_parts``), timed in the same repetitions, and counted
as often as the model has it. The rest is what the parts do not have (norms and sums between
layers) and what they cost less or more alone.
"""

from collections.abc import Callable, Collection
import importlib.util
import json
import os
import statistics
import sys
import time
from typing import Any

from absl import app, flags
import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import interop, language_bench_parts as parts_lib, params as params_lib

AGREEMENT = 2e-5  # of the losses, relative
ADAMW: dict[str, Any] = {"learning_rate": 1e-4, "b1": 0.9, "b2": 0.95, "eps": 1e-6}
ADAMW |= {"weight_decay": 0.1}
SUCCESSORS = 4  # of every token in the Markov chain
# What differs from the published defaults, by family.
PUBLISHED = {
    "delta_product": {
        "expand_v": 1.0,
        "use_forget_gate": True,
        "allow_neg_eigval": True,
        "tie_word_embeddings": True,
    },
    "lightnet": {"tie_word_embeddings": True},
}
# What PyTorch's side needs with the recurrences of a peer, by family.
PACKAGES = {
    "torch": {"delta_product": ("torch", "transformers"), "lightnet": ("torch",)},
    "fla": dict.fromkeys(PUBLISHED, ("torch", "fla")),
}


def define_flags() -> None:
    """For the command alone: a process that imports this module may have others of these names."""
    flags.DEFINE_list("family", [*PUBLISHED], "What is trained.")
    flags.DEFINE_integer("hidden_size", 256, "Width.", lower_bound=1)
    flags.DEFINE_integer("layers", 9, "Blocks.", lower_bound=1)
    flags.DEFINE_integer("heads", 4, "They divide the width.", lower_bound=1)
    flags.DEFINE_integer("vocabulary", 4096, "Tokens that there are.", lower_bound=SUCCESSORS)
    flags.DEFINE_integer("householder", 2, "Steps per token of DeltaProduct.", lower_bound=1)
    flags.DEFINE_integer("batch", 4, "Rows.", lower_bound=1)
    flags.DEFINE_integer("tokens", 1024, "Of a row.", lower_bound=1)
    flags.DEFINE_integer("steps", 20, "Whose losses are compared.", lower_bound=1)
    flags.DEFINE_integer("repetitions", 5, "Timed calls of each.", lower_bound=1)
    flags.DEFINE_list("peers", [*PACKAGES], "Recurrences of PyTorch's side, where installed.")
    flags.DEFINE_string("out", "", "Also write the figures here, as JSON.")


def main(argv: list[str]) -> None:
    given = flags.FLAGS
    try:
        if len(argv) > 1:
            raise ValueError(f"unexpected argument {argv[1]!r}")
        sizes = (given.hidden_size, given.layers, given.heads, given.vocabulary, given.householder)
        models = {family: published(family, *sizes) for family in given.family}
        for name in given.peers:
            if name not in PACKAGES:
                raise ValueError(f"--peers: {name!r} is not one of {', '.join(PACKAGES)}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    cores, device = len(os.sched_getaffinity(0)), jax.devices()[0].device_kind
    print(f"jax {jax.__version__} on {device}, {cores} cores, float32", end="")
    print(f", {given.batch} rows of {given.tokens} tokens\n", flush=True)
    shape, results = (given.steps, given.batch, given.tokens), []
    for family, public in models.items():
        try:
            result = benchmark(family, public, shape, given.repetitions, given.peers)
        except Disagreement as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
        results.append(result)
        if result["loss_error"] is not None:
            error = f"{result['loss_error']:.0e}"
            print(f"{family}: the losses of {given.steps} steps are equal to {error}", flush=True)
    print(f"\n{table(results)}\n\n{parts_table(results)}")
    if given.out:
        figures = {"jax": jax.__version__, "device": device, "results": results}
        with open(given.out, "w") as file:
            json.dump(figures, file, indent=2)


class Disagreement(Exception):
    """The two sides do not train the same model."""


def published(
    family: str, hidden_size: int, layers: int, heads: int, vocabulary: int, householder: int
) -> dict[str, Any]:
    """The published configuration of the family's model, in these sizes."""
    if family not in PUBLISHED:
        raise ValueError(f"--family: {family!r} is not one of {', '.join(PUBLISHED)}")
    if hidden_size % heads:
        raise ValueError(f"--heads ({heads}) must divide --hidden_size ({hidden_size})")
    sizes = {"hidden_size": hidden_size, "num_hidden_layers": layers, "num_heads": heads}
    head_dim = hidden_size // heads
    sizes |= {"vocab_size": vocabulary, "num_householder": householder}
    sizes |= {"head_dim": head_dim, "expand_ratio": head_dim, "gate_low_rank_dim": head_dim}
    return sizes | PUBLISHED[family]


def benchmark(
    family: str,
    public: dict[str, Any],
    shape: tuple[int, int, int],
    repetitions: int,
    peers: Collection[str],
) -> dict[str, Any]:
    """Figures of one model: its losses, a row for every library, milliseconds of our parts.

    Args:
      public: configuration, as published.
      shape: steps, rows and tokens.
      peers: see ``begin``.

    Raises:
      Disagreement: if PyTorch's losses are others.
    """
    config = interop.find(f"fla_{family}").config(public, "float32")
    rows_XBT = markov(config.vocab_size, *shape)
    params, trainers = begin(family, public, rows_XBT[0], peers)
    losses = {name: [trainer.step(x) for x in rows_XBT] for name, trainer in trainers.items()}
    figures: dict[str, Any] = {"family": family, "parameters": params_lib.count(params)}
    figures |= {"layers": config.num_hidden_layers, "tokens": shape[1] * shape[2]}
    figures |= {"losses": losses, "loss_error": compare(family, losses)}
    calls = {name: _repeating(trainer.step, rows_XBT) for name, trainer in trainers.items()}
    for name, (function, x) in parts_lib.parts(config, params, rows_XBT[0], adamw()).items():
        compiled, x = jax.jit(function).lower(*x).compile(), jax.device_put(x)
        calls[name] = lambda f=compiled, x=x: jax.block_until_ready(f(*x))
    times = timed(calls, repetitions)
    rows = {name: {"library": name, **times.pop(name)} for name in trainers}
    rows["scanax"] |= trainers["scanax"].figures
    return {**figures, "rows": [*rows.values()], "parts": times}


def begin(
    family: str, public: dict[str, Any], ids: np.ndarray, peers: Collection[str]
) -> tuple[Any, dict[str, Any]]:
    """Parameters, and a trainer that begins with them for every library.

    Args:
      ids: [B, T + 1] tokens, for their shape.
      peers: whose recurrences PyTorch's side has, each where what it needs is installed.
    """
    entry = interop.find(f"fla_{family}")
    config = entry.config(public, "float32")
    module = entry.module(config)
    initialise = jax.jit(params_lib.initialise, static_argnums=0)
    params = initialise(module, jax.random.key(0), ids[:1, :2])
    trainers: dict[str, Any] = {"scanax": Trainer(module, params, ids)}
    for name in peers:
        if all(map(importlib.util.find_spec, PACKAGES[name][family])):
            from . import language_bench_torch as other

            tensors = interop.to_torch(f"fla_{family}", params, public)
            recurrence = other.RECURRENCES[name, family]
            trainers[name] = other.Trainer(config, tensors, ADAMW, recurrence)
    return params, trainers


def markov(vocabulary: int, steps: int, batch: int, tokens: int) -> np.ndarray:
    """[X, B, T + 1] int32: every token has ``SUCCESSORS`` others after it, equally likely."""
    rng = np.random.default_rng(0)
    after = rng.integers(vocabulary, size=(vocabulary, SUCCESSORS))
    choices = rng.integers(SUCCESSORS, size=(tokens, steps, batch))
    row = [rng.integers(vocabulary, size=(steps, batch))]
    for choice in choices:
        row.append(after[row[-1], choice])
    return np.stack(row, axis=-1).astype(np.int32)


def adamw() -> optax.GradientTransformation:
    """AdamW that decays matrices alone."""
    return optax.adamw(**ADAMW, mask=lambda params: jax.tree.map(lambda x: x.ndim >= 2, params))


class Trainer:
    """A model with its optimizer, its compiled step, and what compiling it cost.

    Args of the constructor:
      ids: [B, T + 1] tokens, for their shape.
    """

    def __init__(self, module: Any, params: Any, ids: np.ndarray):
        optimizer = adamw()

        def step(state, ids):
            params, opt_state = state

            def loss(params):
                logits, _ = module.apply({"params": params}, ids[:, :-1])
                return parts_lib.cross_entropy(logits, ids)

            value, grads = jax.value_and_grad(loss)(params)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), value

        self.state = jax.tree.map(jnp.copy, (params, optimizer.init(params)))
        start = time.perf_counter()
        self.compiled = jax.jit(step, donate_argnums=0).lower(self.state, ids).compile()
        memory: Any = self.compiled.memory_analysis()
        self.figures = {
            "compile_seconds": time.perf_counter() - start,
            "temporary_mb": memory.temp_size_in_bytes / 1e6,
        }

    def step(self, ids: np.ndarray) -> float:
        """One update; the loss before it."""
        self.state, loss = self.compiled(self.state, ids)
        jax.block_until_ready(self.state)
        return float(loss)


def compare(family: str, losses: dict[str, list[float]]) -> float | None:
    """The largest relative difference between PyTorch's losses and ours; None without PyTorch.

    Raises:
      Disagreement: if it is above ``AGREEMENT``.
    """
    errors = []
    for name in losses.keys() - {"scanax"}:
        error = np.abs(np.divide(losses[name], losses["scanax"]) - 1)
        wrong = ~(error <= AGREEMENT)  # nan is wrong
        if wrong.any():
            first = int(np.argmax(wrong))
            raise Disagreement(
                f"{family}: the losses with {name} differ by {error[first]:.1e} at step {first},"
                f" more than {AGREEMENT:.0e}: nothing was timed"
            )
        errors.append(float(error.max()))
    return max(errors, default=None)


def timed(calls: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, dict[str, float]]:
    """Median and least milliseconds of every call, all in turn.

    Every turn begins with a call that does not count: it pays for the memory that the library
    before it has given back to the system.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repetitions):
        for name, call in calls.items():
            call()
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {
        name: {"milliseconds": statistics.median(x), "fastest_milliseconds": min(x)}
        for name, x in times.items()
    }


def table(results: list[dict[str, Any]]) -> str:
    """A row for every model and library."""
    head = ["model", "parameters", "library", "ms per step (fastest)", "tokens/s"]
    head += [*(f"{name} / this" for name in PACKAGES), "compile s", "temporary MB"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for result in results:
        times = {row["library"]: row["milliseconds"] for row in result["rows"]}
        for row in result["rows"]:
            time_ms = row["milliseconds"]
            cells = (
                result["family"],
                f"{result['parameters']:,}",
                row["library"],
                f"{time_ms:.0f} ({row['fastest_milliseconds']:.0f})",
                f"{1e3 * result['tokens'] / time_ms:,.0f}",
                *(f"{times[name] / time_ms:.2f}" if name in times else "" for name in PACKAGES),
                f"{row['compile_seconds']:.1f}" if "compile_seconds" in row else "",
                f"{row['temporary_mb']:,.0f}" if "temporary_mb" in row else "",
            )
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parts_table(results: list[dict[str, Any]]) -> str:
    """Milliseconds and share of every part of our step."""
    lines = ["| model | part of our step | ms | share |", "|---|---|---|---|"]
    for result in results:
        ms = {name: part["milliseconds"] for name, part in result["parts"].items()}
        step, layers = result["rows"][0]["milliseconds"], result["layers"]
        times = {
            "embedding, head, loss": ms["ends"],
            "mixer's projections, convolutions, gates": layers * (ms["mixer"] - ms["scan"]),
            "scan": layers * ms["scan"],
            "MLP": layers * ms["mlp"],
            "optimizer": ms["optimizer"],
        }
        times["rest"] = step - sum(times.values())
        for name, part in times.items():
            lines.append(f"| {result['family']} | {name} | {part:.0f} | {part / step:.1%} |")
    return "\n".join(lines)


def _repeating(step: Callable[[np.ndarray], Any], rows: np.ndarray) -> Callable[[], Any]:
    """Calls with one batch after the other, again and again."""
    number = -1

    def call():
        nonlocal number
        number = (number + 1) % len(rows)
        return step(rows[number])

    return call


if __name__ == "__main__":
    define_flags()
    app.run(main)
