"""Analyses of routing against the published formulas, and on routers that are easy to think of."""

import numpy as np

from scanax.models.rmoe import analysis


def test_published_figures(golden):
    file = dict(np.load(golden / "rmoe" / "analysis.npz"))
    close = lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-13)
    probs, index = file["probs"], file["topk_idx"]
    close(analysis.entropy(probs), file["entropy"])
    close(analysis.inner_balance(probs), file["IB_per_token"])
    close(analysis.outer_balance(probs, 2), file["OB_per_token"])
    close(np.median(analysis.inner_balance(probs)), file["IB_median"])
    close(np.median(analysis.outer_balance(probs, 2)), file["OB_median"])
    close(analysis.mi_paper(probs), file["MI_paper"])
    close(analysis.mi_top1(index[..., 0], 16), file["MI_top1_tokens"])
    close(analysis.selection_frequency(index, 16), file["freq"])
    w1, w3, w2 = (file[n] for n in ("w1", "w3", "w2"))  # [E, F, D], [E, F, D], [E, D, F]
    gated = [w1.swapaxes(1, 2), w3.swapaxes(1, 2), w2]
    mean, matrix = analysis.expert_similarity(gated)
    close(mean, file["expert_sim_swiglu"])
    close(matrix, file["expert_sim_swiglu_matrix"])
    close(analysis.expert_similarity([gated[0], w2])[0], file["expert_sim_2mat"])
    plain = analysis.expert_similarity([gated[0], w2], normalise=False)[0]
    close(plain, file["expert_sim_2mat_unnormed"])
    for factor in ("0.5", "1.0", "1.25"):
        for policy in ("score", "position"):
            keep, ratio = (file[f"cap{factor}.{policy}.{n}"] for n in ("keep", "drop_ratio"))
            close(analysis.drop_ratio(keep), ratio)


def test_flat_and_sharp_routers():
    flat = np.full((2, 5, 8), 1 / 8)
    np.testing.assert_allclose(analysis.entropy(flat), np.log(8))
    np.testing.assert_allclose(analysis.inner_balance(flat), 1)
    np.testing.assert_allclose(analysis.outer_balance(flat, 2), 2 / 8)
    sharp = np.eye(8)[np.random.default_rng(0).integers(0, 8, (2, 5))]
    np.testing.assert_allclose(analysis.entropy(sharp), 0, atol=1e-12)
    np.testing.assert_allclose(analysis.outer_balance(sharp, 2), 1)
    assert np.isfinite(analysis.inner_balance(sharp)).all()
    # Nearly all labels of sharp probabilities are alike: the paper's figure is small, whatever the
    # choices have to do with each other.
    assert analysis.mi_paper(sharp).max() <= -(1 / 8 * np.log(1 / 8) + 7 / 8 * np.log(7 / 8)) + 1e-9


def test_information_between_layers():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 8, 4096)
    top1 = np.stack([first, (first + 3) % 8, rng.integers(0, 8, 4096)])
    found = analysis.mi_top1(top1, 8)
    histogram = np.bincount(first) / 4096
    np.testing.assert_allclose(found[0, 0], analysis.entropy(histogram))
    np.testing.assert_allclose(found[0, 1], found[0, 0])  # a function of the first layer
    assert abs(found[0, 2]) < 0.02  # independent of it
    np.testing.assert_allclose(found, found.T, atol=1e-12)


def test_similarity_of_equal_and_random_experts():
    rng = np.random.default_rng(0)
    same = [np.repeat(rng.normal(size=(1, 6, 5)), 16, axis=0) for _ in range(3)]
    np.testing.assert_allclose(analysis.expert_similarity(same)[0], 3)
    other = [rng.normal(size=(16, 600, 5)) for _ in range(3)]
    assert abs(analysis.expert_similarity(other)[0] - 3 / 16) < 0.02


def test_information_does_not_depend_on_the_size_of_chunks(monkeypatch):
    probs = np.random.default_rng(0).dirichlet(np.full(8, 0.3), size=(3, 50))
    whole = analysis.mi_paper(probs)
    monkeypatch.setattr(analysis, "CHUNK", 7)
    np.testing.assert_allclose(analysis.mi_paper(probs), whole, rtol=1e-12)
    each = np.mean([analysis.mi_paper(probs[:, t : t + 1]) for t in range(50)], axis=0)
    np.testing.assert_allclose(whole, each, rtol=1e-12)


def test_shuffled_tokens_tell_nothing_of_other_layers():
    """Nothing of choices; of the paper's figure, what sorted probabilities have in common stays."""
    rng = np.random.default_rng(0)
    probs = np.repeat(rng.dirichlet(np.full(8, 0.3), size=(1, 4096)), 2, axis=0)
    top1 = probs.argmax(axis=-1)
    mixed = analysis.shuffled(top1)
    np.testing.assert_array_equal(np.sort(mixed), np.sort(top1))
    found, chance = analysis.mi_top1(top1, 8), analysis.mi_top1(mixed, 8)
    assert found[0, 1] > 2 and chance[0, 1] < 0.02
    np.testing.assert_allclose(np.diag(chance), np.diag(found))
    alike = np.sort(probs)  # the same expert is always the likeliest
    assert analysis.mi_paper(analysis.shuffled(alike))[0, 1] > 0.3
