"""What a sampler costs: the loop over steps, the same with a cache for the batch, and events.

  python -m scanax.models.radd.bench [--lengths 64,256,1024] [--batches 1,4,16] [--out FILE.json]

All sample B rows of L tokens from the log-linear schedule with N steps: the plain loop calls the
network in each; the cached one when any row has changed; the third for events alone. Calls are of
the whole batch. What takes longer than --seconds / --repetitions is timed on a part of its steps or
events, and scaled: these figures have a ~, and the cached loop's calls are then their expectation.
Repetitions are interleaved, and the fastest counts. "time / calls" is what a call of the event
sampler costs over a step of the plain loop.
"""

from collections.abc import Callable
import functools
import json
import sys
import time
from typing import Any

from absl import app, flags
import jax
import jax.numpy as jnp
import numpy as np

from .. import params as params_lib
from . import events, rates, steps
from .config import RADDConfig
from .model import RADD
from .network import Network
from .schedules import LogLinear

FIRST = 4  # steps to learn how long one takes
WAYS = ("plain", "cached", "events")


def define_flags() -> None:
    """For the command alone: a process that imports this module may have others of these names."""
    flags.DEFINE_list("lengths", ["64", "256", "1024"], "L, tokens of a row.")
    flags.DEFINE_list("batches", ["1", "4", "16"], "B, rows.")
    flags.DEFINE_list("multiples", ["1", "4", "16"], "N / L, steps per token.")
    flags.DEFINE_integer("layers", 4, "Of the network.", lower_bound=1)
    flags.DEFINE_integer("width", 128, "Of the network; a multiple of 32.", lower_bound=32)
    flags.DEFINE_integer("vocab", 256, "Tokens.", lower_bound=1)
    flags.DEFINE_float("seconds", 20.0, "For a way and size, about.", lower_bound=0.01)
    flags.DEFINE_integer("repetitions", 3, "Of each; the fastest counts.", lower_bound=1)
    flags.DEFINE_string("out", "", "Also write the figures here, as JSON.")


def main(argv: list[str]) -> None:
    given = flags.FLAGS
    try:
        if len(argv) > 1:
            raise ValueError(f"unexpected argument {argv[1]!r}")
        lengths, batches, multiples = (
            _positive(name, getattr(given, name)) for name in ("lengths", "batches", "multiples")
        )
        if given.width % 32:
            raise ValueError(f"--width must be a multiple of 32, got {given.width}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    device = jax.devices()[0].device_kind
    print(
        f"jax {jax.__version__} on {device}, float32, {given.layers} layers of {given.width}",
        end="",
    )
    print(f", {given.vocab} tokens\n")
    print("\n".join(table([])), flush=True)
    rows = []
    network = random_network(given.layers, given.width, given.vocab)
    for length in lengths:
        for batch in batches:
            for multiple in multiples:
                shape = (length, batch, multiple * length)
                rows.append(measure(network, *shape, given.seconds, given.repetitions))
                print(table(rows)[-1], flush=True)
    if given.out:
        with open(given.out, "w") as file:
            json.dump({"jax": jax.__version__, "device": device, "rows": rows}, file, indent=2)


def measure(
    network: Network, length: int, batch: int, n: int, seconds: float, repetitions: int
) -> dict[str, Any]:
    """A row of the table."""
    psi_N = rates.unmask_rates(LogLinear(), n)
    p_N, cdf_N = rates.step_probabilities(psi_N)
    start_BT = jnp.full((batch, length), network.vocab_size, jnp.int32)
    key = jax.random.key(0)
    plan = events.diffusion_plan(key, start_BT == network.vocab_size, cdf_N)
    sample = jax.jit(lambda key, plan: events.sample(network, key, start_BT, plan))

    def loop(caching: str, count: int) -> Callable[[], Any]:
        """The first steps of a loop."""
        part_N = np.append(psi_N[: count - 1], 1.0)
        run = lambda key: steps.sample(network, key, start_BT, part_N, caching=caching)
        return functools.partial(jax.jit(run).lower(key).compile(), key)

    def some_events(count: int) -> Callable[[], Any]:
        """The first events of each row."""
        rank_BT = jnp.where(plan.rank < count, plan.rank, -1)
        return functools.partial(sample, key, events.Plan(rank_BT, jnp.minimum(plan.events, count)))

    makers: dict[str, tuple[Callable, int]] = {
        "plain": (functools.partial(loop, "none"), n),
        "cached": (functools.partial(loop, "batch"), n),
        "events": (some_events, int(plan.events.max())),
    }
    row: dict[str, Any] = {"length": length, "batch": batch, "steps": n}
    calls = {}
    for way, (make, total) in makers.items():
        few = min(FIRST, total)
        call = make(few)
        jax.block_until_ready(call())
        each = _timed(call)[0] / few
        count = int(min(total, max(few, seconds / repetitions / each)))
        calls[way] = make(count)
        row[way] = {"seconds": float("inf"), "part": count / total, "calls": 0}
        jax.block_until_ready(calls[way]())
    for _ in range(repetitions):  # interleaved: a busy machine hurts all alike
        for way, call in calls.items():
            taken, found = _timed(call)
            row[way]["seconds"] = min(row[way]["seconds"], taken / row[way]["part"])
            row[way]["calls"] = int(found.batch_evaluations)
    for way, (_, total) in makers.items():
        if row[way]["part"] < 1:
            expected = rates.expected_batch_evaluations(p_N, length, batch)
            row[way]["calls"] = round(expected) if way == "cached" else total
    row["calls_ratio"] = row["events"]["calls"] / row["plain"]["calls"]
    row["time_ratio"] = row["events"]["seconds"] / row["plain"]["seconds"]
    return row


def random_network(layers: int, width: int, vocab: int) -> Network:
    """RADD with random weights, the last too, which otherwise begin at 0."""
    config = RADDConfig(
        vocab_size=vocab + 1,
        hidden_size=width,
        num_hidden_layers=layers,
        num_heads=width // 32,
        dropout=0.0,
        rope_theta=1e4,
        dtype="float32",
        param_dtype="float32",
        remat=False,
    )
    module: Any = RADD(config)
    params = params_lib.initialise(module, jax.random.key(1), jnp.zeros((1, 2), jnp.int32))
    head = params["lm_head"]
    head["kernel"] = width**-0.5 * jax.random.normal(jax.random.key(2), head["kernel"].shape)
    apply = functools.partial(module.apply, {"params": params})
    part = lambda name: functools.partial(apply, method=name)
    return Network(part("body"), part("head"), vocab)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table."""
    head = ["L", "B", "N", *(f"{way} calls" for way in WAYS), *(f"{way} s" for way in WAYS)]
    head += ["calls: events / plain", "time: events / plain", "time / calls"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [str(row[name]) for name in ("length", "batch", "steps")]
        cells += [str(row[way]["calls"]) for way in WAYS]
        cells += [
            ("~" if row[way]["part"] < 1 else "") + f"{row[way]['seconds']:.3g}" for way in WAYS
        ]
        cells += [f"{row['calls_ratio']:.3f}", f"{row['time_ratio']:.3f}"]
        cells.append(f"{row['time_ratio'] / row['calls_ratio']:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call, and its result."""
    start = time.perf_counter()
    found = jax.block_until_ready(call())
    return time.perf_counter() - start, found


def _positive(name: str, texts: list[str]) -> list[int]:
    if not texts or not all(text.isdigit() and int(text) for text in texts):
        raise ValueError(f"--{name} must be positive integers, got {','.join(texts)!r}")
    return [int(text) for text in texts]


if __name__ == "__main__":
    define_flags()
    app.run(main)
