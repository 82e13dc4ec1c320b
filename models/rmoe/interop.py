"""The published forms of both models: names, and configurations.

``rmoe_llama``: the names of the authors' port to transformers; experts and the twelve tensors of
the GRU lie side by side in our parameters, layers behind each other. Not covered: shared experts,
dense layers, and routers other than "gru" and "linear", whose names could not be verified.

``rmoe_seq``: the names of the small models' checkpoints, which have no configuration file: its keys
are V, hidden, inner, heads, L, span, E, k, p, and kind, "rmoe" or "smoe".
"""

from collections.abc import Mapping
from typing import Any

from ..layout import Leaf
from .config import MIXERS, MoEConfig, RMoEConfig, RMoESeqConfig

# What the published models are, in terms of our switches.
_ROUTER = {
    "router_memory": "full",
    "router_projector": True,
    "router_head": "linear",
    "router_residual": 0.0,
    "router_normalise": True,
    "capacity_factor": 0.0,
    "router_balance_rate": 0.0,
}
_FREE = {  # do not concern published parameters
    "router_head_dim": 16,
    "router_residual_detach": False,
    "router_residual_cumulative": False,
    "capacity_policy": "score",
    "z_coefficient": 0.0,
    "remat": False,
    "implementation": "auto",
}

LLAMA_ROUTERS = {"gru": "gru", "linear": "none"}
# Keys of the published configuration that would change the numbers, and what we support.
LLAMA_SUPPORTED = {
    "hidden_act": ("silu",),
    "rope_scaling": (None,),
    "attention_bias": (False,),
    "add_moe_share_expert": (False,),
    "moe_router_type": tuple(LLAMA_ROUTERS),
}
LLAMA_KEYS = {  # ours -> theirs, and the default
    "vocab_size": ("vocab_size", 32000),
    "hidden_size": ("hidden_size", 4096),
    "num_hidden_layers": ("num_hidden_layers", 32),
    "num_heads": ("num_attention_heads", 32),
    "num_experts": ("num_local_experts", 8),
    "experts_per_token": ("num_experts_per_tok", 2),
    "router_dim": ("moe_router_rnn_hidden_size", 256),
    "rope_theta": ("rope_theta", 10000.0),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "initializer_range": ("initializer_range", 0.02),
    "tie_word_embeddings": ("tie_word_embeddings", False),
    "moe_bias": ("add_moe_bias", False),
    "balance_coefficient": ("router_aux_loss_coef", 0.001),
}
SEQ_KEYS = {
    "vocab_size": "V",
    "hidden_size": "hidden",
    "intermediate_size": "inner",
    "num_heads": "heads",
    "num_hidden_layers": "L",
    "span": "span",
    "num_experts": "E",
    "experts_per_token": "k",
    "router_dim": "p",
}
GATES = "rzn"


def llama_config(config: Mapping[str, Any], dtype: str) -> RMoEConfig:
    """A published configuration as ours, computing in ``dtype``.

    Raises:
      ValueError: if a key has a value that we do not support.
    """
    for name, allowed in LLAMA_SUPPORTED.items():
        value = config.get(name, allowed[0])
        if value not in allowed:
            raise ValueError(f"config {name}={value!r} is not supported; only {allowed} are")
    fields = {ours: config.get(theirs, default) for ours, (theirs, default) in LLAMA_KEYS.items()}
    layers = config.get("moe_num_layers")
    if layers not in (None, fields["num_hidden_layers"]):
        raise ValueError(
            f"config moe_num_layers={layers} is not supported: only models with experts in all"
            f" {fields['num_hidden_layers']} layers are"
        )
    size = config.get("moe_expert_intermediate_size") or config.get("intermediate_size", 11008)
    return RMoEConfig(
        **fields,
        **_ROUTER,
        **_FREE,
        router_cell=LLAMA_ROUTERS[config.get("moe_router_type", "gru")],
        router_bias=False,
        intermediate_size=size,
        num_kv_heads=config.get("num_key_value_heads") or 0,
        mixer="attention",
        **MIXERS["delta_product"],
        balance_form="pooled",
        num_dense_layers=0,
        dense_intermediate_size=0,
        shared_expert_size=0,
        shared_weight=0.5,
        moe_weight=0.5,
        dtype=dtype,
        param_dtype=dtype,
    )


def llama_public(c: RMoEConfig) -> dict[str, Any]:
    """The inverse of :func:`llama_config`; a ValueError for what was never published."""
    fixed = {"mixer": "attention", **_ROUTER}
    fixed |= {"router_bias": False, "num_dense_layers": 0, "shared_expert_size": 0}
    _check(c, fixed, ("gru", "none"))
    return {
        **{theirs: getattr(c, ours) for ours, (theirs, _) in LLAMA_KEYS.items()},
        "intermediate_size": c.intermediate_size,
        "moe_expert_intermediate_size": c.intermediate_size,
        "num_key_value_heads": c.kv_heads,
        "moe_num_layers": c.num_hidden_layers,
        "moe_router_type": "linear" if c.router_cell == "none" else c.router_cell,
        "hidden_act": "silu",
        "torch_dtype": c.param_dtype,
    }


def llama_table(c: RMoEConfig) -> dict[str, Leaf]:
    """All tensors. A tied head is stored once, as the embedding."""
    hidden, f, p, experts = c.hidden_size, c.intermediate_size, c.router_dim, c.num_experts
    kv = c.kv_heads * c.head_dim
    table = {"model.embed_tokens.weight": Leaf("embeddings", (c.vocab_size, hidden), (0, 1))}
    recurrent = c.router_cell != "none"
    for i in range(c.num_hidden_layers):
        name = f"model.layers.{i}"
        for part, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            path = f"layers/attn/{part}_proj/kernel"
            table[f"{name}.self_attn.{part}_proj.weight"] = _linear(path, rows, hidden, i)
        for theirs, ours in (("input", "attn"), ("post_attention", "mlp")):
            path = f"layers/{ours}_norm/scale"
            table[f"{name}.{theirs}_layernorm.weight"] = Leaf(path, (hidden,), (0,), (i,))
        moe = f"{name}.block_sparse_moe"
        for e in range(experts):
            for w, ours, rows, columns in (
                ("w1", "gate", f, hidden),
                ("w2", "down", hidden, f),
                ("w3", "up", f, hidden),
            ):
                leaf = _linear(f"layers/moe/{ours}", rows, columns, i, e)
                table[f"{moe}.experts.{e}.{w}.weight"] = leaf
        if recurrent:
            path = "layers/moe/router_projector"
            table[f"{moe}.weight1"] = _linear(path, p, hidden, i)
        head, width = ("weight2", p) if recurrent else ("gate.weight", hidden)
        table[f"{moe}.{head}"] = _linear("layers/moe/router_head", experts, width, i)
        if c.moe_bias:
            table[f"{moe}.bias"] = Leaf("layers/moe_bias", (hidden,), (0,), (i,))
    if recurrent:
        for side, path in (("i", "router/router_input"), ("h", "router/router_hidden")):
            for number, gate in enumerate(GATES):
                at = slice(number * p, (number + 1) * p)
                leaf = Leaf(path, (p, p), (1, 0), (slice(0, p), at))
                table[f"model.rnn_router.weight_{side}{gate}"] = leaf
                leaf = Leaf(f"{path}_bias", (p,), (0,), (at,))
                table[f"model.rnn_router.bias_{side}{gate}"] = leaf
    table["model.norm.weight"] = Leaf("norm/scale", (hidden,), (0,))
    if not c.tie_word_embeddings:
        table["lm_head.weight"] = _linear("lm_head/kernel", c.vocab_size, hidden)
    return table


def seq_config(config: Mapping[str, Any], dtype: str) -> RMoESeqConfig:
    """A configuration of the small models, by the keys of the module's docstring, as ours."""
    missing = [name for name in ("kind", *SEQ_KEYS.values()) if name not in config]
    if missing:
        raise ValueError(f"config lacks {', '.join(missing)}")
    if config["kind"] not in ("rmoe", "smoe"):
        raise ValueError(f"config kind={config['kind']!r} is not supported; only rmoe, smoe are")
    return RMoESeqConfig(
        **{ours: config[theirs] for ours, theirs in SEQ_KEYS.items()},
        **_ROUTER,
        **_FREE,
        router_cell="gru" if config["kind"] == "rmoe" else "none",
        router_bias=True,
        balance_form="layer_sum",
        balance_coefficient=config.get("lb", 0.01),
        norm_eps=1e-5,
        dropout=0.0,
        dtype=dtype,
        param_dtype=dtype,
    )


def seq_public(c: RMoESeqConfig) -> dict[str, Any]:
    """The inverse of :func:`seq_config`; a ValueError for what was never published."""
    _check(c, {**_ROUTER, "router_bias": True}, ("gru", "none"))
    found = {theirs: getattr(c, ours) for ours, theirs in SEQ_KEYS.items()}
    kind = "smoe" if c.router_cell == "none" else "rmoe"
    return {"kind": kind, **found, "lb": c.balance_coefficient}


def seq_table(c: RMoESeqConfig) -> dict[str, Leaf]:
    """All tensors."""
    hidden, f, p, experts = c.hidden_size, c.intermediate_size, c.router_dim, c.num_experts
    recurrent = c.router_cell != "none"
    table = {
        "key_pe": Leaf("places", (1, c.head_dim, c.span), (1, 2)),
        "in_emb.weight": Leaf("embeddings", (c.vocab_size, hidden), (0, 1)),
        "out_emb.weight": _linear("lm_head/kernel", c.vocab_size, hidden),
        "out_emb.bias": Leaf("lm_head_bias", (c.vocab_size,), (0,)),
    }
    for i in range(c.num_hidden_layers):
        name, path = f"layers.{i}", "layers"
        for theirs, ours in (("query", "q"), ("key", "k"), ("val", "v"), ("out", "o")):
            leaf = _linear(f"{path}/attn/{ours}_proj/kernel", hidden, hidden, i)
            table[f"{name}.attn.proj_{theirs}.weight"] = leaf
        for theirs, ours in (
            ("norm1", "attn"),
            ("smoe.layer_norm", "moe"),
            ("norm2", "mlp"),
            ("norm3", "unused"),
        ):
            for kind, part in (("weight", "scale"), ("bias", "bias")):
                leaf = Leaf(f"{path}/{ours}_norm/{part}", (hidden,), (0,), (i,))
                table[f"{name}.{theirs}.{kind}"] = leaf
        for theirs, ours, rows, columns in (
            ("htoh4", "up", f, hidden),
            ("h4toh", "down", hidden, f),
        ):
            experts_at = f"{name}.smoe.experts.{theirs}"
            leaf = Leaf(f"{path}/moe/{ours}", (experts, rows, columns), (0, 2, 1), (i,))
            table[f"{experts_at}.weight"] = leaf
            leaf = Leaf(f"{path}/moe/{ours}_bias", (experts, rows), (0, 1), (i,))
            table[f"{experts_at}.bias"] = leaf
        linears = [("router_layer", "head", experts, p), ("rnn_projector", "projector", p, hidden)]
        if not recurrent:
            linears = [("gate", "head", experts, hidden)]
        for theirs, ours, rows, columns in linears:
            gate, own = f"{name}.smoe.gate.{theirs}", f"{path}/moe/router_{ours}"
            table[f"{gate}.weight"] = _linear(own, rows, columns, i)
            table[f"{gate}.bias"] = Leaf(f"{own}_bias", (rows,), (0,), (i,))
    if recurrent:
        for side, ours in (("ih", "input"), ("hh", "hidden")):
            own = f"router/router_{ours}"
            table[f"routerRnn.weight_{side}"] = _linear(own, 3 * p, p)
            table[f"routerRnn.bias_{side}"] = Leaf(f"{own}_bias", (3 * p,), (0,))
    return table


def _linear(path: str, rows: int, columns: int, *at: int) -> Leaf:
    """[out, in] to our [in, out], at a place of a stack."""
    return Leaf(path, (rows, columns), (1, 0), at)


def _check(c: MoEConfig, fixed: Mapping[str, Any], cells: tuple[str, ...]) -> None:
    for name, value in fixed.items():
        if getattr(c, name) != value:
            raise ValueError(
                f"the published model has model.{name}={value!r}; got {getattr(c, name)!r}"
            )
    if c.router_cell not in cells:
        raise ValueError(f"there is no published model with model.router_cell={c.router_cell!r}")
