"""``python -m scanax.kernels.bench --suite gpu``: both scans on one Hopper GPU, unattended.

First the outputs, states and gradients of the kernels are checked against float32, then they are
timed beside our plain JAX and the packages of ``bench_gpu_entries.py``. What computes is another
process (``bench_gpu_worker.py``), so that a kernel that crashes or never ends costs its own figures
alone: it is recorded, left out of what follows for the operation, and the rest goes on.
DIR/gpu.json and the table are complete after every shape.

Times are those of a call among 20 that are enqueued before waiting, median over repetitions in
which all entries take turns, on three sets of inputs. The floor is the larger of two times: bytes
that must move, at the rate of a copy of the same run, and the FLOPs of the definition
(``bench.py``), at the rate of a large bfloat16 matrix product. Per token and head, the forward
reads q and N keys and values and writes o; with the backward it reads them and do once more and
writes their gradients. States that a kernel keeps are left out of it.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
import contextlib
import importlib.metadata
import json
import os
import pathlib
import queue
import subprocess
import sys
import threading
import time
from typing import Any

import jax

from . import bench, hopper
from .bench_gpu_entries import PEERS as PEERS
from .bench_gpu_times import name_of, reason_of as reason_of

SHAPES = ((8, 4096, 8, 128, 128), (1, 32768, 16, 128, 128))  # B,T,H,K,V
STALL = 90.0  # seconds without an event after which a process is ended
SLOW_STALL = 180.0  # of those that compile many kernels
SLOW = ("fla", "compile")
GRACE = 15.0  # seconds for what runs when the time is over
SKIPPED = "skipped: the time was over"
ENDED = "the process ended"
PACKAGES = ("jax", "jaxlib", "torch", "triton", "fla-core", "jax-linear-attention")
# torch before jax, whose libraries for CUDA are then those that torch was built with.
WORKER = """
import contextlib
with contextlib.suppress(ImportError):
    import torch
from scanax.kernels import bench_gpu_worker
bench_gpu_worker.main()
"""

Item = dict[str, Any]
Shape = tuple[int, ...]


def _case(operation: str, shape: Shape, *extras: str) -> Item:
    return {"kind": "check", "operation": operation, "shape": shape, "extras": extras}


_DELTA, _ADDITIVE = "delta_product", "additive_scan"
# B,T,H,K,V,N and B,T,H,K,V; the most common first, as time may run out. A single row of 8192 tokens
# is divided into segments.
CASES = (
    _case(_DELTA, (2, 197, 2, 128, 128, 1), "gate"),
    _case(_DELTA, (2, 197, 2, 128, 128, 2), "gate"),
    _case(_ADDITIVE, (2, 197, 2, 128, 128)),
    _case(_DELTA, (1, 8192, 1, 128, 128, 1), "gate"),
    _case(_ADDITIVE, (1, 8192, 1, 128, 128)),
    _case(_DELTA, (2, 130, 2, 128, 64, 3), "gate"),
    _case(_DELTA, (2, 130, 2, 64, 64, 1)),
    _case(_DELTA, (2, 197, 2, 64, 128, 2), "gate", "segments", "state"),
    _case(_ADDITIVE, (2, 197, 2, 64, 128), "segments", "state"),
    _case(_DELTA, (1, 8192, 1, 128, 128, 2), "gate", "state"),
    _case(_DELTA, (2, 130, 2, 64, 64, 4), "gate"),
    _case(_DELTA, (2, 67, 2, 128, 128, 4), "state"),
    _case(_DELTA, (2, 67, 2, 128, 128, 3), "gate", "segments"),
    _case(_ADDITIVE, (2, 130, 2, 128, 64), "factor"),
    _case(_ADDITIVE, (1, 8192, 1, 64, 64), "segments", "state"),
)


def timed(shapes: Collection[Shape], entries: Collection[str]) -> list[Item]:
    """What is timed, the most important first; shapes are B,T,H,K,V."""
    operations = [(_DELTA, (1,)), (_DELTA, (2,)), (_ADDITIVE, ()), (_DELTA, (3,))]
    return [
        {"kind": "time", "operation": name, "shape": [*shape, *steps], "entries": [*entries]}
        | {"without": []}
        for name, steps in operations
        for shape in shapes
    ]


def suite(
    out: str,
    shapes: Collection[Shape],
    implementations: Sequence[str],
    peers: Collection[str],
    seconds: float,
) -> int:
    """The whole suite in ``seconds``; the first implementation is checked. The exit status.

    Raises:
      ValueError: if it cannot run here.
    """
    if not out:
        raise ValueError("--suite gpu needs --out, a folder for its figures")
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # before jax starts its backend
    reason = missing(implementations)
    if reason is not None:
        raise ValueError(reason)
    work = timed(shapes, [*implementations, *peers])
    sizes = (1 << 28, 8192) if jax.default_backend() == "gpu" else (1 << 22, 512)
    return run(pathlib.Path(out), implementations[0], CASES, work, seconds, sizes)


def missing(implementations: Collection[str]) -> str | None:
    """Why the suite cannot run here, or None; plain JAX runs anywhere."""
    if "pallas_gpu" not in implementations:
        return None
    reason = hopper.unavailable()
    if jax.default_backend() != "gpu":
        reason = f"jax {jax.__version__} sees no GPU here: its backend is {jax.default_backend()!r}"
    if reason is None:
        return None
    return f"--suite gpu needs a Hopper GPU: {reason}. --implementations=xla runs without one"


def run(
    out: pathlib.Path,
    implementation: str,
    cases: Collection[Item],
    work: Collection[Item],
    seconds: float,
    ceilings: tuple[int, int],
) -> int:
    """Checks, then times; returns the exit status: 1 if a check failed.

    Args:
      out: folder for gpu.json.
      implementation: that is checked.
      cases: its checks.
      work: what is timed.
      seconds: for all; at most a third of it for the checks.
      ceilings: numbers that are copied, and rows of a matrix.
    """
    start = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {"device": jax.devices()[0].device_kind, "versions": versions()}
    figures |= {"ceilings": None, "correctness": [], "rows": [], "left_out": []}
    request = {"implementation": implementation, "ceilings": ceilings}

    def on_check(item: Item, result: dict[str, Any]) -> None:
        figures["correctness"].append(result)
        worst = max(result["errors"].values(), default=float("nan"))
        failure = result["reason"] if skipped(result) else f"FAILED, {result['reason']}"
        verdict = "passed" if result["passed"] else failure
        print(f"{result['case']}: {worst:.1e} {verdict}", flush=True)
        save(out, figures)

    def on_time(item: Item, result: Any) -> None:
        if item["kind"] == "ceilings":
            figures["ceilings"] = result
            print(" ".join(f"{name} {value:.3e}" for name, value in result.items()), flush=True)
        else:
            rows = compare(result, figures["ceilings"])
            print(table(rows), flush=True)
            figures["rows"] += rows
        save(out, figures)

    def on_failure(item: Item, entry: str, reason: str) -> None:
        if item["kind"] == "check":
            lost = {"case": name_of(item), "passed": False, "errors": {}, "reason": reason}
            return on_check(item, lost)
        what = {"item": label(item), "entry": entry, "reason": reason}
        figures["left_out"].append(what)
        print(f"{what['item']}: {entry} left out: {reason}", flush=True)
        save(out, figures)

    print(f"{figures['device']}, {figures['versions']}", flush=True)
    conduct([*cases], request, start + seconds / 3, on_check, on_failure)
    conduct([{"kind": "ceilings"}, *work], request, start + seconds, on_time, on_failure)
    print(f"\n{table(figures['rows'])}\n\nwritten to {save(out, figures)}", flush=True)
    failed = [x["case"] for x in figures["correctness"] if not x["passed"] and not skipped(x)]
    print(f"{len(failed)} checks failed, {time.monotonic() - start:.0f} s", flush=True)
    return 1 if failed else 0


def skipped(result: dict[str, Any]) -> bool:
    return result["reason"] == SKIPPED


def label(item: Item) -> str:
    return "ceilings" if item["kind"] == "ceilings" else name_of(item)


def conduct(
    items: list[Item],
    request: dict[str, Any],
    deadline: float,
    on_done: Callable[[Item, Any], None],
    on_failure: Callable[[Item, str, str], None],
) -> None:
    """Hands the items to a process, and to another one if it dies or is silent.

    What such a process was at is a failure: a check, or forward or backward of an entry, which is
    not timed again for the operation.
    """
    ahead = True
    while items and time.monotonic() < deadline:
        at, progress = "", False
        left = {"items": items[:], "deadline": deadline, "ahead": ahead}
        reason = ""
        for event in events(request | left, deadline):
            if event["event"] == "start":
                at = event["entry"]
            elif event["event"] == "done":
                on_done(items.pop(0), event["result"])
                at, progress = "", True
            elif event["event"] == "failed":
                on_failure(items[0], event["entry"], event["reason"])
            else:
                reason = event["reason"]
        if not items or time.monotonic() > deadline:
            break
        crashed_check = items[0]["kind"] == "check" and at and reason.startswith(ENDED)
        if ahead and (at == "compile" or crashed_check):  # it may have been the compiler of another
            ahead = False
            continue
        if items[0]["kind"] == "time" and at and at not in items[0]["without"]:
            on_failure(items[0], at, reason)
            for item in items:
                if item["operation"] == items[0]["operation"]:
                    item["without"].append(at)
        elif not progress or at:
            on_failure(items.pop(0), at, reason)
    for item in items:
        on_failure(item, "all of it", SKIPPED)


def events(
    request: dict[str, Any], deadline: float, program: str = WORKER
) -> Iterator[dict[str, Any]]:
    """Of a process that works on the request; the last is "end", with a reason.

    It is ended if it is silent for ``STALL`` seconds, or some time after the deadline.
    """
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "FLA_FLASH_QLA": "0"}
    command, pipe = [sys.executable, "-c", program], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        lines: queue.Queue[str | None] = queue.Queue()

        def read(stream: Any) -> None:
            for line in stream:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, args=(process.stdout,), daemon=True).start()
        with contextlib.suppress(BrokenPipeError), process.stdin as stdin:  # pyright: ignore
            stdin.write(json.dumps(request))
        stall = SLOW_STALL  # it begins with imports
        try:
            while True:
                left = deadline + GRACE - time.monotonic()
                try:
                    line = lines.get(timeout=max(0.0, min(stall, left)))
                except queue.Empty:
                    late = SKIPPED if left < stall else f"no answer within {stall:.0f} s"
                    yield {"event": "end", "reason": late}
                    return
                if line is None:
                    status = process.wait()
                    yield {"event": "end", "reason": f"{ENDED} with status {status}"}
                    return
                event = json.loads(line)
                stall = SLOW_STALL if event.get("entry", "").startswith(SLOW) else STALL
                yield event
        finally:
            process.kill()


def compare(rows: list[dict[str, Any]], ceilings: dict[str, float] | None) -> list[dict[str, Any]]:
    """The rows with their floor, and the times of the others over theirs."""
    result = []
    for row in rows:
        both = row["what"] != "forward"
        floor_ms = None
        if ceilings is not None:
            flops = bench.OPERATIONS[row["operation"]].flops(tuple(row["shape"])) * (
                3 if both else 1
            )
            seconds = (
                traffic(row["operation"], tuple(row["shape"]), both) / ceilings["bytes_per_second"],
                flops / ceilings["flops_per_second"],
            )
            floor_ms = 1e3 * max(seconds)
        over = None if floor_ms is None else row["milliseconds"] / floor_ms
        same = [x for x in rows if x["what"] == row["what"]]
        ratios = {x["implementation"]: x["milliseconds"] / row["milliseconds"] for x in same}
        result.append({**row, "floor_milliseconds": floor_ms, "over_floor": over})
        result[-1]["other_over_this"] = ratios
    return result


def traffic(operation: str, shape: Shape, both: bool) -> float:
    """Bytes in bfloat16 that a forward, or that and a backward, must move."""
    batch, tokens, heads, key_dim, value_dim, *steps = shape
    count = steps[0] if operation == _DELTA else 1
    arguments, o = key_dim + count * (key_dim + value_dim), value_dim
    return 2.0 * batch * tokens * heads * (3 * arguments + 2 * o if both else arguments + o)


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown. "differs": how far o is from the first row's at most, over its largest."""
    names = list(dict.fromkeys(name for row in rows for name in row["other_over_this"]))
    head = ["B,T,H,K,V,N", "", "implementation", "ms (fastest)", "do_bench ms"]
    head += [*(f"{name} / this" for name in names), "over floor", "differs", "compile s"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    show = lambda value, digits: "" if value is None else f"{value:{digits}}"
    for row in rows:
        cells = [
            f"{row['operation']} {','.join(map(str, row['shape']))}",
            row["what"],
            row["implementation"],
            f"{row['milliseconds']:.3f} ({row['fastest_milliseconds']:.3f})",
            show(row["do_bench_milliseconds"], ".3f"),
            *(show(row["other_over_this"].get(name), ".2f") for name in names),
            show(row["over_floor"], ".1f"),
            show(row["difference"], ".1e"),
            f"{row['compile_seconds']:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def save(out: pathlib.Path, figures: dict[str, Any]) -> pathlib.Path:
    """At once: an interrupted run leaves the figures before."""
    path, new = out / "gpu.json", out / "gpu.json.new"
    new.write_text(json.dumps(figures, indent=2))
    return new.replace(path)
