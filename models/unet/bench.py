"""What a U-Net costs: a training step and sampling, beside the same network in PyTorch.

  python -m scanax.models.unet.bench [--preset slimflow_15.7m] [--batch 8] [--out FILE.json]

Both sides have the same weights, compute in float32 on the same cores, and must agree before
anything is timed. A training step is the l2 loss of the velocity, its gradient, and Adam; sampling
is Euler's method from noise. There is no dropout. PyTorch runs in both of its memory layouts, if it
is there. Repetitions of all are interleaved, so that a busy machine hurts them alike: quote the
ratios, not the times. Memory is the compiler's figure for temporary buffers.
"""

from collections.abc import Callable
import dataclasses
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

from .. import params as params_lib
from .config import NCSNppConfig
from .interop import ncsnpp_table
from .ncsnpp import LEAST_TIME, NCSNpp
from .presets import preset

LEARNING_RATE = 2e-4
AGREEMENT = 1e-3  # of the velocities, relative to the largest


def define_flags() -> None:
    """For the command alone: a process that imports this module may have others of these names."""
    flags.DEFINE_string("preset", "slimflow_15.7m", "Without pyramids or filters: DDPM++.")
    flags.DEFINE_integer("image_size", 32, "Height and width.", lower_bound=1)
    flags.DEFINE_integer("model_channels", 0, "Another width; 0: the preset's.", lower_bound=0)
    flags.DEFINE_integer("batch", 8, "Images.", lower_bound=1)
    flags.DEFINE_integer("steps", 4, "Of Euler's method.", lower_bound=1)
    flags.DEFINE_integer("repetitions", 5, "Timed calls of each.", lower_bound=1)
    flags.DEFINE_bool("torch", True, "Beside PyTorch, if it is installed.")
    flags.DEFINE_string("out", "", "Also write the figures here, as JSON.")


def main(argv: list[str]) -> None:
    given = flags.FLAGS
    try:
        if len(argv) > 1:
            raise ValueError(f"unexpected argument {argv[1]!r}")
        changes = {"image_size": given.image_size, "dropout": 0.0}
        if given.model_channels:
            changes["model_channels"] = given.model_channels
        config = comparable(preset(given.preset, **changes))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    rows = benchmark(config, given.batch, given.steps, given.repetitions, given.torch)
    cores = len(os.sched_getaffinity(0))
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, {cores} cores, float32")
    print(f"{given.preset}: {rows[0]['parameters']:,} parameters, {given.batch} images of", end=" ")
    print(f"{config.image_size} x {config.image_size}\n\n{table(rows)}")
    if given.out:
        with open(given.out, "w") as file:
            device = jax.devices()[0].device_kind
            json.dump({"jax": jax.__version__, "device": device, "rows": rows}, file, indent=2)


def comparable(c: Any) -> NCSNppConfig:
    """``c``, if it is what ``bench_torch`` computes."""
    plain = {"fir": False, "progressive": "none", "progressive_input": "none"}
    plain |= {"embedding_type": "positional", "skip_rescale": True, "scale_by_sigma": False}
    if not isinstance(c, NCSNppConfig) or any(getattr(c, k) != v for k, v in plain.items()):
        raise ValueError("--preset must be a DDPM++ without pyramids and filters")
    return c


def benchmark(
    c: NCSNppConfig, batch: int, steps: int, repetitions: int, with_torch: bool
) -> list[dict[str, Any]]:
    """A row for every library's training step and sampling."""
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (batch, c.image_size, c.image_size, c.channels)
    x_BHWC, target_BHWC = (jax.random.normal(key, shape) for key in keys[:2])
    t_B = jax.random.uniform(keys[2], (batch,), minval=LEAST_TIME)
    module: Any = NCSNpp(dataclasses.replace(c, init_scale=1.0))  # else the output is 0
    params = params_lib.initialise(module, keys[3], x_BHWC[:1], t_B[:1])
    arrays = (x_BHWC, t_B, target_BHWC)
    rows, calls = [], []
    for what, function in ours(module, params, arrays, steps):
        row = {"what": what, "library": "scanax", "parameters": params_lib.count(params)}
        rows.append({**row, **function.figures})
        calls.append(function)
    if with_torch and importlib.util.find_spec("torch"):
        for what, library, call in theirs(c, module, params, arrays, steps):
            rows.append({"what": what, "library": library})
            calls.append(call)
    times = [[] for _ in calls]
    for _ in range(repetitions):
        for call, spent in zip(calls, times, strict=True):
            call()  # the first finds memory and caches as another one left them
            start = time.perf_counter()
            call()
            spent.append(time.perf_counter() - start)
    for row, spent in zip(rows, times, strict=True):
        row["milliseconds"] = 1e3 * statistics.median(spent)
        row["fastest_milliseconds"] = 1e3 * min(spent)
    return sorted(rows, key=lambda row: row["what"], reverse=True)


class Compiled:
    """A compiled function of a state that it replaces, with what compiling it cost."""

    def __init__(self, function: Callable[..., Any], state: Any, *arguments: Any):
        start = time.perf_counter()
        self.compiled = jax.jit(function, donate_argnums=0).lower(state, *arguments).compile()
        memory: Any = self.compiled.memory_analysis()
        self.figures = {
            "compile_seconds": time.perf_counter() - start,
            "temporary_mb": memory.temp_size_in_bytes / 1e6,
        }
        self.state, self.arguments = jax.tree.map(jnp.copy, state), arguments

    def __call__(self) -> None:
        self.state = jax.block_until_ready(self.compiled(self.state, *self.arguments))


def ours(module: Any, params: Any, arrays: Any, steps: int) -> list[tuple[str, Compiled]]:
    """The two programs."""
    optimizer = optax.adam(LEARNING_RATE)

    def train(state, x, t, target):
        params, opt_state = state

        def loss(params):
            return jnp.mean(jnp.square(module.apply({"params": params}, x, t) - target))

        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state)
        return optax.apply_updates(params, updates), opt_state

    def sample(x, params):
        def step(i, x):
            t_B = jnp.full(x.shape[:1], i / steps * (1 - LEAST_TIME) + LEAST_TIME, x.dtype)
            return x + module.apply({"params": params}, x, t_B) / steps

        return jax.lax.fori_loop(0, steps, step, x)

    trained = Compiled(train, (params, optimizer.init(params)), *arrays)
    return [("training step", trained), ("sampling", Compiled(sample, arrays[0], params))]


def theirs(
    c: NCSNppConfig, module: Any, params: Any, arrays: Any, steps: int
) -> list[tuple[str, str, Callable[[], None]]]:
    """What is timed in PyTorch; a ValueError if its velocities differ from ours."""
    from .. import layout
    from . import bench_torch

    tensors = layout.dump(ncsnpp_table(c), params)
    calls, want = [], np.asarray(jax.jit(module.apply)({"params": params}, *arrays[:2]))
    for library, last in (("PyTorch", False), ("PyTorch, channels last", True)):
        trainer = bench_torch.Trainer(c, tensors, [*map(np.asarray, arrays)], last, LEARNING_RATE)
        error = np.abs(trainer.velocity() - want).max() / np.abs(want).max()
        if error > AGREEMENT:
            raise ValueError(f"{library} computes something else: error {error:.1e}")
        calls.append(("training step", library, trainer.train))
        calls.append(("sampling", library, lambda t=trainer: t.sample(steps, LEAST_TIME)))
    return calls


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table, with the times over those of PyTorch's faster layout."""
    head = ["", "library", "ms (fastest)", "time / PyTorch", "compile s", "temporary MB"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    fastest: dict[str, float] = {}
    for row in rows:
        if row["library"] != "scanax":
            time_ms = fastest.get(row["what"], row["milliseconds"])
            fastest[row["what"]] = min(time_ms, row["milliseconds"])
    for row in rows:
        base = fastest.get(row["what"])
        cells = (
            row["what"],
            row["library"],
            f"{row['milliseconds']:.1f} ({row['fastest_milliseconds']:.1f})",
            "" if base is None else f"{row['milliseconds'] / base:.3f}",
            f"{row['compile_seconds']:.1f}" if "compile_seconds" in row else "",
            f"{row['temporary_mb']:,.1f}" if "temporary_mb" in row else "",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    define_flags()
    app.run(main)
