"""Other packages' implementations of the same operations, for the benchmark, where installed.

  delta_product   transformers  torch_chunk_gated_delta_rule, what CPU users of it run
                  fla           its chunk form in plain torch (fla-core; triton is not needed)
                  jla           its chunk form in plain JAX (jax-linear-attention)
  convolution_3x3 torch         its convolution, images with channels last
  short_convolution torch       its convolution in groups of one channel, and its SiLU
  additive_scan   torch_gla     gated linear attention by chunks in torch, written here: of those of
                                fla, the chunk form needs a GPU, the other goes token by token
                  jla           its chunk form of gated linear attention in plain JAX

They know one delta step per token, so that N steps become N tokens: queries are zero but at the
last, decays zero but at the first. This is done before anything is timed, except in jla, whose own
function does it. The additive scan becomes gated linear attention with keys exp(k - z) and log
decays z_{t-1} - z_t, computed before anything is timed and without gradients through them: in the
peers' favour.

A peer takes the arguments of our function as numpy arrays and is a context that gives a ``Peer``.
jla needs another Python and another JAX than we do: it runs in an interpreter of its own, which
waits while the others are timed (``jla_worker.py``).
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import functools
import importlib.util
from pathlib import Path
import shutil
import subprocess
import tempfile
import time
from typing import Any, NamedTuple

import numpy as np

CHUNK, BLOCK = 64, 8  # tokens, of torch_gla: the fastest on CPU of those tried


class Peer(NamedTuple):
    """An implementation with its inputs.

    Attributes:
      forward: runs once and returns the seconds that it took.
      both: the same for forward and backward of sum(o^2).
      outputs: returns the outputs, as ours are.
    """

    forward: Callable[[], float]
    both: Callable[[], float]
    outputs: Callable[[], np.ndarray]


Maker = Callable[..., contextlib.AbstractContextManager[Peer]]


def installed(operation: str, jla_python: str = "") -> dict[str, Maker]:
    """The peers of an operation that can run here, by name.

    Args:
      operation: "delta_product", "additive_scan" or a convolution; others have none.
      jla_python: the interpreter that has jla; "" for none.

    Raises:
      ValueError: if that interpreter is not there or has no jla.
    """
    needed: dict[str, tuple[Maker, tuple[str, ...]]] = {}
    if operation == "delta_product":
        needed["transformers"] = transformers, ("torch", "transformers")
        needed["fla"] = fla, ("torch", "einops", "fla")
    elif operation == "additive_scan":
        needed["torch_gla"] = torch_gla, ("torch",)
    elif operation == "convolution_3x3":
        needed["torch"] = torch_convolution, ("torch",)
    elif operation == "short_convolution":
        needed["torch"] = torch_short_convolution, ("torch",)
    found = importlib.util.find_spec
    makers = {name: peer for name, (peer, packages) in needed.items() if all(map(found, packages))}
    if jla_python:
        workers = {"delta_product": jla_delta_product, "additive_scan": jla_gla}
        if operation not in workers:
            raise ValueError(f"jla has no {operation}")
        if not shutil.which(jla_python):
            raise ValueError(f"{jla_python!r} is not an interpreter")
        look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('jla') is None)"
        if subprocess.run([jla_python, "-I", "-c", look], check=False).returncode:
            raise ValueError(f"{jla_python!r} has no jla: pip install jax-linear-attention")
        makers["jla"] = functools.partial(workers[operation], jla_python)
    return makers


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@contextlib.contextmanager
def transformers(q, k, v, beta, g) -> Iterator[Peer]:
    from transformers.models.qwen3_next import (  # pyright: ignore[reportMissingImports]
        modeling_qwen3_next as published,
    )

    yield _torch_delta_rule(published.torch_chunk_gated_delta_rule, q, k, v, beta, g)


@contextlib.contextmanager
def fla(q, k, v, beta, g) -> Iterator[Peer]:
    published = fla_naive("gated_delta_rule").naive_chunk_gated_delta_rule
    yield _torch_delta_rule(published, q, k, v, beta, g)


def fla_naive(operation: str) -> Any:
    """The module with an operation of fla in plain torch. The file alone: fla imports triton."""
    [folder] = importlib.util.find_spec("fla").submodule_search_locations  # pyright: ignore
    path = Path(folder) / "ops" / operation / "naive.py"
    spec: Any = importlib.util.spec_from_file_location(f"fla_{operation}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _torch_delta_rule(published, q, k, v, beta, g) -> Peer:
    """``published``: (q, k, v, g, beta) -> (o, ...), all [B, T, H, ...], one step per token."""
    batch, tokens, heads, key_dim = q.shape
    steps = k.shape[2]
    long_q = np.zeros((batch, tokens, steps, heads, key_dim), np.float32)
    long_g = np.zeros((batch, tokens, steps, heads), np.float32)
    long_q[:, :, -1] = q
    if g is not None:
        long_g[:, :, 0] = g
    arrays = [x.reshape(batch, tokens * steps, *x.shape[3:]) for x in (long_q, k, v, long_g, beta)]
    return _torch_peer(lambda *inputs: published(*inputs)[0][:, steps - 1 :: steps], arrays)


@contextlib.contextmanager
def torch_gla(q, k, v) -> Iterator[Peer]:
    yield _torch_peer(_chunked_gla, _as_gla(q, k, v).values())


@contextlib.contextmanager
def torch_convolution(x, kernel) -> Iterator[Peer]:
    """Both arrays with channels last in memory, torch's faster layout on CPU."""
    import torch  # pyright: ignore[reportMissingImports]

    def convolved(x, kernel):
        images, kernel = x.permute(0, 3, 1, 2), kernel.permute(0, 3, 1, 2)
        return torch.nn.functional.conv2d(images, kernel, padding=1).permute(0, 2, 3, 1)

    yield _torch_peer(convolved, [x, np.ascontiguousarray(kernel.transpose(3, 0, 1, 2))])


@contextlib.contextmanager
def torch_short_convolution(x, kernel) -> Iterator[Peer]:
    import torch  # pyright: ignore[reportMissingImports]

    taps, channels = kernel.shape

    def convolved(x, kernel):
        y = torch.nn.functional.conv1d(x.mT, kernel.T[:, None], padding=taps - 1, groups=channels)
        return torch.nn.functional.silu(y[..., : x.shape[1]].mT)

    yield _torch_peer(convolved, [x, kernel])


def _as_gla(q, k, v) -> dict[str, np.ndarray]:
    """The additive scan's arguments as those of gated linear attention."""
    z = np.logaddexp.accumulate(k, axis=1)
    decay = np.concatenate([np.zeros_like(z[:, :1]), z[:, :-1] - z[:, 1:]], axis=1)
    return {"q": q, "k": np.exp(k - z), "v": v, "g": decay}


def _chunked_gla(q, k, v, g):
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T; o_t = K**-0.5 S_t^T q_t. q, k, g [B,T,H,K]; v [B,T,H,V].

    As the kernels of fla and jla go: states chunk by chunk, the rest for all chunks at once. Tokens
    of different blocks of a chunk meet in decays relative to the start of the later one's block;
    within a block every pair has its own.
    """
    import torch  # pyright: ignore[reportMissingImports]

    batch, tokens, heads, key_dim = q.shape

    def cut(x):  # [B, H, X, C, D]
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -tokens % CHUNK))
        return x.reshape(batch, -1, CHUNK, heads, x.shape[-1]).permute(0, 3, 1, 2, 4)

    q, k, v, total = cut(q * key_dim**-0.5), cut(k), cut(v), cut(g).cumsum(dim=-2)
    last = total[..., -1:, :]
    written = (k * (last - total).exp()).transpose(-1, -2) @ v
    decay = last.exp().transpose(-1, -2)
    states = [torch.zeros_like(written[:, :, 0])]
    for x in range(written.shape[2] - 1):
        states.append(decay[:, :, x] * states[-1] + written[:, :, x])
    o = (q * total.exp()) @ torch.stack(states, dim=2)

    later = torch.ones(BLOCK, BLOCK, dtype=torch.bool).triu(1)[..., None]
    rows = []
    for start in range(0, CHUNK, BLOCK):
        block, before = slice(start, start + BLOCK), slice(0, start)
        q_b, k_b, total_b = (x[..., block, :] for x in (q, k, total))
        exponent = total_b[..., :, None, :] - total_b[..., None, :, :]
        pairs = exponent.masked_fill(later, -torch.inf).exp()
        own = (q_b[..., :, None, :] * pairs * k_b[..., None, :, :]).sum(-1)
        first = total_b[..., :1, :]
        relative = k[..., before, :] * (first - total[..., before, :]).exp()
        earlier = (q_b * (total_b - first).exp()) @ relative.transpose(-1, -2)
        rows.append(earlier @ v[..., before, :] + own @ v[..., block, :])
    o = o + torch.cat(rows, dim=-2)
    return o.permute(0, 2, 3, 1, 4).reshape(batch, -1, heads, v.shape[-1])[:, :tokens]


def _torch_peer(forward, arrays) -> Peer:
    """``forward``: tensors of these arrays -> o."""
    import torch  # pyright: ignore[reportMissingImports]

    inputs = [torch.tensor(x, requires_grad=True) for x in arrays]

    def alone():
        with torch.no_grad():
            return forward(*inputs)

    def both():
        torch.autograd.grad(forward(*inputs).square().sum(), inputs)

    return Peer(lambda: seconds(alone), lambda: seconds(both), lambda: alone().numpy())


def jla_delta_product(python: str, q, k, v, beta, g) -> contextlib.AbstractContextManager[Peer]:
    long = lambda x: x.reshape(x.shape[0], -1, *x.shape[3:])
    g = np.zeros(q.shape[:3], np.float32) if g is None else g
    arrays = {"q": q, "k": long(k), "v": long(v), "g": g, "beta": long(beta)}
    return _jla(python, "gated_deltaproduct", arrays)


def jla_gla(python: str, q, k, v) -> contextlib.AbstractContextManager[Peer]:
    return _jla(python, "gla", _as_gla(q, k, v))


@contextlib.contextmanager
def _jla(python: str, kind: str, arrays: Mapping[str, np.ndarray]) -> Iterator[Peer]:
    """One of jla's operations in a process of that interpreter, which lives as long as the context.

    Raises:
      RuntimeError: if the process ends early; what it had to say is on standard error.
    """
    script = str(Path(__file__).with_name("jla_worker.py"))
    with tempfile.TemporaryDirectory() as folder:
        for name, array in arrays.items():
            np.save(f"{folder}/{name}.npy", array)
        command = [python, "-I", script, kind, folder, *arrays]  # its own packages alone
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
        with subprocess.Popen(command, **pipes) as process:

            def ask(request: str) -> float:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(f"{request}\n".encode())  # pyright: ignore
                answer = process.stdout.readline()  # pyright: ignore
                if not answer:
                    raise RuntimeError(f"jla under {python!r} stopped at {request!r}")
                return float(answer)

            def outputs() -> np.ndarray:
                ask("outputs")
                return np.load(f"{folder}/o.npy")

            yield Peer(lambda: ask("forward"), lambda: ask("both"), outputs)
