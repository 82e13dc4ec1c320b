"""Which implementation is the fastest at which size here: writes ``defaults.json``.

  python -m scanax.kernels.bench_defaults

Times forward+backward of every implementation that this device runs, of the scans over lengths and
widths of heads, and of the convolutions over pixels or tokens and channels; in float32, or in
bfloat16 on GPUs, whose kernels take nothing else. The fastest of each size is put in the place of
what the file says of this kind of device. ``implementation=None`` then takes the entry of the
nearest size (``dispatch.py``).
"""

import functools
import json
import math
import pathlib
import statistics
import sys
from typing import Any

from absl import app, flags
import jax
import jax.numpy as jnp

from . import bench
from .hopper_scans import WIDTHS

FILE = pathlib.Path(__file__).with_name("defaults.json")
HEADS = 4
SCAN = ["1", "4", "32", "256", "2048"], ["16", "64", "128"]
TAPS = 4  # of a short convolution
SIZES = {  # lengths and widths: tokens and channels of a head or row, or pixels and channels
    "delta_product": SCAN,
    "additive_scan": SCAN,
    "convolution_3x3": (["16", "64", "256", "1024", "4096"], ["4", "16", "64", "192", "512"]),
    "short_convolution": (["1", "4", "32", "256", "2048"], ["64", "256", "1024"]),
}


def define_flags() -> None:
    """For the command alone: a process that imports this module may have others of these names."""
    flags.DEFINE_list("operations", list(SIZES), "Those that are measured.")
    flags.DEFINE_list("lengths", [], "T, tokens, or pixels, a square number; none for the usual.")
    flags.DEFINE_list("widths", [], "K = V, or channels; none for the usual.")
    flags.DEFINE_integer("repetitions", 5, "Timed calls of each.", lower_bound=1)
    flags.DEFINE_string("out", str(FILE), "The file that is updated.")


def main(argv: list[str]) -> None:
    given = flags.FLAGS
    try:
        if len(argv) > 1:
            raise ValueError(f"unexpected argument {argv[1]!r}")
        unknown = set(given.operations) - set(SIZES)
        if unknown:
            raise ValueError(f"--operations: {sorted(unknown)} are not among {list(SIZES)}")
        sizes = [
            (operation, bench.parse_shape("T", tokens)[0], bench.parse_shape("K", width)[0])
            for operation in given.operations
            for tokens in given.lengths or SIZES[operation][0]
            for width in given.widths or SIZES[operation][1]
        ]
        for operation, tokens, _ in sizes:
            if operation == "convolution_3x3" and math.isqrt(tokens) ** 2 != tokens:
                raise ValueError(f"--lengths: {tokens} pixels are no square image")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    device = jax.devices()[0].device_kind
    rows = []
    for operation, tokens, width in sizes:
        rows.append(row(device, operation, tokens, width, given.repetitions))
        print(json.dumps(rows[-1]))
    path = pathlib.Path(given.out)
    others = json.loads(path.read_text()) if path.exists() else []
    measured = lambda x: x["device"] == device and x["operation"] in given.operations
    rows = [x for x in others if not measured(x)] + rows
    path.write_text("[\n" + ",\n".join(f"  {json.dumps(x)}" for x in rows) + "\n]\n")


def row(device: str, operation: str, tokens: int, width: int, repetitions: int) -> dict[str, Any]:
    """The fastest implementation at a size, and the times of the others over its own."""
    what = bench.OPERATIONS[operation]
    shape: bench.Shape
    if operation == "convolution_3x3":
        side = math.isqrt(tokens)
        shape = (max(1, 1024 // tokens), side, side, width, width)
    elif operation == "short_convolution":
        shape = (max(1, 2048 // tokens), tokens, width, TAPS)
    else:
        steps = (1,) if operation == "delta_product" else ()
        shape = (max(1, 2048 // tokens), tokens, HEADS, width, width, *steps)
    arguments = what.inputs(shape, True)
    names = what.implementations()
    if jax.default_backend() == "gpu":
        arguments = jax.tree.map(lambda x: x.astype(jnp.bfloat16), arguments)
        names = [*names, "pallas_gpu"] if SIZES[operation] is SCAN and width in WIDTHS else names
    calls = {
        name: functools.partial(bench.seconds, bench.functions(what, name)[1], *arguments)
        for name in names
    }
    times = {name: [] for name in calls}
    for _ in range(repetitions):
        for name, call in calls.items():
            times[name].append(bench.settled(call))  # the first call compiles
    median = {name: statistics.median(values) for name, values in times.items()}
    fastest = min(median, key=lambda name: median[name])
    over = {name: round(value / median[fastest], 2) for name, value in median.items()}
    size = {"operation": operation, "device": device, "tokens": tokens, "width": width}
    return {**size, "fastest": fastest, "time_over_fastest": over}


if __name__ == "__main__":
    define_flags()
    app.run(main)
