"""What a token costs in decoding, against the memory traffic that no method avoids.

  python -m scanax.kernels.bench_decode [--shapes "2048,8,64,64;1,8,64,64"] [--out FILE.json]

A shape is B,H,K,V; delta_product_step runs for every N of --steps, with a gate, and additive_step
once. A call takes the state through --tokens tokens, one after another, in one compiled loop which
owns the state. The floor is the time to read and write the state once per token at the bandwidth
at which the same run multiplies a large array by a number, in place: it binds states that do not
fit the caches, while smaller ones can go below it. Repetitions of all are interleaved.
"""

from collections.abc import Callable
import functools
import statistics
import sys
from typing import Any

from absl import app, flags
import jax
import jax.numpy as jnp

from . import additive_step, bench, delta_product_step

Shape = tuple[int, ...]


def define_flags() -> None:
    """For the command alone: a process that imports this module may have others of these names."""
    flags.DEFINE_string("shapes", "2048,8,64,64;1,8,64,64", "B,H,K,V; several separated by ';'.")
    flags.DEFINE_list("steps", ["1", "2", "4"], "N of delta_product.")
    flags.DEFINE_integer("tokens", 8, "Of one call.", lower_bound=1)
    flags.DEFINE_integer("copied_mb", 256, "Size of the large array.", lower_bound=1)
    flags.DEFINE_integer("repetitions", 7, "Timed calls of each.", lower_bound=1)
    flags.DEFINE_string("out", "", "Also write the figures here, as JSON.")


def main(argv: list[str]) -> None:
    given = flags.FLAGS
    try:
        if len(argv) > 1:
            raise ValueError(f"unexpected argument {argv[1]!r}")
        shapes = [bench.parse_shape("B,H,K,V", text) for text in given.shapes.split(";")]
        steps = [bench.parse_shape("N", text)[0] for text in given.steps]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, float32\n")
    bandwidth, rows = benchmark(shapes, steps, given.tokens, given.copied_mb, given.repetitions)
    print(f"{table(rows)}\n\n{bandwidth / 1e9:.1f} GB/s read and written in place")
    if given.out:
        bench.save(given.out, rows, bytes_per_second=bandwidth)


def benchmark(
    shapes: list[Shape], steps: list[int], tokens: int, copied_mb: int, repetitions: int
) -> tuple[float, list[dict[str, Any]]]:
    """The bandwidth in bytes per second, and a row for every step function at every shape."""
    calls = [going_on(lambda a: (0.999 * a, None), jnp.ones(copied_mb * 250_000))]
    rows = []
    for shape in shapes:
        for count in (*steps, None):
            step, state, inputs = decoding(shape, count, tokens)
            rows.append(
                {
                    "shape": list(shape),
                    "step": "additive" if count is None else f"delta_product N={count}",
                    "state_mb": sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6,
                }
            )
            calls.append(going_on(functools.partial(jax.lax.scan, step), state, inputs))
    for call in calls:
        call()  # compiles
    times = [[] for _ in calls]
    for _ in range(repetitions):
        for call, values in zip(calls, times, strict=True):
            values.append(bench.seconds(call))
    whole, *medians = (statistics.median(values) for values in times)
    bandwidth = 2 * 1e6 * copied_mb / whole
    for row, value, values in zip(rows, medians, times[1:], strict=True):
        floor = 2e6 * row["state_mb"] / bandwidth
        row["microseconds"] = 1e6 * value / tokens
        row["fastest_microseconds"] = 1e6 * min(values) / tokens
        row["over_floor"] = value / tokens / floor
    return bandwidth, rows


def going_on(function: Callable[..., Any], state: Any, *others: Any) -> Callable[[], Any]:
    """Calls of function(state, *others) -> (state, o), each from the state of the one before."""
    compiled = jax.jit(function, donate_argnums=0)
    held = [state]

    def call():
        held[0], o = compiled(held[0], *others)
        return held[0], o

    return call


def decoding(shape: Shape, steps: int | None, tokens: int):
    """(step, state, inputs [T, ...]) with step(state, one token's inputs) -> (state, o).

    ``steps`` is N of delta_product, None for the additive scan.
    """
    batch, heads, key_dim, value_dim = shape
    widths = (batch, tokens, heads, key_dim, value_dim)
    state: Any = jnp.zeros(shape)
    function: Callable[..., Any]
    if steps is None:
        inputs = bench.OPERATIONS["additive_scan"].inputs(widths, True)
        state = state, jnp.full((batch, heads, key_dim), -jnp.inf)
        function = additive_step
    else:
        inputs = bench.OPERATIONS["delta_product"].inputs((*widths, steps), True)
        function = delta_product_step
    inputs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), inputs)
    return lambda state, token: function(*token, state)[::-1], state, inputs


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    head = ["B,H,K,V", "step", "state MB", "us per token (fastest)", "over memory floor"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = (
            ",".join(map(str, row["shape"])),
            row["step"],
            f"{row['state_mb']:.1f}",
            f"{row['microseconds']:.1f} ({row['fastest_microseconds']:.1f})",
            f"{row['over_floor']:.2f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    define_flags()
    app.run(main)
