"""One of jax-linear-attention's operations, for ``peers.py``: a program for the Python that has it.

  python -P jla_worker.py KIND FOLDER NAME...

The arguments are FOLDER/NAME.npy. Every line of standard input is a request, answered with a line:
``forward`` and ``both`` (with the backward of sum(o^2)) run once and answer with the seconds,
``outputs`` writes FOLDER/o.npy and answers 0.
"""

import sys
import time

import jax
from jla.ops import linear_attention  # pyright: ignore[reportMissingImports]
import numpy as np


def main(kind: str, folder: str, *names: str) -> None:
    arrays = {name: jax.numpy.asarray(np.load(f"{folder}/{name}.npy")) for name in names}

    def forward(arrays):
        return linear_attention(kind, impl="chunked", **arrays)[0]

    def loss(arrays):
        return jax.numpy.sum(jax.numpy.square(forward(arrays)))

    functions = {"forward": jax.jit(forward), "both": jax.jit(jax.value_and_grad(loss))}
    for line in sys.stdin:
        answer = 0.0
        if line.strip() == "outputs":
            np.save(f"{folder}/o.npy", functions["forward"](arrays))
        else:
            start = time.perf_counter()
            jax.block_until_ready(functions[line.strip()](arrays))
            answer = time.perf_counter() - start
        print(answer, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
