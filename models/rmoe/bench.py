"""What a router costs: the paper's small models with different routers, in one run.

  python -m scanax.models.rmoe.bench [--sizes "6,264;8,352"] [--out FILE.json]

A size is L,D: layers, and the width of the residual stream and of an expert; all have 16 experts, 2
for each token, and 8 heads. What is timed is the gradient of the loss with its balance, on random
tokens. Repetitions of all routers of a size are interleaved, so that a busy machine hurts them
alike: quote the ratios to the linear router, not the times. Memory is the compiler's figure for
temporary buffers. The router's share is the compiler's count of FLOPs, forward and backward, of the
router of one layer, over that of the whole program; there the compiler counts one turn of the loop
over layers, so that it is one layer, the embedding and the head.
"""

from collections.abc import Callable
import json
import statistics
import sys
import time
from typing import Any

from absl import app, flags
import jax
import jax.numpy as jnp

from .. import params as params_lib
from . import losses, router
from .config import RMoESeqConfig
from .moe import STATISTICS
from .seq import RMoESeqLM

ROUTERS: dict[str, dict[str, Any]] = {
    "linear": {},
    "gru": {"router_cell": "gru"},
    "rnn": {"router_cell": "rnn"},
    "lstm": {"router_cell": "lstm"},
    "mlp": {"router_head": "mlp", "router_head_dim": 256},
    "hyper": {"router_head": "hyper", "router_head_dim": 256},
    "xmoe": {"router_head": "xmoe"},
    "cosine": {"router_head": "cosine"},
}


def define_flags() -> None:
    """For the command alone: a process that imports this module may have others of these names."""
    flags.DEFINE_string("sizes", "6,264;8,352", "L,D; several separated by ';'.")
    flags.DEFINE_integer("rows", 4, "Of the batch.", lower_bound=1)
    flags.DEFINE_integer("tokens", 256, "Of a row; as many before them are seen.", lower_bound=2)
    flags.DEFINE_multi_enum("router", [*ROUTERS], [*ROUTERS], "Beside the linear one.")
    flags.DEFINE_integer("repetitions", 5, "Timed calls of each.", lower_bound=1)
    flags.DEFINE_string("out", "", "Also write the figures here, as JSON.")


def main(argv: list[str]) -> None:
    given = flags.FLAGS
    try:
        if len(argv) > 1:
            raise ValueError(f"unexpected argument {argv[1]!r}")
        chosen = [name for name in ROUTERS if name in ("linear", *given.router)]
        make = lambda text, name: model_config(*_size(text), given.tokens, **ROUTERS[name])
        sizes = [{name: make(text, name) for name in chosen} for text in given.sizes.split(";")]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, float32", end="")
    print(f", {given.rows} rows of {given.tokens} tokens\n")
    rows = [
        row
        for size in sizes
        for row in benchmark(size, given.rows, given.tokens, given.repetitions)
    ]
    print(table(rows))
    if given.out:
        with open(given.out, "w") as file:
            device = jax.devices()[0].device_kind
            json.dump({"jax": jax.__version__, "device": device, "rows": rows}, file, indent=2)


def model_config(layers: int, width: int, span: int, **changes) -> RMoESeqConfig:
    """The paper's model of a size on bytes, with a linear router but for ``changes``."""
    values: dict[str, Any] = {
        "vocab_size": 205,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_heads": 8,
        "intermediate_size": width,
        "num_experts": 16,
        "experts_per_token": 2,
        "router_cell": "none",
        "router_memory": "full",
        "router_projector": True,
        "router_dim": 128,
        "router_head": "linear",
        "router_head_dim": 16,
        "router_residual": 0.0,
        "router_residual_detach": False,
        "router_residual_cumulative": False,
        "router_bias": True,
        "router_normalise": True,
        "capacity_factor": 0.0,
        "capacity_policy": "score",
        "balance_form": "layer_sum",
        "balance_coefficient": 0.01,
        "z_coefficient": 0.0,
        "router_balance_rate": 0.0,
        "norm_eps": 1e-5,
        "dtype": "float32",
        "param_dtype": "float32",
        "remat": False,
        "implementation": "auto",
        "span": span,
        "dropout": 0.0,
    }
    return RMoESeqConfig(**{**values, **changes})


def benchmark(
    configs: dict[str, RMoESeqConfig], batch: int, tokens: int, repetitions: int
) -> list[dict[str, Any]]:
    """A row for every router at one size."""
    rows, calls = [], []
    for name, config in configs.items():
        function, params = gradient(config, batch, tokens)
        compiled = function.lower(params).compile()
        memory: Any = compiled.memory_analysis()
        rows.append(
            {
                "layers": config.num_hidden_layers,
                "width": config.hidden_size,
                "router": name,
                "parameters": params_lib.count(params),
                "temporary_mb": memory.temp_size_in_bytes / 1e6,
                "router_share": router_flops(config, batch * tokens) / _flops(compiled),
            }
        )
        calls.append((lambda f=compiled, p=params: f(p), []))
    for number in range(1 + repetitions):
        for call, times in calls:
            start = time.perf_counter()
            jax.block_until_ready(call())
            if number:  # the first is a warm-up
                times.append(time.perf_counter() - start)
    for row, (_, times) in zip(rows, calls, strict=True):
        row["milliseconds"] = 1e3 * statistics.median(times)
        row["fastest_milliseconds"] = 1e3 * min(times)
    return rows


def gradient(c: RMoESeqConfig, batch: int, tokens: int) -> tuple[Callable[[Any], Any], Any]:
    """The jitted gradient by the parameters of the loss on random tokens, and parameters."""
    model: Any = RMoESeqLM(c)
    ids_BT = jax.random.randint(jax.random.key(0), (batch, tokens + 1), 0, c.vocab_size)

    def loss(params):
        (logits, _), found = model.apply({"params": params}, ids_BT[:, :-1], mutable=[STATISTICS])
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), ids_BT[:, 1:, None], axis=2)
        (sums,) = found[STATISTICS]["layers"]["moe"]["sums"]
        balance = losses.balance(sums, c.balance_form, c.experts_per_token)
        return c.balance_coefficient * balance - jnp.mean(log_p)

    return jax.jit(jax.grad(loss)), params_lib.initialise(model, jax.random.key(1), ids_BT[:, :2])


def router_flops(c: RMoESeqConfig, tokens: int) -> float:
    """The compiler's FLOPs of the router of one layer, forward and backward."""
    specs = router.parameters(c.router, c.hidden_size)
    array = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    shared, own = ({name: array(spec.shape) for name, spec in part.items()} for part in specs)
    carry = jax.eval_shape(lambda: router.start(c.router, tokens, jnp.float32))
    arguments = (shared, own, array((tokens, c.hidden_size)), carry)

    def route(shared, own, x_TD, carry):
        logits_TE, carry = router.route(c.router, shared, own, x_TD, carry)
        return logits_TE, router.choose(c.router, logits_TE)[1:], carry

    def both(arguments, cotangents):
        return jax.vjp(route, *arguments)[1](cotangents)

    cotangents = jax.eval_shape(route, *arguments)
    return _flops(jax.jit(both).lower(arguments, cotangents).compile())


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table, with time and memory over those of the linear router."""
    head = ["L,D", "router", "parameters", "ms (fastest)", "time / linear"]
    head += ["temporary MB", "memory / linear", "router's FLOPs"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    size = lambda row: (row["layers"], row["width"])
    linear = {size(row): row for row in rows if row["router"] == "linear"}
    for row in rows:
        base = linear[size(row)]
        cells = (
            f"{row['layers']},{row['width']}",
            row["router"],
            f"{row['parameters']:,}",
            f"{row['milliseconds']:.1f} ({row['fastest_milliseconds']:.1f})",
            f"{row['milliseconds'] / base['milliseconds']:.3f}",
            f"{row['temporary_mb']:,.1f}",
            f"{row['temporary_mb'] / base['temporary_mb']:.3f}",
            f"{row['router_share']:.1%}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _flops(compiled: Any) -> float:
    return compiled.cost_analysis()["flops"]


def _size(text: str) -> tuple[int, int]:
    """ "8,352" -> (layers, width)."""
    parts = text.split(",")
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
        raise ValueError(f"--sizes: {text!r} is not two positive integers L,D")
    return int(parts[0]), int(parts[1])


if __name__ == "__main__":
    define_flags()
    app.run(main)
