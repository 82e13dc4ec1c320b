"""What rare tokens lose when noise is coarse: a Zipf law drawn by samplers of many steps.

  python -m scanax.models.radd.precision [--vocab 50257] [--tokens 4096] [--out precision.png]

Dimensions: N steps, T positions, V tokens.

The network's distribution is the same at each position, p_v ~ 1 / v: whatever the number of steps,
tokens should have it, and a mean of -log p that is its entropy. The published draw lets a masked
position be a race of all tokens and of staying masked, E of which are -log of float32 uniforms and
so never below 2^-24. A token then wins with psi p a / (e^a - 1) in place of psi p, where
a = 2^-24 (1 - psi) / (psi p): the smaller the chance psi of unmasking, the more the rare ones lose
(the effect is Zheng et al.'s 2025; Ou et al. 2025 sample in float64 for it). Drawing first when a
position is unmasked, and its token then with noise of 64 bits, has no such limit.
"""

import sys

from absl import app, flags
import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
import numpy as np

from . import events, rates
from .network import Network
from .schedules import LogLinear

STEPS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def define_flags() -> None:
    """For the command alone: a process that imports this module may have others of these names."""
    flags.DEFINE_integer("vocab", 50257, "Tokens.", lower_bound=2)
    flags.DEFINE_integer("tokens", 4096, "Positions that are sampled.", lower_bound=2)
    flags.DEFINE_integer("seed", 0, "Of the draws.", lower_bound=0)
    flags.DEFINE_string("out", "precision.png", "The picture.")


def main(argv: list[str]) -> None:
    given = flags.FLAGS
    if len(argv) > 1:
        print(f"error: unexpected argument {argv[1]!r}", file=sys.stderr)
        sys.exit(2)
    p_V = 1 / np.arange(1, given.vocab + 1)
    p_V /= p_V.sum()
    entropy = float(-(p_V * np.log(p_V)).sum())
    print(f"{given.vocab} tokens, entropy {entropy:.3f}; mean of -log p:\n")
    print(f"| steps | published draw | events, of {given.tokens} draws |\n|---|---|---|")
    rows = []
    for n in STEPS:
        psi_N = rates.unmask_rates(LogLinear(), n)
        surprise = float(-(published_law(p_V, psi_N) * np.log(p_V)).sum())
        drawn_T = -np.log(p_V)[sampled(p_V, psi_N, given.tokens, given.seed)]
        error = drawn_T.std(ddof=1) / given.tokens**0.5
        rows.append([n, surprise, drawn_T.mean(), error])
        print("| {} | {:.3f} | {:.3f} +- {:.3f} |".format(*rows[-1]), flush=True)
    draw(np.asarray(rows), entropy, given.out)


def published_law(p_V: np.ndarray, psi_N: np.ndarray, step: float = 2.0**-24) -> np.ndarray:
    """The law [V] of a token that the published draw has unmasked with uniforms of that step."""
    law_V, masked = np.zeros_like(p_V), 1.0
    for psi in psi_N:
        a_V = step * (1 - psi) / (psi * p_V)
        with np.errstate(over="ignore", invalid="ignore"):
            won_V = psi * p_V * np.where(a_V > 0, a_V / np.expm1(a_V), 1)
        law_V += masked * won_V
        masked *= 1 - won_V.sum()
    return law_V / law_V.sum()


def sampled(p_V: np.ndarray, psi_N: np.ndarray, tokens: int, seed: int) -> np.ndarray:
    """[T] tokens of the event sampler."""
    log_p_V, vocab = jnp.asarray(np.log(p_V), jnp.float32), len(p_V)
    body = lambda ids: jnp.zeros((*ids.shape, 1))
    head = lambda hidden: jnp.broadcast_to(log_p_V, (*hidden.shape[:-1], vocab))
    start = jnp.full((1, tokens), vocab, jnp.int32)
    key = jax.random.key(seed)
    plan = events.diffusion_plan(key, start == vocab, rates.step_probabilities(psi_N)[1])
    sample = jax.jit(lambda: events.sample(Network(body, head, vocab), key, start, plan).tokens)
    return np.asarray(sample()[0])


def draw(rows: np.ndarray, entropy: float, path: str) -> None:
    """The picture: mean of -log p over the number of steps."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(entropy, color="grey", linestyle="--", linewidth=1, label="entropy of the law")
    axes.plot(rows[:, 0], rows[:, 1], marker="o", label="published draw, float32 uniforms")
    axes.errorbar(*rows[:, [0, 2, 3]].T, marker="o", label="events, noise of 64 bits")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("steps")
    axes.set_ylabel("mean of -log p of the tokens")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    define_flags()
    app.run(main)
