"""Is the cost linear in T? Time and memory of the scans over lengths, in one picture.

  python -m scanax.kernels.bench_linear --picture FILE.png [--out FILE.json]

One row of T tokens through the platform's default implementation, forward and forward+backward:
delta_product with a gate for every N of --steps, and additive_scan. Memory is the compiler's figure
for temporary buffers. In the picture both axes are logarithmic and the grey lines have slope 1: a
curve along them is linear in T. What would need more than --memory_gb, arguments and results
included, is compiled and not run.
"""

import functools
import statistics
import sys
from typing import Any

from absl import app, flags
import jax
from matplotlib.figure import Figure
import numpy as np

from . import bench

QUANTITIES = {"milliseconds": "time, ms", "temporary_mb": "temporary memory, MB"}


def define_flags() -> None:
    """For the command alone: a process that imports this module may have others of these names."""
    lengths = [str(1024 << i) for i in range(8)]
    flags.DEFINE_list("lengths", lengths, "T, tokens.")
    flags.DEFINE_list("steps", ["1", "2", "3", "4"], "N of delta_product.")
    flags.DEFINE_string("heads", "2,64,64", "H,K,V.")
    flags.DEFINE_integer("repetitions", 3, "Timed calls of each.", lower_bound=1)
    flags.DEFINE_float("memory_gb", 8.0, "At most.")
    flags.DEFINE_string("picture", None, "The picture is written here.")
    flags.DEFINE_string("out", "", "Also write the figures here, as JSON.")


def main(argv: list[str]) -> None:
    given = flags.FLAGS
    try:
        if len(argv) > 1:
            raise ValueError(f"unexpected argument {argv[1]!r}")
        lengths = sorted(bench.parse_shape("T", text)[0] for text in given.lengths)
        steps = [bench.parse_shape("N", text)[0] for text in given.steps]
        heads = bench.parse_shape("H,K,V", given.heads)
        if not given.picture:
            raise ValueError("--picture is missing")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(
        f"jax {jax.__version__} on {jax.devices()[0].device_kind}, float32, one row, H,K,V = ",
        end="",
    )
    print(f"{given.heads}: us per token, and KB of temporary buffers per token\n")
    rows = []
    for tokens in lengths:
        rows += benchmark(tokens, heads, steps, given.repetitions, given.memory_gb)
    print(table(rows))
    draw(rows, given.picture)
    if given.out:
        bench.save(given.out, rows, heads=heads)


def benchmark(
    tokens: int, heads: tuple[int, ...], steps: list[int], repetitions: int, memory_gb: float
) -> list[dict[str, Any]]:
    """Rows for forward and forward+backward of every scan on one row of ``tokens``."""
    scans: list[tuple[str, str, tuple[int, ...]]]
    scans = [(f"delta_product N={n}", "delta_product", (1, tokens, *heads, n)) for n in steps]
    scans.append(("additive_scan", "additive_scan", (1, tokens, *heads)))
    rows = []
    for name, key, shape in scans:
        operation = bench.OPERATIONS[key]
        arguments = operation.inputs(shape, True)
        calls = []
        for what, function in zip(bench.WHATS, bench.functions(operation, None), strict=True):
            compiled = function.lower(*arguments).compile()
            memory: Any = compiled.memory_analysis()
            parts = (memory.argument_size_in_bytes, memory.output_size_in_bytes)
            rows.append(
                {
                    "name": name,
                    "what": what,
                    "tokens": tokens,
                    "milliseconds": None,
                    "temporary_mb": memory.temp_size_in_bytes / 1e6,
                    "total_mb": (memory.temp_size_in_bytes + sum(parts)) / 1e6,
                }
            )
            if rows[-1]["total_mb"] <= 1e3 * memory_gb:
                calls.append((rows[-1], functools.partial(bench.seconds, compiled, *arguments), []))
        for number in range(1 + repetitions):
            for _, call, times in calls:
                value = call()
                if number:  # the first is a warm-up
                    times.append(value)
        for row, _, times in calls:
            row["milliseconds"] = 1e3 * statistics.median(times)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Per scan and length: microseconds per token (KB per token), as a Markdown table.

    The exponents of T are fitted to the upper half of the lengths: 1 is linear.
    """
    lengths = sorted({row["tokens"] for row in rows})
    head = ["scan", "", *(f"T = {tokens:,}" for tokens in lengths), "exponent of time (memory)"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (name, what), curve in curves(rows).items():
        cells = []
        for row in curve:
            time, memory = row["milliseconds"], 1e3 * row["temporary_mb"] / row["tokens"]
            spent = "not run" if time is None else f"{1e3 * time / row['tokens']:.2f}"
            cells.append(f"{spent} ({memory:.1f})")
        time, memory = (exponent(curve, quantity) for quantity in QUANTITIES)
        cells.append(f"{time:.2f} ({memory:.2f})")
        lines.append("| " + " | ".join([name, what, *cells]) + " |")
    return "\n".join(lines)


def exponent(curve: list[dict[str, Any]], quantity: str) -> float:
    """a of quantity ~ T^a, over the upper half of the lengths that have it; nan if they are few."""
    points = [(row["tokens"], row[quantity]) for row in curve if row[quantity]]
    points = points[(len(points) - 1) // 2 :]
    if len(points) < 2:
        return float("nan")
    tokens, values = np.log(points).T
    return float(np.polyfit(tokens, values, 1)[0])


def curves(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """(scan, forward or forward+backward) -> its rows, by length."""
    result: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["tokens"]):
        result.setdefault((row["name"], row["what"]), []).append(row)
    return result


def draw(rows: list[dict[str, Any]], path: str) -> None:
    """Time above, memory below; forward left, forward+backward right."""
    figure = Figure(figsize=(10, 8), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True, sharey="row")
    lengths = sorted({row["tokens"] for row in rows})
    for axes_of_row, (quantity, label) in zip(grid, QUANTITIES.items(), strict=True):
        values = [row[quantity] for row in rows if row[quantity]] or [1.0]
        for axes, what in zip(axes_of_row, bench.WHATS, strict=True):
            for (name, of), curve in curves(rows).items():
                if of == what:
                    points = [(row["tokens"], row[quantity]) for row in curve if row[quantity]]
                    axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
            ends = [lengths[0], lengths[-1]]
            for power in range(-20, 21):  # those that cross the curves are seen
                guide = [values[0] * 4.0**power * tokens / ends[0] for tokens in ends]
                axes.plot(ends, guide, color="grey", linewidth=0.6, alpha=0.5, zorder=0)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_ylim(min(values) / 1.5, max(values) * 1.5)
            axes.grid(alpha=0.2)
            axes.set_title(f"{what}: {label}", fontsize="medium")
    for axes in grid[1]:
        axes.set_xlabel("T, tokens")
    for axes in grid[:, 0]:
        axes.set_ylabel(axes.get_title().split(": ")[1])
    grid[1, 0].legend(fontsize="small")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    define_flags()
    app.run(main)
