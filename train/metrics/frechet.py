"""The Frechet distance between Gaussians fitted to features, and statistics kept in a file.

Dimensions: N real, M generated vectors, D features.

It is called FID only where the features are Inception's (Heusel et al. 2017).
"""

import dataclasses
import pathlib

import numpy as np

from . import pairs


@dataclasses.dataclass(frozen=True)
class Statistics:
    """A Gaussian fitted to features.

    Attributes:
      mean_D: [D] float64.
      covariance_DD: [D, D] float64, divided by N - 1.
      number: N, the vectors that it was fitted to.
      extractor: name of what made the features.
    """

    mean_D: np.ndarray
    covariance_DD: np.ndarray
    number: int
    extractor: str


def statistics(features_ND: np.ndarray, extractor: str) -> Statistics:
    """Mean and covariance of features [N, D], any real dtype.

    Raises:
      ValueError: for fewer than two vectors, or NaN.
    """
    x_ND = np.asarray(features_ND)
    pairs.check_features("given", x_ND, least=2)
    x_ND = x_ND.astype(np.float64)
    mean_D = np.mean(x_ND, axis=0)
    deviation_ND = x_ND - mean_D[None]
    covariance_DD = deviation_ND.T @ deviation_ND / (len(x_ND) - 1)
    return Statistics(mean_D, covariance_DD, len(x_ND), extractor)


def frechet_distance(real_ND: np.ndarray, generated_MD: np.ndarray) -> float:
    """:func:`frechet_of_statistics` of two sets of features by the same extractor.

    Raises:
      ValueError: for fewer than two vectors, sets of different width, or NaN.
    """
    sets = pairs.checked(real_ND, generated_MD, least=2)
    return frechet_of_statistics(*(statistics(x, "the same") for x in sets))


def frechet_of_statistics(real: Statistics, generated: Statistics) -> float:
    """|mu - mu'|^2 + tr(S + S' - 2 (S S')^(1/2)) (Dowson and Landau 1982).

    tr (S S')^(1/2) is the sum of the roots of the eigenvalues of S^(1/2) S' S^(1/2), that is, of
    the singular values of S^(1/2) S'^(1/2): nothing is inverted, and S may be singular.

    Raises:
      ValueError: if the statistics are of different extractors or sizes.
    """
    if real.extractor != generated.extractor:
        raise ValueError(
            f"statistics of different features: {real.extractor!r} and {generated.extractor!r};"
            " compute both with the same extractor"
        )
    if real.mean_D.shape != generated.mean_D.shape:
        raise ValueError(
            f"statistics of {real.mean_D.size} and of {generated.mean_D.size} features"
        )
    roots_DD = _root(real.covariance_DD) @ _root(generated.covariance_DD)
    cross = np.sum(np.linalg.svd(roots_DD, compute_uv=False))
    traces = np.trace(real.covariance_DD) + np.trace(generated.covariance_DD)
    shift = np.sum((real.mean_D - generated.mean_D) ** 2)
    return max(float(shift + traces - 2 * cross), 0.0)  # below 0 is rounding


def save_statistics(found: Statistics, path: str | pathlib.Path) -> None:
    """Writes statistics as .npz; ``path`` must end so."""
    if pathlib.Path(path).suffix != ".npz":
        raise ValueError(f"statistics are kept in an .npz file; {path} has another ending")
    np.savez(path, **{name: np.asarray(x) for name, x in vars(found).items()})  # pyright: ignore[reportArgumentType]


def load_statistics(path: str | pathlib.Path, extractor: str) -> Statistics:
    """Reads what :func:`save_statistics` wrote.

    Args:
      path: of the file.
      extractor: name of the extractor that the statistics are going to be compared with.

    Raises:
      ValueError: if the file is of another extractor, or holds no statistics.
    """
    names = [field.name for field in dataclasses.fields(Statistics)]
    with np.load(path) as file:
        missing = [name for name in names if name not in file.files]
        if missing:
            raise ValueError(f"{path} holds no statistics: it lacks {', '.join(missing)}")
        values = {name: file[name] for name in names}
    found = Statistics(
        values["mean_D"], values["covariance_DD"], int(values["number"]), str(values["extractor"])
    )
    if found.extractor != extractor:
        raise ValueError(
            f"{path} has statistics of the features {found.extractor!r}, not of {extractor!r}:"
            " compute them again"
        )
    return found


def _root(covariance_DD: np.ndarray) -> np.ndarray:
    """The symmetric square root; eigenvalues that cannot be told from 0 are 0."""
    values_D, vectors_DD = np.linalg.eigh(covariance_DD)
    smallest = len(values_D) * np.finfo(np.float64).eps * max(values_D[-1], 0.0)
    roots_D = np.sqrt(np.where(values_D > smallest, values_D, 0.0))
    return (vectors_DD * roots_D[None]) @ vectors_DD.T
