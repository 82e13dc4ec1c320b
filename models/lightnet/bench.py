"""What one layer costs: LightNet beside two scans and softmax attention, in one run.

  python -m scanax.models.lightnet.bench [--tokens 256,1024,4096,16384,65536] [--out FILE.json]

Every mixer, without causality and with MD-LRPE, reads the same N tokens, as a row of N (1-D) and
as a square grid (2-D). Repetitions of all are interleaved, so that a busy machine hurts them
alike: quote the ratios, not the times. Memory is the compiler's figure for temporary buffers,
forward and backward. What would need more than --memory_gb is compiled and not run.
"""

from collections.abc import Callable
import json
import math
import statistics
import sys
import time
from typing import Any

from absl import app, flags
import jax
import jax.numpy as jnp

from .. import params as params_lib
from . import lrpe
from .config import LightNetConfig
from .layer import Mixer

MIXERS = ("lightnet", "gla_two_scans", "softmax")


def define_flags() -> None:
    """For the command alone: a process that imports this module may have others of these names."""
    flags.DEFINE_list("tokens", ["256", "1024", "4096", "16384", "65536"], "N, square numbers.")
    flags.DEFINE_integer("width", 128, "Channels.", lower_bound=1)
    flags.DEFINE_integer("heads", 2, "They divide the width.", lower_bound=1)
    flags.DEFINE_integer("repetitions", 5, "Timed calls of each.", lower_bound=1)
    flags.DEFINE_float("memory_gb", 4.0, "Of temporary buffers, at most.")
    flags.DEFINE_string("out", "", "Also write the figures here, as JSON.")


def main(argv: list[str]) -> None:
    given = flags.FLAGS
    try:
        if len(argv) > 1:
            raise ValueError(f"unexpected argument {argv[1]!r}")
        sizes = [_square(text) for text in given.tokens]
        configs = [layer_config(mixer, given.width, given.heads) for mixer in MIXERS]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, float32", end="")
    print(f", one row, {given.width} channels, {given.heads} heads\n")
    rows = []
    for tokens in sizes:
        for grid in ((tokens,), (math.isqrt(tokens),) * 2):
            rows += benchmark(configs, grid, given.repetitions, given.memory_gb)
    print(table(rows))
    if given.out:
        with open(given.out, "w") as file:
            device = jax.devices()[0].device_kind
            json.dump({"jax": jax.__version__, "device": device, "rows": rows}, file, indent=2)


def layer_config(mixer: str, width: int, heads: int) -> LightNetConfig:
    """The published layer with MD-LRPE, and ``mixer`` in its place."""
    return LightNetConfig(
        mixer=mixer,
        hidden_size=width,
        num_hidden_layers=1,
        num_heads=heads,
        head_dim=0,
        scale=0.0,
        output_gate="silu",
        gate_low_rank_dim=max(1, width // heads),
        elementwise_affine=True,
        intermediate_size=0,
        use_short_conv=False,
        conv_size=4,
        tpe="none",
        tpe_share_axes=False,
        use_lrpe=True,
        theta_type=0,
        learn_theta=False,
        norm_eps=1e-6,
        initializer_range=0.02,
        dtype="float32",
        param_dtype="float32",
        remat=False,
        implementation="auto",
    )


def benchmark(
    configs: list[LightNetConfig], grid: tuple[int, ...], repetitions: int, memory_gb: float
) -> list[dict[str, Any]]:
    """Rows for forward and forward+backward of every mixer on one grid."""
    x_1TD = jax.random.normal(jax.random.key(0), (1, math.prod(grid), configs[0].hidden_size))
    rows, calls = [], []
    for config in configs:
        for what, function, arguments in functions(config, x_1TD, lrpe.places(grid)):
            compiled = function.lower(*arguments).compile()
            analysis: Any = compiled.memory_analysis()
            gigabytes = analysis.temp_size_in_bytes / 1e9
            rows.append(
                {
                    "grid": list(grid),
                    "what": what,
                    "mixer": config.mixer,
                    "temporary_mb": 1e3 * gigabytes,
                    "milliseconds": None,
                }
            )
            if gigabytes <= memory_gb:
                calls.append((rows[-1], lambda f=compiled, a=arguments: f(*a), []))
    for number in range(1 + repetitions):
        for _, call, times in calls:
            start = time.perf_counter()
            jax.block_until_ready(call())
            if number:  # the first is a warm-up
                times.append(time.perf_counter() - start)
    for row, _, times in calls:
        row["milliseconds"] = 1e3 * statistics.median(times)
    return rows


def functions(
    config: LightNetConfig, x_1TD, place_1TM
) -> list[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    """What is timed: name, jitted function, arguments; the gradient is in parameters and input."""
    module: Any = Mixer(config, causal=False)
    params = params_lib.initialise(module, jax.random.key(1), x_1TD[:, :2], place_1TM[:, :2])

    def forward(params, x_1TD):
        return module.apply({"params": params}, x_1TD, jnp.asarray(place_1TM))[0]

    gradient = jax.grad(lambda p, x: jnp.sum(jnp.square(forward(p, x))), argnums=(0, 1))
    pairs = (("forward", forward), ("forward+backward", gradient))
    return [(what, jax.jit(function), (params, x_1TD)) for what, function in pairs]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table, with every mixer's time and memory over LightNet's."""
    head = ["grid", "", "mixer", "ms", "us per token", "time / LightNet", "temporary MB"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    ours = {(tuple(r["grid"]), r["what"]): r for r in rows if r["mixer"] == "lightnet"}
    for row in rows:
        mine = ours.get((tuple(row["grid"]), row["what"]), {}).get("milliseconds")
        time_ms, tokens = row["milliseconds"], math.prod(row["grid"])
        cells = (
            " x ".join(map(str, row["grid"])),
            row["what"],
            row["mixer"],
            "not run" if time_ms is None else f"{time_ms:.1f}",
            "" if time_ms is None else f"{1e3 * time_ms / tokens:.2f}",
            "" if time_ms is None or mine is None else f"{time_ms / mine:.2f}",
            f"{row['temporary_mb']:,.1f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _square(text: str) -> int:
    number = int(text) if text.isdigit() else 0
    if number < 4 or math.isqrt(number) ** 2 != number:
        raise ValueError(f"--tokens: {text!r} is not a square number of at least 4")
    return number


if __name__ == "__main__":
    define_flags()
    app.run(main)
