"""DeltaProduct and LightNet language models in PyTorch, for the benchmark to compare with.

Dimensions: B batch, T tokens, D hidden, S vocabulary, N Householder steps, H heads, K key, V value;
X chunks of C tokens.

The networks are functions of the tensors that ``to_torch`` gives, by their published names, so that
both sides compute the same thing. Layers are PyTorch's own. The recurrences are what there is
without a GPU (``RECURRENCES``). Those of "fla" are what the package of the published layers has for
their operations in plain torch, token by token. Those of "torch" are the fastest known:
``torch_chunk_gated_delta_rule`` of the transformers package, and gated linear attention in chunks,
written here.
"""

from collections.abc import Callable
import os
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]

from ..kernels import peers
from .delta_product import DeltaProductConfig
from .delta_product.layer import L2_EPS
from .lightnet.layer import OUTPUT_EPS

Tensors = dict[str, torch.Tensor]
Lookup = Callable[[str], torch.Tensor]
Recurrence = Callable[..., torch.Tensor]
CHUNK = 64  # tokens, of gated linear attention


def logits(c: Any, w: Tensors, recurrence: Recurrence, ids_BT: torch.Tensor) -> torch.Tensor:
    """[B, T, S] of the token after every position."""
    mixer = delta_product if isinstance(c, DeltaProductConfig) else lightnet
    x_BTD = F.embedding(ids_BT, w["model.embeddings.weight"])

    def norm(x, name):
        return F.rms_norm(x, x.shape[-1:], w[name], c.norm_eps)

    for i in range(c.num_hidden_layers):
        block = f"model.layers.{i}."
        h_BTD = norm(x_BTD, f"{block}attn_norm.weight")
        lookup = lambda name, b=block: w[f"{b}attn.{name}"]
        x_BTD = x_BTD + mixer(c, lookup, recurrence, h_BTD)
        h_BTD = norm(x_BTD, f"{block}mlp_norm.weight")
        gate, up, down = (w[f"{block}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        x_BTD = x_BTD + F.linear(F.silu(F.linear(h_BTD, gate)) * F.linear(h_BTD, up), down)
    head = "model.embeddings.weight" if c.tie_word_embeddings else "lm_head.weight"
    return F.linear(norm(x_BTD, "model.norm.weight"), w[head])


def delta_product(
    c: DeltaProductConfig, p: Lookup, recurrence: Recurrence, x_BTD: torch.Tensor
) -> torch.Tensor:
    """The published token mixer."""
    batch, tokens, _ = x_BTD.shape
    steps, heads = c.num_householder, c.num_heads
    q, k, v = (F.silu(project(c, p, x_BTD, name)) for name in "qkv")
    q_BTHK = unit(q.reshape(batch, tokens, heads, -1))
    k = unit(k.reshape(batch, tokens * steps, heads, -1))
    v = v.reshape(batch, tokens * steps, heads, -1)
    beta = torch.sigmoid(F.linear(x_BTD, p("b_proj.weight"))).view(batch, tokens * steps, heads)
    beta = 2 * beta if c.allow_neg_eigval else beta
    g_BTH = x_BTD.new_zeros(batch, tokens, heads)
    if c.use_forget_gate:
        g_BTH = F.softplus(F.linear(x_BTD, p("a_proj.weight")) + p("dt_bias"))
        g_BTH = -torch.exp(p("A_log")) * g_BTH
    o_BTHV = recurrence(q_BTHK, k, v, g_BTH, beta)
    o_BTHV = F.rms_norm(o_BTHV, o_BTHV.shape[-1:], p("o_norm.weight"), c.norm_eps)
    o = o_BTHV.flatten(2)
    if c.use_output_gate:
        o = o * F.silu(F.linear(x_BTD, p("g_proj.weight")))
    return F.linear(o, p("o_proj.weight"))


def lightnet(c: Any, p: Lookup, recurrence: Recurrence, x_BTD: torch.Tensor) -> torch.Tensor:
    """The published token mixer: keys exp(k_t - z_t) and decays exp(z_{t-1} - z_t), where z_t is
    the log-sum-exp of the keys up to t."""
    q, k, v = (project(c, p, x_BTD, name).unflatten(-1, (c.num_heads, -1)) for name in "qkv")
    z_BTHK = torch.logcumsumexp(k, dim=1)
    g_BTHK = torch.cat([z_BTHK[:, :1], z_BTHK[:, :-1]], dim=1) - z_BTHK
    q = c.query_scale * F.silu(q)
    o_BTD = recurrence(q, torch.exp(k - z_BTHK), v, g_BTHK).flatten(2)
    weight = p("g_norm.weight") if c.elementwise_affine else None
    o_BTD = F.rms_norm(o_BTD, o_BTD.shape[-1:], weight, OUTPUT_EPS)
    low = F.linear(x_BTD, p("g_proj.0.weight"))
    return F.linear(o_BTD * F.silu(F.linear(low, p("g_proj.1.weight"))), p("o_proj.weight"))


def gated_linear_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor
) -> torch.Tensor:
    """S_t = diag(exp g_t) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t (Yang et al. 2024), in chunks.

    Args:
      q, k, g: [B, T, H, K]; log decays whose sum over a chunk is above -80.
      v: [B, T, H, V].

    Returns:
      o [B, T, H, V].
    """
    tokens = q.shape[1]

    def cut(x):
        x = F.pad(x, (0, 0, 0, 0, 0, -tokens % CHUNK))
        return x.unflatten(1, (-1, CHUNK)).permute(0, 3, 1, 2, 4).contiguous()

    q_BHXCK, k_BHXCK, v_BHXCV, g_BHXCK = map(cut, (q, k, v, g))
    sum_BHXCK = g_BHXCK.cumsum(-2)
    end_BHX1K = sum_BHXCK[..., -1:, :]
    q_BHXCK = q_BHXCK * sum_BHXCK.exp()
    left_BHXCK = k_BHXCK * (end_BHX1K - sum_BHXCK).exp()
    inside_BHXCC = (q_BHXCK @ (k_BHXCK * (-sum_BHXCK).exp()).mT).tril()
    new_BHXKV = left_BHXCK.mT @ v_BHXCV
    kept_BHXK1 = end_BHX1K.exp().mT
    state_BHKV, before = torch.zeros_like(new_BHXKV[:, :, 0]), []
    for new_BHKV, kept_BHK1 in zip(new_BHXKV.unbind(2), kept_BHXK1.unbind(2), strict=True):
        before.append(state_BHKV)
        state_BHKV = kept_BHK1 * state_BHKV + new_BHKV
    o_BHXCV = inside_BHXCC @ v_BHXCV + q_BHXCK @ torch.stack(before, 2)
    return o_BHXCV.flatten(2, 3).transpose(1, 2)[:, :tokens]


def transformers_delta_product(q, k, v, g, beta) -> torch.Tensor:
    """N steps become N tokens: queries come with the last of them, decays with the first."""
    from transformers.models.qwen3_next import (  # pyright: ignore[reportMissingImports]
        modeling_qwen3_next as published,
    )

    steps = k.shape[1] // q.shape[1]
    q = F.pad(q[:, :, None], (0, 0, 0, 0, steps - 1, 0)).flatten(1, 2)
    g = F.pad(g[:, :, None], (0, 0, 0, steps - 1)).flatten(1, 2)
    return published.torch_chunk_gated_delta_rule(q, k, v, g, beta)[0][:, steps - 1 :: steps]


def fla_delta_product(q, k, v, g, beta) -> torch.Tensor:
    published = peers.fla_naive("gated_delta_product").naive_recurrent_gated_delta_product
    steps = k.shape[1] // q.shape[1]
    return published(q, k, v, g, beta, q.shape[-1] ** -0.5, num_householder=steps)[0]


def fla_linear_attention(q, k, v, g) -> torch.Tensor:
    """Without the scale of its queries."""
    return peers.fla_naive("gla").naive_recurrent_gla(q * q.shape[-1] ** 0.5, k, v, g)[0]


# q [B, T, H, K]; k, v and beta have N T tokens; g is [B, T, H], or with channels K and no beta.
# They return o [B, T, H, V].
RECURRENCES: dict[tuple[str, str], Recurrence] = {
    ("torch", "delta_product"): transformers_delta_product,
    ("torch", "lightnet"): gated_linear_attention,
    ("fla", "delta_product"): fla_delta_product,
    ("fla", "lightnet"): fla_linear_attention,
}


def project(c: Any, p: Lookup, x_BTD: torch.Tensor, name: str) -> torch.Tensor:
    """A projection and its short convolution."""
    y = F.linear(x_BTD, p(f"{name}_proj.weight"))
    if not c.use_short_conv:
        return y
    kernel = p(f"{name}_conv1d.weight")
    y = F.conv1d(y.mT, kernel, padding=c.conv_size - 1, groups=len(kernel))
    return y[..., : x_BTD.shape[1]].mT


def unit(x: torch.Tensor) -> torch.Tensor:
    """Vectors of length 1."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


class Trainer:
    """A language model in PyTorch with its optimizer.

    Args of the constructor:
      c: our configuration of the model.
      tensors: by published name.
      options: of AdamW; it decays matrices alone.
      recurrence: one of ``RECURRENCES``.
    """

    def __init__(
        self,
        c: Any,
        tensors: dict[str, np.ndarray],
        options: dict[str, Any],
        recurrence: Recurrence,
    ):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.config, self.recurrence = c, recurrence
        self.weights = {name: torch.tensor(x).requires_grad_() for name, x in tensors.items()}
        groups = [
            {"params": [w for w in self.weights.values() if w.ndim >= 2]},
            {"params": [w for w in self.weights.values() if w.ndim < 2], "weight_decay": 0.0},
        ]
        b1, b2 = options["b1"], options["b2"]
        options = {key: x for key, x in options.items() if key not in ("b1", "b2")}
        options["lr"] = options.pop("learning_rate")
        self.optimizer = torch.optim.AdamW(groups, betas=(b1, b2), fused=True, **options)

    def step(self, ids: np.ndarray) -> float:
        """One update on [B, T + 1] tokens; the loss before it."""
        inputs = torch.tensor(ids, dtype=torch.int64)
        y_BTS = logits(self.config, self.weights, self.recurrence, inputs[:, :-1])
        loss = F.cross_entropy(y_BTS.flatten(0, 1), inputs[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()
