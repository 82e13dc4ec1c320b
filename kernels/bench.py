"""Times the implementations of an operation side by side, in one run.

  python -m scanax.kernels.bench --shapes "4,2048,4,64,64,1;4,2048,4,64,64,2" [--out FILE.json]
  python -m scanax.kernels.bench --operation additive_scan --shapes "4,2048,4,64,64"
  python -m scanax.kernels.bench --operation expert_mlp --shapes "2048,352,352,16,2"
  python -m scanax.kernels.bench --operation convolution_3x3 --shapes "8,32,32,96,96"
  python -m scanax.kernels.bench --operation short_convolution --shapes "4,1024,512,4"
  python -m scanax.kernels.bench --suite gpu --out DIR
  python -m scanax.kernels.bench --suite gpu_model --out DIR

A shape is B,T,H,K,V,N for delta_product, B,T,H,K,V for additive_scan, T,D,F,E,J for expert_mlp
(experts with ReLU and biases; tokens choose at random), B,H,W,I,O for convolution_3x3, and B,T,D,W
for short_convolution with SiLU.
Repetitions of all implementations are interleaved, so that a busy machine hurts them alike: quote
the ratios, not the times. The GEMM floor is the time that the operation's FLOPs would take at the
rate of a large float32 matrix product of the same run.
Implementations of other packages run beside ours where they are installed (``peers.py``), after
their outputs have been compared with ours. jax-linear-attention needs an interpreter of its own:
--jla_python names the one that has it.
FLOPs are those of the definition, per token and head: delta_product has 4 K V for each Householder
step (read and write of the state) and 4 K V for decay and read, additive_scan 3 K V for decay and
write and 2 K V for the read; expert_mlp has 4 D F per token and choice, convolution_3x3 18 I O per
pixel, short_convolution 2 W D per token; backward counted as twice the forward. For expert_mlp,
whose implementations differ in it, there is the compiler's count as well, and its figure for
temporary buffers; of a scan the compiler counts one turn.
"""

from collections.abc import Callable, Mapping
import contextlib
import functools
import json
import statistics
import subprocess
import sys
from typing import Any

from absl import app, flags
import jax
import jax.numpy as jnp
import numpy as np

from . import peers
from .bench_operations import OPERATIONS, Operation, Shape

GEMM_SIZE = 2048
WHATS = ("forward", "forward+backward")


def define_flags() -> None:
    """For the command alone: a process that imports this module may have others of these names."""
    flags.DEFINE_enum(
        "operation",
        "delta_product",
        list(OPERATIONS),
        "What is timed.",
    )
    flags.DEFINE_string("shapes", "", "Of the operation; several separated by ';'.")
    flags.DEFINE_bool("gated", True, "delta_product: with a log decay per token.")
    flags.DEFINE_integer("repetitions", 7, "Timed calls of each.", lower_bound=1)
    flags.DEFINE_bool("peers", True, "Also time other packages' implementations.")
    flags.DEFINE_list(
        "without", [], "Those left out: the gradients of torch's are slow in long rows."
    )
    flags.DEFINE_string("jla_python", "", "An interpreter with jax-linear-attention: times it too.")
    flags.DEFINE_string("out", "", "Also write the figures here, as JSON; a folder of a suite.")
    flags.DEFINE_enum(
        "suite",
        None,
        ["gpu", "gpu_model"],
        "Instead, on one GPU: checks and times of the scans (bench_gpu), or the throughput of a"
        " language model (scanax.models.language_bench_gpu, whose other flags are its own).",
    )
    flags.DEFINE_list("implementations", ["pallas_gpu", "xla"], "Ours, of the suite; checks one.")
    flags.DEFINE_float("budget_seconds", 540.0, "Of the suite.", lower_bound=1.0)


def main(argv: list[str]) -> None:
    given = flags.FLAGS
    try:
        if len(argv) > 1:
            raise ValueError(f"unexpected argument {argv[1]!r}")
        if given.suite:
            sys.exit(_gpu_suite(given) if given.suite == "gpu" else _gpu_model_suite(given))
        operation = OPERATIONS[given.operation]
        texts = (given.shapes or operation.shapes).split(";")
        shapes = [parse_shape(operation.dimensions, text) for text in texts]
        others = peers.installed(given.operation, given.jla_python) if given.peers else {}
        for name in given.without:
            if others.pop(name, None) is None:
                raise ValueError(f"--without: {name!r} is not a peer that would run here")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, float32\n")
    options = (given.gated, given.repetitions, others)
    rows = [row for shape in shapes for row in benchmark(operation, shape, *options)]
    print(table(operation, rows))
    if given.out:
        save(given.out, rows)


def _gpu_suite(given: Any) -> int:
    from . import bench_gpu  # it imports this file

    shapes = [parse_shape("B,T,H,K,V", text) for text in given.shapes.split(";") if text]
    return bench_gpu.suite(
        given.out,
        shapes or bench_gpu.SHAPES,
        given.implementations,
        [name for name in bench_gpu.PEERS if given.peers and name not in given.without],
        given.budget_seconds,
    )


def _gpu_model_suite(given: Any) -> int:
    """In a process of its own: the kernels know nothing of models."""
    command = [sys.executable, "-m", "scanax.models.language_bench_gpu", f"--out={given.out}"]
    command += [f"--budget_seconds={given.budget_seconds}", f"--peers={given.peers}"]
    command += [f"--implementations={','.join(given.implementations)}"]
    return subprocess.run(command, check=False).returncode


def parse_shape(dimensions: str, text: str) -> Shape:
    """ "B,T,H,K,V,N", "4,2048,4,64,64,1" -> (4, 2048, 4, 64, 64, 1)."""
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    count = 1 + dimensions.count(",")
    if len(numbers) != count or min(numbers) < 1:
        raise ValueError(f"{text!r} is not a shape: {count} positive integers {dimensions}")
    return numbers


def save(path: str, rows: list[dict[str, Any]], **more: Any) -> None:
    """Writes figures as JSON, with what they were measured on."""
    about = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
    with open(path, "w") as file:
        json.dump({**about, **more, "rows": rows}, file, indent=2)


def benchmark(
    operation: Operation,
    shape: Shape,
    gated: bool,
    repetitions: int,
    others: Mapping[str, peers.Maker],
) -> list[dict[str, Any]]:
    """Rows for forward and forward+backward of every implementation at one shape.

    Raises:
      RuntimeError: if another package's outputs are not ours to 1e-3 of the largest.
    """
    arguments = operation.inputs(shape, gated)
    a = jnp.ones((GEMM_SIZE, GEMM_SIZE), jnp.float32)
    gemm = jax.jit(lambda a: jnp.matmul(a, a, precision="highest"))
    calls: dict[tuple[str, str], Callable[[], float]]
    calls = {("gemm", ""): functools.partial(seconds, gemm, a)}
    compiled = {}
    for name in operation.implementations():
        for what, function in zip(WHATS, functions(operation, name), strict=True):
            calls[what, name] = functools.partial(seconds, function, *arguments)
            compiled[what, name] = function
    with contextlib.ExitStack() as running:
        arrays = [None if x is None else np.asarray(x) for x in arguments] if others else []
        made = {name: running.enter_context(peer(*arrays)) for name, peer in others.items()}
        for name, peer in made.items():
            for what, call in zip(WHATS, (peer.forward, peer.both), strict=True):
                calls[what, name] = call
        first = {key: call() for key, call in calls.items()}
        ours = np.asarray(compiled["forward", "xla"](*arguments)[0]) if others else np.zeros(0)
        for name, peer in made.items():
            error = np.abs(peer.outputs() - ours).max() / np.abs(ours).max()
            if not error < 1e-3:
                raise RuntimeError(f"{name} and ours differ by {error:.2g} of the largest output")
        times = {key: [] for key in calls}
        for _ in range(repetitions):
            for key, call in calls.items():
                times[key].append(settled(call))
    median = {key: statistics.median(values) for key, values in times.items()}

    rate = 2 * GEMM_SIZE**3 / median["gemm", ""]
    rows = []
    for (what, name), value in median.items():
        if what == "gemm":
            continue
        work = operation.flops(shape) * (1 if what == "forward" else 3)
        rows.append(
            {
                "shape": list(shape),
                "gated": gated,
                "what": what,
                "implementation": name,
                "milliseconds": 1e3 * value,
                "fastest_milliseconds": 1e3 * min(times[what, name]),
                "compile_seconds": first[what, name],
                "gflops": work / 1e9,
                "gemm_gflops_per_second": rate / 1e9,
                "over_floor": value / (work / rate),
                "baseline_over_this": median[what, operation.baseline] / value,
                "peer_over_this": {other: median[what, other] / value for other in others},
            }
        )
        if operation.counted:
            rows[-1] |= costs(compiled[what, name], arguments)
    return rows


def settled(call: Callable[[], float]) -> float:
    """The second of two calls: the first finds memory and caches as another one left them."""
    call()
    return call()


def costs(function: Any, arguments: tuple[Any, ...]) -> dict[str, float]:
    """What the compiler says of a jitted function."""
    program = function.lower(*arguments).compile()
    memory: Any = program.memory_analysis()
    return {
        "compiled_gflops": program.cost_analysis()["flops"] / 1e9,
        "temporary_mb": memory.temp_size_in_bytes / 1e6,
    }


def functions(operation: Operation, implementation: str | None):
    """Compiled forward, and compiled gradient of sum(o^2) in every argument that is real."""

    def forward(*arguments):
        return operation.function(*arguments, implementation=implementation)

    def loss(arguments):
        return jnp.sum(jnp.square(forward(*arguments)[0]))

    gradient = jax.value_and_grad(loss, allow_int=True)
    return jax.jit(forward), jax.jit(lambda *arguments: gradient(arguments))


def seconds(function: Callable[..., Any], *arguments: Any) -> float:
    """What one call takes."""
    return peers.seconds(lambda: jax.block_until_ready(function(*arguments)))


def table(operation: Operation, rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    others = list(rows[0]["peer_over_this"]) if rows else []
    head = [operation.dimensions, "", "implementation", "GFLOP", "ms (fastest)", "over GEMM floor"]
    head += [f"{name} / this" for name in (operation.baseline, *others)]
    head += ["compiled / GFLOP", "temporary MB"] if operation.counted else []
    head += ["first call s"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [
            ",".join(map(str, row["shape"])) + ("" if row["gated"] else " ungated"),
            row["what"],
            row["implementation"],
            f"{row['gflops']:.2f}",
            f"{row['milliseconds']:.1f} ({row['fastest_milliseconds']:.1f})",
            f"{row['over_floor']:.1f}",
            f"{row['baseline_over_this']:.2f}",
            *(f"{row['peer_over_this'][name]:.2f}" for name in others),
        ]
        if operation.counted:
            ratio = row["compiled_gflops"] / row["gflops"]
            cells += [f"{ratio:.2f}", f"{row['temporary_mb']:.1f}"]
        lines.append("| " + " | ".join([*cells, f"{row['compile_seconds']:.1f}"]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    define_flags()
    app.run(main)
