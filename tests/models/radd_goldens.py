"""The masked diffusions' reference values: their files, and the enumerable toy."""

import functools
import pathlib

import numpy as np

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "radd"


@functools.cache
def load(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / f"{name}.npz"))


def part(file, prefix: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): x for key, x in file.items() if key.startswith(prefix)}
