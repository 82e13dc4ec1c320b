"""Compiles the TPU kernels without a TPU, and keeps their length within a budget.

  pip install -e '.[tpu]'
  python -m scanax.kernels.tpu_budget [--chips v5e,v5p,v6e] [--only ""] [--update]

libtpu compiles for chips that are not there and tells how many bundles (very long instructions, one
a cycle) the schedule of a kernel has. That is not a time, for it leaves out what waits for memory,
but it is the same in every run of one libtpu and ranks variants of a kernel. Counts are given per
head and 64 tokens, and compared with ``tpu_budget.json``: a kernel that does not compile, or that
is more than 5 % longer than its budget, is an error. ``--update`` writes the counts there instead.
Another libtpu than that of the budget schedules otherwise: then only compilation is checked.
"""

import collections
from collections.abc import Iterator
import concurrent.futures
import functools
import importlib.metadata
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

from absl import app, flags
import jax
from jax.experimental import topologies
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from .additive_scan import api as additive_api, pallas_tpu as additive_tpu
from .delta_product import api as delta_api, tpu_layout as delta_tpu

BUDGET = pathlib.Path(__file__).with_name("tpu_budget.json")
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
TOKENS, HEADS, ROWS = 1024, 8, 2  # of a device
TOLERANCE = 1.05


class Case(NamedTuple):
    """One kernel: what is compiled, with K = V = width."""

    operation: str
    direction: str
    dtype: str
    width: int
    steps: int  # N; 1 for the additive scan

    def __str__(self) -> str:
        return " ".join(map(str, self))


def cases() -> Iterator[Case]:
    """All that are checked; gated, on each of the chips."""
    for dtype, width in itertools.product(("bfloat16", "float32"), (64, 128)):
        for direction in ("forward", "backward"):
            for steps in (1, 2, 3):
                yield Case("delta_product", direction, dtype, width, steps)
            yield Case("additive_scan", direction, dtype, width, 1)


def define_flags() -> None:
    """For the command alone: a process that imports this module may have others of these names."""
    flags.DEFINE_list("chips", list(TOPOLOGIES), "To compile for.")
    only = "Kernels whose line in the table has these words; all of them take twenty minutes."
    flags.DEFINE_string("only", "bfloat16 128", only)
    flags.DEFINE_bool("update", False, "Write the counts as the new budget.")
    flags.DEFINE_string("chip", "", "Of a process that this command starts.")


def main(argv: list[str]) -> None:
    given = flags.FLAGS
    chosen = [case for case in cases() if given.only in str(case)]
    if given.chip:
        compile_all(given.chip, chosen)
        return
    unknown = [chip for chip in given.chips if chip not in TOPOLOGIES]
    if len(argv) > 1 or unknown or not chosen:
        known = f"chips are {', '.join(TOPOLOGIES)}" if unknown else "there is no such argument"
        known = known if chosen else f"kernels are {'; '.join(map(str, cases()))}"
        print(f"error: {[*unknown, *argv[1:], given.only][0]!r}: {known}", file=sys.stderr)
        sys.exit(2)
    try:
        libtpu = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        print("error: this needs libtpu: pip install -e '.[tpu]'", file=sys.stderr)
        sys.exit(2)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(functools.partial(compiled, only=given.only), given.chips)
        counts = dict(zip(given.chips, found, strict=True))
    budget = json.loads(BUDGET.read_text()) if BUDGET.exists() else {"libtpu": "", "bundles": {}}
    print(table(counts))
    if given.update:
        bundles = budget["bundles"] if budget["libtpu"] == libtpu else {}
        for chip, kernels in counts.items():
            bundles[chip] = {**bundles.get(chip, {}), **kernels}
        BUDGET.write_text(json.dumps({"libtpu": libtpu, "bundles": bundles}, indent=2) + "\n")
        return
    if budget["libtpu"] != libtpu:
        print(f"\nlibtpu {libtpu}; the budget is of {budget['libtpu']}: compiled, not compared")
        return
    problems = over_budget(counts, budget["bundles"])
    print("\n".join(["", *problems]) if problems else "\nwithin the budget")
    sys.exit(1 if problems else 0)


def over_budget(counts: dict[str, dict[str, float]], budget: dict[str, Any]) -> list[str]:
    """A line for each kernel that is longer than its budget, or has none."""
    problems = []
    for chip, kernels in counts.items():
        for case, bundles in kernels.items():
            allowed = budget.get(chip, {}).get(case)
            if allowed is None:
                problems.append(f"{chip} {case}: no budget; --update writes one")
            elif bundles > TOLERANCE * allowed:
                problems.append(f"{chip} {case}: {bundles:.0f} bundles, budget {allowed:.0f}")
    return problems


def compiled(chip: str, only: str) -> dict[str, float]:
    """Bundles per head and 64 tokens of the cases, from a process of its own.

    libtpu takes its options when it is loaded, and can only be loaded for one kind of chip.

    Raises:
      RuntimeError: if a kernel does not compile.
    """
    with tempfile.TemporaryDirectory() as folder:
        dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        environment = {
            **os.environ,
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "JAX_PLATFORMS": "cpu",
            "LIBTPU_INIT_ARGS": dump,
            "SCANAX_BUNDLES": folder,
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5e-4",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_WORKER_ID": "0",
        }
        command = [sys.executable, "-m", "scanax.kernels.tpu_budget"]
        command += [f"--chip={chip}", f"--only={only}"]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{chip}: a kernel does not compile:\n{run.stderr[-4000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def compile_all(chip: str, chosen: list[Case]) -> None:
    """Compiles cases for a chip and prints the counts; the process has libtpu's options."""
    folder = pathlib.Path(os.environ["SCANAX_BUNDLES"])
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip])
    mesh = Mesh(np.array(topology.devices), ("x",))
    counts, seen = {}, set()
    for case in chosen:
        function, arguments, trips, heads_and_chunks = kernel(case, mesh)
        function.lower(*arguments).compile()
        files = set(folder.glob(f"*{case.operation}*final_bundles.txt")) - seen
        seen |= files
        programs = [file for file in files if "analysis" not in file.name]
        longest = max(executed(file.read_text(), trips) for file in programs)
        counts[str(case)] = round(longest / heads_and_chunks, 1)
    print(json.dumps(counts))


def executed(program: str, trips: int) -> int:
    """Bundles of one grid step, given how often a step goes through the loops in it.

    A line of the listing is a bundle, with a > for every loop around it; the grid is the first.
    """
    depths = [
        len(found)
        for found in re.findall(r"(?m)^\s*0x[0-9a-f]+\s*(?:[A-Z]{2})?\s*:\s*(>*)", program)
    ]
    return sum(1 if depth < 2 else trips for depth in depths if depth)


def kernel(case: Case, mesh: Mesh):
    """A kernel to compile.

    Returns:
      The function and its arguments; how often a grid step goes through its loop over heads; and
      the number of heads times chunks of 64 tokens in a grid step.
    """
    devices = mesh.size
    array = lambda spec, dtype, *shape: jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(mesh, spec)
    )
    rows, later = PartitionSpec("x"), PartitionSpec(None, "x")
    batch = ROWS * devices
    given = functools.partial(array, rows, jnp.dtype(case.dtype), batch, TOKENS)
    wide = functools.partial(array, rows, jnp.float32, batch)
    width, steps = case.width, case.steps
    if case.operation == "delta_product":
        stride = {1: 128, 2: 64, 3: 32}[steps]
        q, k = given(HEADS, width), given(steps, HEADS, width)
        beta, g = wide(TOKENS, steps, HEADS), wide(TOKENS, HEADS)
        state = wide(HEADS, width, width)
        starts = array(later, jnp.float32, TOKENS // stride, *state.shape)
        inputs = (q, k, k, beta, g)
        backend = delta_api.BACKENDS["pallas_tpu"]
        forward, backward = (*inputs, state, None), (*inputs, None, starts, state, q, state)
    else:
        stride, q = 64, given(HEADS, width)
        state = wide(HEADS, width, width), wide(HEADS, width)
        starts = tuple(array(later, jnp.float32, TOKENS // stride, *x.shape) for x in state)
        backend = additive_api.BACKENDS["pallas_tpu"]
        forward = (q, q, q, None, state, None)
        backward = (q, q, q, None, None, starts, state, q, state)
    ahead = case.direction == "forward"
    function = backend.forward if ahead else backend.backward
    arguments = forward if ahead else backward
    options = {"scale": width**-0.5, "chunk": None, "stride": stride}
    local = jax.shard_map(
        functools.partial(function, **options),
        mesh=mesh,
        in_specs=jax.tree.map(lambda x: x.sharding.spec, arguments),
        out_specs=(rows, rows, later) if ahead else rows,
        check_vma=False,
    )
    trips, heads = 1, delta_tpu.GROUP * min(steps, 2)
    if case.operation == "additive_scan":
        heads = additive_tpu.ROWS
        trips = heads // additive_tpu.TOGETHER[getattr(jnp, case.dtype)]
    return jax.jit(local), arguments, trips, heads * stride / 64


def table(counts: dict[str, dict[str, float]]) -> str:
    """Bundles per head and 64 tokens, as a Markdown table."""
    rows = collections.defaultdict(dict)
    for chip, kernels in counts.items():
        for case, bundles in kernels.items():
            rows[case][chip] = f"{bundles:.0f}"
    head = ["kernel dtype K=V N", *counts]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for case, row in rows.items():
        lines.append("| " + " | ".join([case, *(row.get(chip, "") for chip in counts)]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    define_flags()
    app.run(main)
