"""All metrics of generated images against real ones, as numbers and as a table.

Dimensions: N real, M generated images.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import distances, frechet, neighbours as neighbours_lib
from .features import INCEPTION, FeatureExtractor, check_images

# Keys of a report in the order of the table: what it says there, and its format.
ROWS = {
    "fid": ("FID", ".3f"),
    "frechet_distance": ("Frechet distance", ".4g"),
    "kid": ("kernel distance, cubic", ".4g"),
    "kid_stderr": ("  standard error", ".2g"),
    "precision": ("precision", ".3f"),
    "recall": ("recall", ".3f"),
    "density": ("density", ".3f"),
    "coverage": ("coverage", ".3f"),
    "energy_distance": ("energy distance", ".4g"),
    "sliced_wasserstein": ("sliced W2 of pixels", ".4g"),
    "real_count": ("real images", "d"),
    "generated_count": ("generated images", "d"),
    "statistics_count": ("real, in the Frechet distance", "d"),
    "pairs_limit": ("of each, in pairs, at most", "d"),
}


def evaluate(
    real: np.ndarray,
    generated: np.ndarray,
    extractor: FeatureExtractor,
    *,
    k: int = 3,
    kid_subsets: int = 100,
    kid_subset_size: int = 1000,
    projections: int = 512,
    pairs_limit: int = 10_000,
    seed: int = 0,
    real_statistics: frechet.Statistics | None = None,
) -> dict[str, Any]:
    """All metrics; for JSON.

    Every number is biased by the counts in its own way: compare reports of equal counts.

    Args:
      real, generated: [N, H, W, C] and [M, H, W, C] uint8, at least k + 1 and 4 of each.
      extractor: of the features of every metric but sliced_wasserstein, which compares pixels in
        [-1, 1] (order 2).
      k: of precision, recall, density and coverage.
      kid_subsets, kid_subset_size: of ``distances.kid_of_subsets``; the size is cut to half of
        the smaller set, lest all subsets be the same.
      projections: of sliced_wasserstein.
      pairs_limit: images of each set, from the first on, for metrics that compare all pairs:
        precision, recall, density, coverage, energy_distance (its V form).
      seed: of subsets and projections.
      real_statistics: of all real images by this extractor, for the Frechet distance; None to
        take those of ``real``.

    Returns:
      extractor, a name; real_count, generated_count; frechet_distance, and the same as fid if the
      extractor is Inception; kid, kid_stderr, precision, recall, density, coverage,
      energy_distance, sliced_wasserstein; statistics_count, the real images that the Frechet
      distance knows; and the settings.

    Raises:
      ValueError: for images that are not uint8 or differ in shape, too few of them, or
        statistics of another extractor.
    """
    _check(real, generated, max(k + 1, 4))
    a_ND, b_MD = extractor(real), extractor(generated)
    real_statistics = real_statistics or frechet.statistics(a_ND, extractor.name)
    found = frechet.statistics(b_MD, extractor.name)
    distance = frechet.frechet_of_statistics(real_statistics, found)
    size = min(kid_subset_size, min(len(real), len(generated)) // 2)
    kid = distances.kid_of_subsets(a_ND, b_MD, subsets=kid_subsets, subset_size=size, seed=seed)
    some = a_ND[:pairs_limit], b_MD[:pairs_limit]
    levels = (x.reshape(len(x), -1) for x in (real, generated))
    sliced = distances.sliced_wasserstein(*levels, order=2, projections=projections, seed=seed)
    return {
        "extractor": extractor.name,
        "real_count": len(real),
        "generated_count": len(generated),
        **({"fid": distance} if extractor.name.startswith(INCEPTION) else {}),
        "frechet_distance": distance,
        "kid": kid.mean,
        "kid_stderr": kid.standard_error,
        **neighbours_lib.neighbour_metrics(*some, k=k)._asdict(),
        "energy_distance": distances.energy_distance(*some),
        "sliced_wasserstein": sliced / 127.5,  # of levels: it scales with the values
        "statistics_count": real_statistics.number,
        "k": k,
        "kid_subsets": kid_subsets,
        "kid_subset_size": size,
        "projections": projections,
        "pairs_limit": pairs_limit,
        "seed": seed,
    }


def table(reports: Sequence[dict[str, Any]], labels: Sequence[str] = ()) -> str:
    """Reports side by side as text, a row per metric.

    Args:
      reports: as :func:`evaluate` returns them, or read from JSON.
      labels: heads of the columns; none for a single report.

    Raises:
      ValueError: if labels and reports differ in number.
    """
    labels = list(labels) or [""] * len(reports)
    if len(labels) != len(reports):
        raise ValueError(f"{len(labels)} labels for {len(reports)} reports")
    rows = [["", *labels]] if any(labels) else []
    for key, (text, form) in ROWS.items():
        if any(key in report for report in reports):
            cells = [format(report[key], form) if key in report else "-" for report in reports]
            rows.append([text, *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(reports) + 1)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    names = dict.fromkeys(report["extractor"] for report in reports)
    return "\n".join([*(f"features: {name}" for name in names), *lines])


def _check(real: np.ndarray, generated: np.ndarray, least: int) -> None:
    for name, images in (("real", real), ("generated", generated)):
        check_images(f"the {name}", images)
        if len(images) < least:
            raise ValueError(f"{len(images)} {name} images; the metrics need {least} at least")
    if real.shape[1:] != generated.shape[1:]:
        raise ValueError(
            f"real images are {real.shape[1:]}, generated ones {generated.shape[1:]}: bring them to"
            " one size"
        )
