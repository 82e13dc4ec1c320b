"""Which implementation is the fastest at which size here: writes ``defaults.json``.

  python -m scanax.kernels.bench_defaults

Times forward+backward of every implementation of the scans that this device runs, over lengths and
widths of heads, in float32, or in bfloat16 on GPUs, whose kernels take nothing else; and puts the
fastest of each size in the place of what the file says of this kind of device.
``implementation=None`` then takes the entry of the nearest size (``dispatch.py``).
"""

import functools
import json
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


def define_flags() -> None:
    """For the command alone: a process that imports this module may have others of these names."""
    flags.DEFINE_list("lengths", ["1", "4", "32", "256", "2048"], "T, tokens.")
    flags.DEFINE_list("widths", ["16", "64", "128"], "K = V.")
    flags.DEFINE_integer("repetitions", 5, "Timed calls of each.", lower_bound=1)
    flags.DEFINE_string("out", str(FILE), "The file that is updated.")


def main(argv: list[str]) -> None:
    given = flags.FLAGS
    try:
        if len(argv) > 1:
            raise ValueError(f"unexpected argument {argv[1]!r}")
        lengths = [bench.parse_shape("T", text)[0] for text in given.lengths]
        widths = [bench.parse_shape("K", text)[0] for text in given.widths]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    device = jax.devices()[0].device_kind
    sizes = [(tokens, width) for tokens in lengths for width in widths]
    rows = []
    for operation in ("delta_product", "additive_scan"):
        for tokens, width in sizes:
            rows.append(row(operation, device, tokens, width, given.repetitions))
            print(json.dumps(rows[-1]))
    path = pathlib.Path(given.out)
    others = json.loads(path.read_text()) if path.exists() else []
    rows = [x for x in others if x["device"] != device] + rows
    path.write_text("[\n" + ",\n".join(f"  {json.dumps(x)}" for x in rows) + "\n]\n")


def row(operation: str, device: str, tokens: int, width: int, repetitions: int) -> dict[str, Any]:
    """The fastest implementation at a size, and the times of the others over its own."""
    what = bench.OPERATIONS[operation]
    shape = (max(1, 2048 // tokens), tokens, HEADS, width, width)
    arguments = what.inputs((*shape, 1) if operation == "delta_product" else shape, True)
    names = what.implementations()
    if jax.default_backend() == "gpu":
        arguments = jax.tree.map(lambda x: x.astype(jnp.bfloat16), arguments)
        names = [*names, "pallas_gpu"] if width in WIDTHS else names
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
