"""Throughput of training a DeltaProduct language model on one GPU, beside fla's model.

  python -m scanax.models.language_bench_gpu --out DIR

A step is forward, backward and AdamW, all in bfloat16 (parameters and moments too). Every
implementation has a process of its own, for all of the memory; where a batch does not fit, half of
it is tried. fla's model needs the packages flash-linear-attention, fla-core and transformers.
DIR/gpu_model.json is complete after every implementation.
"""

from collections.abc import Callable
import dataclasses
import inspect
import json
import os
import pathlib
import statistics
import sys
import time
from typing import Any

from absl import app, flags
import jax
import numpy as np

from ..kernels import bench_gpu
from . import interop, language_bench, params as params_lib

STEPS = 5  # enqueued before waiting
FLA = "fla"
WORKER = """
import contextlib
with contextlib.suppress(ImportError):
    import torch
from scanax.models import language_bench_gpu
language_bench_gpu.worker()
"""


def define_flags() -> None:
    """For the command alone: a process that imports this module may have others of these names."""
    flags.DEFINE_integer("hidden_size", 1024, "Width.", lower_bound=1)
    flags.DEFINE_integer("layers", 24, "Blocks.", lower_bound=1)
    flags.DEFINE_integer("heads", 8, "They divide the width.", lower_bound=1)
    flags.DEFINE_integer("vocabulary", 32000, "Tokens that there are.", lower_bound=1)
    flags.DEFINE_list("householder", ["1", "2"], "Steps per token.")
    flags.DEFINE_integer("batch", 8, "Rows; fewer where they do not fit.", lower_bound=1)
    flags.DEFINE_integer("tokens", 4096, "Of a row.", lower_bound=1)
    flags.DEFINE_integer("repetitions", 5, f"Each of {STEPS} steps.", lower_bound=1)
    flags.DEFINE_list("implementations", ["pallas_gpu", "xla"], "Of our scan.")
    flags.DEFINE_bool("peers", True, "Also fla's model.")
    flags.DEFINE_float("budget_seconds", 540.0, "Of all.", lower_bound=1.0)
    flags.DEFINE_string("out", "", "A folder for gpu_model.json.")


def main(argv: list[str]) -> None:
    given = flags.FLAGS
    sizes = (given.hidden_size, given.layers, given.heads, given.vocabulary)
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # before jax starts its backend
    try:
        if len(argv) > 1:
            raise ValueError(f"unexpected argument {argv[1]!r}")
        if not given.out:
            raise ValueError("--out is missing, a folder for the figures")
        reason = bench_gpu.missing(given.implementations)
        if reason is not None:
            raise ValueError(reason)
        models = [
            language_bench.published("delta_product", *sizes, int(steps))
            for steps in given.householder
        ]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    names = [*given.implementations, *([FLA] if given.peers else [])]
    shape = (given.batch, given.tokens)
    deadline = time.monotonic() + given.budget_seconds
    run(pathlib.Path(given.out), models, names, shape, given.repetitions, deadline)


def run(
    out: pathlib.Path,
    models: list[dict[str, Any]],
    names: list[str],
    shape: tuple[int, int],
    repetitions: int,
    deadline: float,
) -> None:
    """Writes and prints the figures of all models and implementations.

    Args:
      models: their published configurations.
      shape: rows and tokens.
      deadline: by ``time.monotonic``; what is left then is skipped.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "gpu_model.json"
    figures: dict[str, Any] = {"device": jax.devices()[0].device_kind, "models": models}
    figures |= {"versions": bench_gpu.versions(), "rows": [], "left_out": []}
    for public in models:
        for name in names:
            row, reason = measure(public, name, shape, repetitions, deadline)
            if row is None:
                what = {"householder": public["num_householder"], "implementation": name}
                figures["left_out"].append({**what, "reason": reason})
                print(f"N = {what['householder']}: {name} left out: {reason}", flush=True)
            else:
                figures["rows"].append(row)
                print(table(figures["rows"]), flush=True)
            path.write_text(json.dumps(figures, indent=2))
    print(f"written to {path}")


def measure(
    public: dict[str, Any], name: str, shape: tuple[int, int], repetitions: int, deadline: float
) -> tuple[dict[str, Any] | None, str]:
    """A row, or None and why; in a process of its own, with the largest batch that fits."""
    batch, tokens = shape
    reason = bench_gpu.SKIPPED
    while time.monotonic() < deadline:
        request = {"public": public, "name": name, "batch": batch, "tokens": tokens}
        request |= {"repetitions": repetitions, "deadline": deadline}
        row, failure, at = None, "", ""
        for event in bench_gpu.events(request, deadline, WORKER):
            if event["event"] == "done":
                row = event["result"]
            elif event["event"] == "failed":
                failure = event["reason"]
            elif event["event"] == "start":
                at = event["entry"]
            else:
                reason = failure or f"{event['reason']} ({at})"
        if row is not None:
            return row, ""
        if not any(x in reason.lower() for x in ("resource_exhausted", "out of memory")):
            return None, reason
        print(f"{name}: {batch} rows do not fit", flush=True)
        if batch == 1:
            return None, reason
        batch //= 2
    return None, reason


def worker() -> None:
    """One row: a request on standard input, events on standard output, as those of the kernels."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print

    def tell(event: str, **more: Any) -> None:
        print(json.dumps({"event": event, **more}), file=channel, flush=True)

    request = json.load(sys.stdin)
    public, name = request["public"], request["name"]
    tell("start", entry="compile")
    try:
        vocabulary = public["vocab_size"]
        rng = np.random.default_rng(0)
        ids = rng.integers(vocabulary, size=(request["batch"], request["tokens"] + 1))
        begin = begin_fla if name == FLA else begin_ours
        start = time.perf_counter()
        parameters, step, wait = begin(public, name, ids.astype(np.int32))
        first = wait(step())
        compiling = time.perf_counter() - start
        wait(step())
        seconds, loss = [], first
        for _ in range(request["repetitions"]):
            if seconds and time.monotonic() > request["deadline"]:
                break
            tell("start", entry=name)
            start = time.perf_counter()
            loss = wait([step() for _ in range(STEPS)][-1])
            seconds.append((time.perf_counter() - start) / STEPS)
    except Exception as error:
        tell("failed", reason=bench_gpu.reason_of(error))
        return
    row = {"householder": public["num_householder"], "implementation": name}
    row |= {"parameters": parameters, "batch": request["batch"], "tokens": request["tokens"]}
    row |= {"milliseconds": 1e3 * statistics.median(seconds), "repetitions": len(seconds)}
    row |= {"tokens_per_second": ids[:, 1:].size / statistics.median(seconds)}
    row |= {"compile_seconds": compiling, "first_loss": first, "last_loss": loss}
    tell("done", result=row)


Begun = tuple[int, Callable[[], Any], Callable[[Any], float]]


def begin_ours(public: dict[str, Any], name: str, ids: np.ndarray) -> Begun:
    """Number of parameters, a step that enqueues and returns its loss, and what waits for one.

    Args:
      ids: [B, T + 1] tokens.
    """
    entry = interop.find("fla_delta_product")
    config = entry.config(public, "bfloat16")
    initialise = jax.jit(params_lib.initialise, static_argnums=0)
    params = initialise(entry.module(config), jax.random.key(0), ids[:1, :2])
    parameters = params_lib.count(params)
    module = entry.module(dataclasses.replace(config, implementation=name))
    trainer = language_bench.Trainer(module, params, ids)
    del params
    rows = jax.device_put(ids)

    def step():
        trainer.state, loss = trainer.compiled(trainer.state, rows)
        return loss

    return parameters, step, float


def begin_fla(public: dict[str, Any], name: str, ids: np.ndarray) -> Begun:
    """The same for fla's model; it shifts labels itself, so that it reads T tokens of a row."""
    del name
    from fla.models import (  # pyright: ignore[reportMissingImports]
        GatedDeltaProductConfig,
        GatedDeltaProductForCausalLM,
    )
    import torch  # pyright: ignore[reportMissingImports]

    known = inspect.signature(GatedDeltaProductConfig.__init__).parameters
    options = {key: value for key, value in public.items() if key in known}
    config = GatedDeltaProductConfig(**options, use_cache=False)
    model = GatedDeltaProductForCausalLM(config).to("cuda", torch.bfloat16).train()
    adamw = language_bench.ADAMW
    options = {"lr": adamw["learning_rate"], "betas": (adamw["b1"], adamw["b2"])}
    options |= {"eps": adamw["eps"], "weight_decay": adamw["weight_decay"]}
    optimizer = torch.optim.AdamW(model.parameters(), **options, fused=True)
    rows = torch.tensor(ids[:, :-1], dtype=torch.int64, device="cuda")

    def step():
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def wait(loss) -> float:
        torch.cuda.synchronize()
        return loss.item()

    return sum(x.numel() for x in model.parameters()), step, wait


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown; the ratios are those of tokens per second."""
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    head = ["N", "parameters", "implementation", "B,T", "ms per step", "tokens/s"]
    head += [*(f"this / {name}" for name in names), "compile s", "loss"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        same = [x for x in rows if x["householder"] == row["householder"]]
        rates = {x["implementation"]: x["tokens_per_second"] for x in same}
        cells = [
            str(row["householder"]),
            f"{row['parameters']:,}",
            row["implementation"],
            f"{row['batch']},{row['tokens']}",
            f"{row['milliseconds']:.1f}",
            f"{row['tokens_per_second']:,.0f}",
            *(f"{row['tokens_per_second'] / rates[x]:.2f}" if x in rates else "" for x in names),
            f"{row['compile_seconds']:.0f}",
            f"{row['first_loss']:.2f} to {row['last_loss']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    define_flags()
    app.run(main)
