"""Coupling pairs (Z_0, Z_1) of a trained flow: what the next flow, or a distilled one, learns from.

  python -m scanax.train.generate_pairs --workdir runs/flow --out pairs/flow --num 50000 \\
      [--recipe rf_rk45] [--seed 0] [--batch_size 256] [--per_shard 1024] [--from_data]

Z_0 is drawn, Z_1 is where the flow (of the averaged parameters) takes it; with --from_data the
training images are Z_1, and Z_0 is where the flow backwards takes them. A shard is renamed when it
is whole: after an interruption the same command makes those that are missing. Pair i begins at what
the seed and i decide (noise that samples and analyses do not use, or the i-th training image in
the seed's order; classes in turn), and a solver with fixed steps takes it to the same end whatever
is solved beside it. Train on the result with ``--config.data.pairs=DIR``; the pairs know their
teacher, which the run's ``data.teacher``, ``objective.teacher`` or ``init_from`` (the first that is
set) must be.
"""

from collections.abc import Callable, Iterator
import logging
import pathlib
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ..models.rectified_flow import recipe
from . import flags as flags_lib, run as run_lib
from .checksum import fingerprint, tree_checksums
from .config import ConfigError
from .data.pairs import Pair, PairsPlan, write
from .tasks.flow import Flow, flow_of

logger = logging.getLogger("scanax")
PAIRS = 0x70616972  # folded into the seed, which samples and analyses have too


def define_flags() -> None:
    """For the command alone: a process that imports this module may have others of these names."""
    flags_lib.define_workdir()
    flags.DEFINE_integer("step", None, "A saved step; the newest by default.")
    flags.DEFINE_string("out", None, "The folder that gets the pairs.")
    flags.DEFINE_integer("num", 50_000, "Pairs.", lower_bound=1)
    flags.DEFINE_string("recipe", "", "The solver; rf_rk45, or its way back, by default.")
    flags.DEFINE_integer("seed", 0, "Of the noise.", lower_bound=0)
    flags.DEFINE_integer("batch_size", 256, "Pairs solved at once.", lower_bound=1)
    flags.DEFINE_integer("per_shard", 1024, "Pairs in a file.", lower_bound=1)
    flags.DEFINE_bool("from_data", False, "Begin at the training images, backwards.")


def main() -> None:
    given = flags.FLAGS
    workdir = flags_lib.workdir()
    if not given.out:
        raise ConfigError("--out is required")
    text = given.recipe or ("rf_invert_rk45" if given.from_data else "rf_rk45")
    try:
        if recipe(text).to_data == given.from_data:
            raise ValueError(f"{text} goes the wrong way: see --from_data")
    except ValueError as error:
        raise ConfigError(f"--recipe: {error}") from error
    run = run_lib.load(workdir, given.step)
    flow = flow_of(run.config)
    plan = PairsPlan(
        teacher=fingerprint(tree_checksums(run.params)),
        run=f"{workdir}, step {run.step}",
        solver=text,
        seed=given.seed,
        batch_size=given.batch_size,
        shape=flow.shape,
        num_classes=flow.model.num_classes,
        number=given.num,
        per_shard=given.per_shard,
        from_data=given.from_data,
    )
    make = maker(flow, run.params, plan)
    made = write(plan, pathlib.Path(given.out), make)
    logger.info("%s of %s pairs made now, in %s", f"{made:,}", f"{given.num:,}", given.out)


def maker(flow: Flow, params: Any, plan: PairsPlan) -> Callable[[np.ndarray], Iterator[Pair]]:
    """A function from numbers of pairs to the pairs.

    Raises:
      ConfigError: if there are fewer images to begin at than pairs; when the function is called, if
        the solver does not reach its tolerance.
    """
    found = flow.data.available(training=True, starts=not plan.from_data)
    if plan.number > found:
        raise ConfigError(f"--num {plan.number}: there are {found} training images to begin at")
    key = jax.random.fold_in(jax.random.key(plan.seed), PAIRS)
    batch_size = plan.batch_size

    def make(numbers: np.ndarray) -> Iterator[Pair]:
        parts = range(0, len(numbers), batch_size)
        for first in tqdm(parts, desc="pairs", unit="batch", disable=None):
            some = numbers[first : first + batch_size]
            # Filled up to one size: the solver is compiled once.
            padded = np.concatenate([some, np.repeat(some[-1:], batch_size - len(some))])
            x, labels_B, keys_B = flow.starts(padded, key, training=True)
            if plan.from_data:
                ends, labels = flow.data.ends(padded, training=True)
                x = jnp.asarray(ends)
                labels_B = jnp.asarray(labels if plan.num_classes else 0 * labels)
            solution = flow.solve(params, x, labels_B, plan.solver, keys_B)
            if not np.asarray(solution.reached).all():
                raise ConfigError(
                    f"--recipe {plan.solver} does not reach its tolerance from pair {some[0]} on:"
                    " allow a larger one (rf_rk45:1e-4), or train the flow for longer"
                )
            ends_B = [np.asarray(x), np.asarray(solution.x)]
            x0, x1 = ends_B[::-1] if plan.from_data else ends_B
            nfe_B = np.broadcast_to(np.asarray(solution.nfe), len(padded))
            for i in range(len(some)):
                yield x0[i], x1[i], int(labels_B[i]), int(nfe_B[i])

    return make


if __name__ == "__main__":
    define_flags()
    flags_lib.launch(main)
