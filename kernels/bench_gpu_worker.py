"""The process in which the GPU benchmark computes: it may crash or hang, ``bench_gpu.py`` goes on.

Standard input is a request, JSON: "items" in order, and their "deadline" (``time.monotonic``). An
item is a check of ours against float32, the ceilings of the device, or the timing of entries at a
shape.
Standard output has an event a line, JSON: "start" of an entry, "failed" entries, an item "done".
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
import functools
import gc
import json
import os
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import bench_gpu_entries as entries_lib
from .bench_gpu_times import CALLS, THREADS, Tell, healthy, name_of, reason_of, sample, times

AHEAD = 5  # checks that are compiled side by side
# Of checks, whose speed does not matter: trying products out took most of the compiler's time.
CHECKED = {"xla_gpu_autotune_level": 0}
TOLERANCE = 2e-2


def main() -> None:
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print

    def tell(event: str, **more: Any) -> None:
        print(json.dumps({"event": event, **more}), file=channel, flush=True)

    request = json.load(sys.stdin)
    items, deadline = request["items"], request["deadline"]
    checks = [item for item in items if item["kind"] == "check"]
    depth = AHEAD if request["ahead"] else 1
    programs_of = compiled(checks, request["implementation"], tell, depth)
    for item in items:
        if time.monotonic() > deadline:
            break
        if item["kind"] == "check":
            futures = next(programs_of)
            tell("done", result=check(item, futures, functools.partial(tell, "start")))
        elif item["kind"] == "ceilings":
            tell("start", entry="ceilings")
            tell("done", result=ceilings(*request["ceilings"]))
        else:
            tell("done", result=times(item, tell, deadline, request["ahead"]))
        if not healthy():
            sys.exit("the device does not answer any more")
        if "torch" in sys.modules:  # what it keeps is missing to the next
            gc.collect()
            sys.modules["torch"].cuda.empty_cache()


def check_inputs(case: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Float arguments by name, other arguments, and cotangents of the outputs (float32)."""
    operation, shape, extras = case["operation"], tuple(case["shape"]), case["extras"]
    batch, tokens, heads, key_dim, value_dim = shape[:5]
    arrays: dict[str, Any]
    arrays, do = entries_lib.inputs(operation, shape, seed=0)
    keys = jax.random.split(jax.random.key(1), 5)
    normal = lambda i, *dims: jax.random.normal(keys[i], (batch, *dims))
    full, channels = (heads, key_dim, value_dim), (heads, key_dim)
    if operation == "delta_product" and "gate" not in extras:
        del arrays["g"]
    state, dstate = normal(0, *full), normal(1, *full)
    if operation == "additive_scan":
        state, dstate = (state, normal(2, *channels)), (dstate, normal(3, *channels))
    if "state" in extras:
        arrays["initial_state"] = state
    if "factor" in extras:
        arrays["k_factor"] = normal(4, tokens, heads, key_dim).astype(jnp.bfloat16)
    options = {}
    if "segments" in extras:  # of 50 tokens, also within a chunk
        options["segment_ids"] = jnp.broadcast_to(jnp.arange(tokens) // 50, (batch, tokens))
    return arrays, options, (do.astype(jnp.float32), dstate)


def programs(case: dict[str, Any], implementation: str) -> tuple[Any, Any]:
    """Ours and the float32 one: (arguments, cotangents) -> outputs and gradients; lowered."""
    arrays, options, cotangents = check_inputs(case)

    def program(name, arrays, cotangents):
        function = functools.partial(entries_lib.OPERATIONS[case["operation"]], **options)
        outputs, pull = jax.vjp(lambda x: function(**x, implementation=name), arrays)
        cotangents = jax.tree.map(lambda d, x: d.astype(x.dtype), cotangents, outputs)
        return {"outputs": outputs, "gradients": pull(cotangents)[0]}

    lower = lambda name, arrays: jax.jit(program, static_argnums=0).lower(name, arrays, cotangents)
    with jax.default_matmul_precision("highest"):
        wide = lower("xla", wide_copies(arrays))
    return lower(implementation, arrays), wide


def wide_copies(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def compiled(
    cases: list[dict[str, Any]], implementation: str, tell: Tell, depth: int
) -> Iterator[list[Future]]:
    """The ``programs`` of one case after the other; of ``depth`` of them side by side."""
    pool, ready, left = ThreadPoolExecutor(THREADS), deque(), deque(cases)
    while left or ready:
        while left and len(ready) < depth:
            tell("start", entry="compile" if depth > 1 else name_of(left[0]))
            try:
                lowered = programs(left.popleft(), implementation)
                ready.append([pool.submit(program.compile, CHECKED) for program in lowered])
            except Exception as error:
                failure = Future()
                failure.set_exception(error)
                ready.append([failure])
        yield ready.popleft()


def check(case: dict[str, Any], futures: list[Future], start: Tell) -> dict[str, Any]:
    """Largest differences of outputs and gradients from the float32 ones, over the largest entry.

    Args:
      futures: of both ``programs``, compiled.
      start: called when they are.
    """
    result: dict[str, Any] = {"case": name_of(case), "passed": False, "errors": {}, "reason": ""}
    try:
        ours, wide = (future.result() for future in futures)
        start(entry=name_of(case))
        arrays, _, cotangents = check_inputs(case)
        got, expected = ours(arrays, cotangents), wide(wide_copies(arrays), cotangents)
        paths = jax.tree_util.tree_leaves_with_path(jax.block_until_ready(expected))
        for (path, b), a in zip(paths, jax.tree.leaves(jax.block_until_ready(got)), strict=True):
            a, b = np.asarray(a, np.float32), np.asarray(b)
            error = np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)
            result["errors"][jax.tree_util.keystr(path, simple=True, separator=".")] = float(error)
    except Exception as error:
        return {**result, "reason": reason_of(error)}
    wrong = [name for name, error in result["errors"].items() if not error <= TOLERANCE]
    reason = f"{', '.join(wrong)} above {TOLERANCE}" if wrong else ""
    return {**result, "passed": not wrong, "reason": reason}


def ceilings(copied: int, size: int) -> dict[str, float]:
    """Rates of the device: a pass over ``copied`` float32, and a bfloat16 product of ``size``."""
    x = jnp.ones(copied, jnp.float32)
    a = jax.random.normal(jax.random.key(0), (size, size)).astype(jnp.bfloat16)
    rates = {}
    for name, function, arrays, work in (
        ("bytes_per_second", jax.jit(lambda x: x + 1), (x,), 8.0 * copied),
        ("flops_per_second", jax.jit(jnp.matmul), (a, a), 2.0 * size**3),
    ):
        call = functools.partial(function, *arrays)
        jax.block_until_ready(call())
        seconds = [sample(call, jax.block_until_ready, CALLS) for _ in range(5)]
        rates[name] = work / statistics.median(seconds)
    return rates
