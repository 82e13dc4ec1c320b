"""Metrics between sets of features: recorded values, properties, and what is refused."""

import pathlib

import numpy as np
import pytest

from scanax.train import metrics
from scanax.train.metrics import pairs

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "rectflow"
VALUES, GAUSSIANS = (dict(np.load(GOLDEN / f"{name}.npz")) for name in ("metrics", "fid_stats"))
A, B, LINES = VALUES["A"], VALUES["B"], VALUES["proj"]


def normal(seed: int, number: int, size: int = 5, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((number, size)) + shift


# name -> (real, generated) -> value; all of them take any two sets.
METRICS = {
    "energy_V": lambda a, b: metrics.energy_distance(a, b),
    "energy_U": lambda a, b: metrics.energy_distance(a, b, unbiased=True),
    "mmd2_V_rbf_s0.5": lambda a, b: metrics.mmd2_rbf(a, b, 0.5, unbiased=False),
    "mmd2_U_rbf_s0.5": lambda a, b: metrics.mmd2_rbf(a, b, 0.5),
    "mmd2_V_rbf_s1": lambda a, b: metrics.mmd2_rbf(a, b, 1.0, unbiased=False),
    "mmd2_U_rbf_s1": lambda a, b: metrics.mmd2_rbf(a, b, 1.0),
    "mmd2_V_rbf_s2": lambda a, b: metrics.mmd2_rbf(a, b, 2.0, unbiased=False),
    "mmd2_U_rbf_s2": lambda a, b: metrics.mmd2_rbf(a, b, 2.0),
    "kid_poly3_U": metrics.kid,
    "sw1_equalN": lambda a, b: metrics.sliced_wasserstein(a, b, order=1, projections=LINES),
    "sw2_equalN": lambda a, b: metrics.sliced_wasserstein(a, b, order=2, projections=LINES),
    **{
        f"{name}_k{k}": lambda a, b, name=name, k=k: getattr(
            metrics.neighbour_metrics(a, b, k=k), name
        )
        for name in metrics.Neighbours._fields
        for k in (3, 5)
    },
}


@pytest.mark.parametrize("name", METRICS)
def test_recorded_value(name):
    assert abs(METRICS[name](A, B) - VALUES[name]) <= 1e-10


def test_every_recorded_value_is_tested():
    assert {*METRICS, "A", "B", "proj"} == set(VALUES)


@pytest.mark.parametrize("name", METRICS)
def test_blocks_do_not_change_values(name, monkeypatch):
    """Rows fall into blocks of 3 of 80: the last one is shorter."""
    monkeypatch.setattr(pairs, "BLOCK", 3 * len(A))
    monkeypatch.setattr(metrics.distances, "LINES", 5)
    assert len(list(pairs.blocks(80, 80))) == 27
    assert abs(METRICS[name](A, B[:71]) - unblocked(name)) <= 1e-12


def unblocked(name: str) -> float:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "BLOCK", 1 << 22)
        patch.setattr(metrics.distances, "LINES", 1 << 22)
        return METRICS[name](A, B[:71])


@pytest.mark.parametrize("name", METRICS)
def test_order_of_vectors_does_not_matter(name):
    shuffle = np.random.default_rng(0).permutation
    assert abs(METRICS[name](shuffle(A), shuffle(B[:70])) - METRICS[name](A, B[:70])) <= 1e-10


@pytest.mark.parametrize("name", [n for n in METRICS if "kid" not in n])
def test_a_shift_of_both_sets_does_not_matter(name):
    """A large one: naive squared distances would lose all digits."""
    shift = np.full((1, A.shape[1]), 1e5)
    assert abs(METRICS[name](A + shift, B + shift) - METRICS[name](A, B)) <= 1e-8


@pytest.mark.parametrize("name", [n for n in METRICS if "_V" in n or n.startswith("sw")])
def test_equal_sets_have_distance_zero(name):
    assert abs(METRICS[name](A, A)) <= 1e-12
    assert METRICS[name](A, B) > 1e-3


def test_equal_sets_are_precise_and_complete():
    found = metrics.neighbour_metrics(A, A, k=4)
    assert found.precision == found.recall == found.coverage == 1
    inside = squared(A) <= np.sort(squared(A), axis=1)[:, 4]
    assert abs(found.density - inside.sum() / (4 * len(A))) <= 1e-12
    far = metrics.neighbour_metrics(A, A + 1e3, k=4)
    assert far == (0, 0, 0, 0)


def squared(x: np.ndarray) -> np.ndarray:
    return ((x[:, None] - x[None]) ** 2).sum(-1)


def test_copies_of_an_image_are_inside_their_own_balls():
    """Balls of radius 0: exact only because distances that are rounding are 0."""
    real = np.repeat(normal(0, 1, 64, 30.0), 12, axis=0)
    real = np.concatenate([real, normal(1, 20, 64, 30.0)])
    assert metrics.neighbour_metrics(real, real[:12], k=3).precision == 1


def test_collapse_is_precise_and_not_complete():
    a = normal(0, 300)
    collapsed = a[:1] + 0.05 * normal(1, 200)
    found = metrics.neighbour_metrics(a, collapsed, k=5)
    assert found.precision > 0.9 and found.recall < 0.05 and found.coverage < 0.1
    assert found.density > 1
    swapped = metrics.neighbour_metrics(collapsed, a, k=5)
    assert (swapped.precision, swapped.recall) == (found.recall, found.precision)


def test_unbiased_forms_are_zero_on_average():
    """Mean over 400 draws of equal distributions within four standard errors; V forms are not."""
    draws = [(normal(2 * i, 8, 3), normal(2 * i + 1, 12, 3)) for i in range(400)]
    for name in ("energy_U", "mmd2_U_rbf_s1", "kid_poly3_U"):
        values = [METRICS[name](a, b) for a, b in draws]
        assert abs(np.mean(values)) <= 4 * np.std(values) / np.sqrt(len(values)), name
    assert min(METRICS["energy_V"](a, b) for a, b in draws) > 0


def test_frechet_distance_recorded():
    a, b = GAUSSIANS["featA"], GAUSSIANS["featB"]
    assert abs(metrics.frechet_distance(a, b) / GAUSSIANS["fid"] - 1) <= 1e-8
    found = metrics.statistics(a, "x")
    np.testing.assert_allclose(found.mean_D, GAUSSIANS["muA"], rtol=1e-8)
    np.testing.assert_allclose(found.covariance_DD, GAUSSIANS["covA"], rtol=1e-8)


def test_frechet_distance_of_known_gaussians():
    """In one dimension (mu - mu')^2 + (s - s')^2, where the variance is divided by N - 1."""
    a, b = np.asarray([[-1.0], [1.0]]), np.asarray([[3.0], [5.0], [7.0]])
    want = 5.0**2 + (np.sqrt(2) - np.sqrt(4)) ** 2
    assert abs(metrics.frechet_distance(a, b) - want) <= 1e-12


def test_frechet_distance_of_singular_covariances():
    """tr (S S')^(1/2) is the nuclear norm of X Y^T, X and Y centred: no roots of matrices."""
    a, b = normal(0, 20, 50), normal(1, 12, 50, 1.0) * 3
    x, y = (z - z.mean(0, keepdims=True) for z in (a, b))
    x, y = x / np.sqrt(len(x) - 1), y / np.sqrt(len(y) - 1)
    want = ((a.mean(0) - b.mean(0)) ** 2).sum() + (x**2).sum() + (y**2).sum()
    want -= 2 * np.linalg.norm(x @ y.T, "nuc")
    assert abs(metrics.frechet_distance(a, b) / want - 1) <= 1e-10
    assert metrics.frechet_distance(a, a) <= 1e-10
    constant = np.ones((5, 50))
    want = ((a.mean(0) - 1) ** 2).sum() + (x**2).sum()
    assert abs(metrics.frechet_distance(constant, a) / want - 1) <= 1e-10


def test_frechet_distance_turns_with_the_features():
    a, b = normal(0, 40), normal(1, 50, shift=0.3)
    turn, _ = np.linalg.qr(normal(2, 5))
    want = metrics.frechet_distance(a, b)
    assert abs(metrics.frechet_distance(a @ turn, b @ turn) - want) <= 1e-10
    assert abs(metrics.frechet_distance(2 * a, 2 * b) - 4 * want) <= 1e-10
    assert abs(metrics.frechet_distance(b, a) - want) <= 1e-10


def test_statistics_are_kept_with_their_extractor(tmp_path):
    found = metrics.statistics(A, "pixels-v1")
    metrics.save_statistics(found, tmp_path / "real.npz")
    loaded = metrics.load_statistics(tmp_path / "real.npz", "pixels-v1")
    np.testing.assert_array_equal(loaded.mean_D, found.mean_D)
    np.testing.assert_array_equal(loaded.covariance_DD, found.covariance_DD)
    assert (loaded.number, loaded.extractor) == (len(A), "pixels-v1")
    with pytest.raises(ValueError, match=r"features 'pixels-v1', not of 'pca': compute them again"):
        metrics.load_statistics(tmp_path / "real.npz", "pca")
    with pytest.raises(ValueError, match="different features: 'pixels-v1' and 'pca'"):
        metrics.frechet_of_statistics(found, metrics.statistics(B, "pca"))
    with pytest.raises(ValueError, match="of 4 and of 2 features"):
        metrics.frechet_of_statistics(found, metrics.statistics(B[:, :2], "pixels-v1"))
    np.savez(tmp_path / "other.npz", mean_D=found.mean_D)
    with pytest.raises(ValueError, match="lacks covariance_DD, number, extractor"):
        metrics.load_statistics(tmp_path / "other.npz", "pixels-v1")
    with pytest.raises(ValueError, match="another ending"):
        metrics.save_statistics(found, tmp_path / "real.npy")


def test_sliced_wasserstein_of_unequal_numbers():
    """Copies of a set are the same distribution; for other numbers, Dirac masses by hand."""
    one = lambda a, b, order: metrics.sliced_wasserstein(a, b, order=order, projections=LINES)
    for order in (1, 2):
        assert abs(one(np.repeat(A, 3, 0), B, order) - one(A, B, order)) <= 1e-12
    line = {"projections": np.ones((1, 1)), "order": 1}
    zeros, others = np.zeros((2, 1)), np.asarray([[0.0], [3.0], [6.0]])
    assert abs(metrics.sliced_wasserstein(zeros, others, **line) - 3) <= 1e-12
    two = np.asarray([[0.0], [6.0]])  # quantiles: 0 against 0, 3; 6 against 3, 6
    assert abs(metrics.sliced_wasserstein(two, others, **line) - 1) <= 1e-12


def test_drawn_projections_are_unit_vectors_of_a_seed():
    """A shift of all vectors by s has W_p = E|u s|^p: for p = 2, |s|^2 / D."""
    shift = np.zeros((1, 4))
    shift[0, 0] = 2.0
    draw = lambda seed: metrics.sliced_wasserstein(
        A, A + shift, order=2, projections=4096, seed=seed
    )
    assert abs(draw(0) - 1.0) < 0.03
    assert draw(0) == draw(0) != draw(1)


def test_kid_of_subsets():
    """All vectors at once are the whole U statistic; smaller subsets agree within their error."""
    whole = metrics.kid(A, B)
    same = metrics.kid_of_subsets(A, B, subsets=2, subset_size=80)
    assert abs(same.mean - whole) <= 1e-10 and same.standard_error <= 1e-10
    some = metrics.kid_of_subsets(A, B, subsets=50, subset_size=40, seed=3)
    assert 0 < some.standard_error < 0.2 and abs(some.mean - whole) <= 4 * some.standard_error
    assert some == metrics.kid_of_subsets(A, B, subsets=50, subset_size=40, seed=3)


def test_class_score():
    """Sure and diverse: the number of classes; unsure, or always the same: 1."""
    sure = np.tile(np.eye(4), (25, 1))
    assert abs(metrics.class_score(sure, splits=5).mean - 4) <= 1e-12
    assert abs(metrics.class_score(np.full((10, 4), 0.25)).mean - 1) <= 1e-12
    assert abs(metrics.class_score(np.repeat(sure[:1], 20, 0)).mean - 1) <= 1e-12
    p = np.asarray([[0.9, 0.1], [0.2, 0.8]])
    want = np.exp(np.mean([(row * np.log(row / p.mean(0))).sum() for row in p]))
    assert abs(metrics.class_score(p, splits=1).mean - want) <= 1e-12
    halves = metrics.class_score(np.concatenate([sure[:20], np.full((20, 4), 0.25)]), splits=2)
    assert abs(halves.mean - 2.5) <= 1e-12 and abs(halves.standard_error - 1.5) <= 1e-12


NAN = A.copy()
NAN[3, 1] = np.nan
MISTAKES = {
    "width": (lambda: metrics.kid(A, B[:, :2]), "real features have 4 .* generated ones 2"),
    "shape": (lambda: metrics.energy_distance(A[0], B), r"must be a matrix \[N, D\]"),
    "few": (lambda: metrics.frechet_distance(A[:1], B), "1 real feature .* at least 2"),
    "few statistics": (lambda: metrics.statistics(A[:1], "x"), "this needs at least 2"),
    "NaN": (lambda: metrics.frechet_distance(A, NAN), "1 of 80 generated .* not finite"),
    "NaN in neighbours": (lambda: metrics.neighbour_metrics(NAN, B), "1 of 80 real"),
    "neighbours": (lambda: metrics.neighbour_metrics(A, B[:3], k=3), "needs at least 4"),
    "no neighbours": (lambda: metrics.neighbour_metrics(A, B, k=0), "k must be at least 1"),
    "sigma": (lambda: metrics.mmd2_rbf(A, B, 0.0), "sigma must be positive"),
    "order": (lambda: metrics.sliced_wasserstein(A, B, order=3), "order must be 1 or 2"),
    "projections": (
        lambda: metrics.sliced_wasserstein(A, B, order=1, projections=LINES[:, :3]),
        r"must be \[L, 4\]",
    ),
    "no projections": (
        lambda: metrics.sliced_wasserstein(A, B, order=1, projections=0),
        "at least 1",
    ),
    "subset": (lambda: metrics.kid_of_subsets(A, B, subset_size=81), "make it smaller"),
    "subsets": (lambda: metrics.kid_of_subsets(A, B, subsets=1), "two of each"),
    "rows": (lambda: metrics.class_score(np.ones((20, 2))), "sum to 1"),
    "splits": (lambda: metrics.class_score(np.ones((5, 1))), "N >= splits"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(name):
    function, message = MISTAKES[name]
    with pytest.raises(ValueError, match=message):
        function()
