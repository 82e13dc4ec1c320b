"""What a router does: how sure it is, how its layers hang together, how the experts differ.

Dimensions: L layers, T tokens, E experts, J chosen, D hidden.

Functions of arrays on the host, in float64 whatever comes in. Figures of single tokens are heavy
tailed: report medians over tokens (Qiu et al. 2024, appendix).
"""

from collections.abc import Sequence
import itertools

import numpy as np

BINS = np.linspace(0, 1, 100)  # edges between the labels of ``mi_paper``
CHUNK = 4096  # tokens that ``mi_paper`` compares the experts of at once


def entropy(probs) -> np.ndarray:
    """Of the probabilities [..., E]: [...] nats, at most ln E."""
    p = np.asarray(probs, np.float64)
    return -np.sum(p * np.log(np.where(p > 0, p, 1)), axis=-1)


def inner_balance(probs) -> np.ndarray:
    """IB, the highest probability over the second highest: [...], at least 1."""
    top = np.sort(np.asarray(probs, np.float64), axis=-1)
    second = top[..., -2] if top.shape[-1] > 1 else 0
    return top[..., -1] / np.maximum(second, np.finfo(np.float64).tiny)


def outer_balance(probs, choices: int) -> np.ndarray:
    """OB, the sum of the J highest probabilities: [...], at most 1."""
    top = np.sort(np.asarray(probs, np.float64), axis=-1)
    return top[..., -choices:].sum(axis=-1)


def selection_frequency(index, experts: int) -> np.ndarray:
    """Share of the assignments [L, T, J] that went to each expert: [L, E], each row sums to 1."""
    return np.stack([np.bincount(i.reshape(-1), minlength=experts) / i.size for i in index])


def mi_paper(probs) -> np.ndarray:
    """The paper's mutual information between layers: [L, L] nats, of probabilities [L, T, E].

    For each token the E probabilities of a layer are put into 100 bins; the labels of the experts
    in two layers are two lists of length E, whose plug-in mutual information is averaged over
    tokens. The diagonal is the entropy of the labels. It is not the mutual information of the
    choices: it grows with flatter probabilities, whatever they depend on. See :func:`mi_top1`.
    """
    layers, tokens = np.shape(probs)[:2]
    own_L, both_LL = np.zeros(layers), np.zeros((layers, layers))
    for start in range(0, tokens, CHUNK):
        chunk = np.asarray(probs[:, start : start + CHUNK], np.float64)
        labels_LTE = np.digitize(chunk, BINS).astype(np.uint8)
        same_LTEE = labels_LTE[..., :, None] == labels_LTE[..., None, :]
        own_L += [_label_entropy(same) for same in same_LTEE]
        for i, j in itertools.combinations(range(layers), 2):
            both_LL[i, j] += _label_entropy(same_LTEE[i] & same_LTEE[j])
    found = np.triu(own_L[:, None] + own_L - both_LL, 1)
    return (found + found.T + np.diag(own_L)) / tokens


def _label_entropy(same_TEE) -> float:
    """Of which experts have the same label: the entropy of the labels, summed over tokens."""
    count_TE = np.count_nonzero(same_TEE, axis=-1)  # of experts with one's own label
    return float(count_TE.shape[0] * np.log(count_TE.shape[1]) - np.log(count_TE).mean(1).sum())


def mi_top1(top1, experts: int) -> np.ndarray:
    """Mutual information over tokens of the first choices [L, T] of two layers: [L, L] nats.

    The plug-in estimate, which is too high by about (E - 1)^2 / 2T for independent layers.
    """
    top1 = np.asarray(top1)
    layers, tokens = top1.shape
    found = np.empty((layers, layers))
    for i in range(layers):
        for j in range(layers):
            joint = np.bincount(experts * top1[i] + top1[j], minlength=experts**2) / tokens
            joint = joint.reshape(experts, experts)
            found[i, j] = entropy(joint.sum(1)) + entropy(joint.sum(0)) - entropy(joint.ravel())
    return found


def shuffled(x, seed: int = 0) -> np.ndarray:
    """[L, T, ...] with the tokens of each layer in an order of its own.

    The information between layers that is left is what :func:`mi_paper` or :func:`mi_top1` find
    without layers deciding on the same tokens. The diagonals stay as they are.
    """
    order = np.random.default_rng(seed)
    return np.stack([order.permutation(layer) for layer in x])


def expert_similarity(matrices: Sequence, normalise: bool = True) -> tuple[float, np.ndarray]:
    """How alike the experts of a layer are: the mean of all entries, and the matrix [E, E].

    An expert is the concatenation of the means of its matrices over the expert's width, each of
    length 1 if ``normalise``; an entry is the inner product of two experts. Identical ones give
    the number of matrices, random ones that number over E, by the diagonal.

    Args:
      matrices: arrays [E, D, F] or [E, F, D], each with the axis of length F last: for example
        (up, gate, down transposed).
      normalise: see above.
    """
    parts = [np.asarray(m, np.float64).mean(axis=2) for m in matrices]
    if normalise:
        norms = [np.linalg.norm(part, axis=1, keepdims=True) for part in parts]
        parts = [
            part / np.where(norm > 0, norm, 1) for part, norm in zip(parts, norms, strict=True)
        ]
    experts_ED = np.concatenate(parts, axis=1)
    found = experts_ED @ experts_ED.T
    return float(found.mean()), found


def drop_ratio(keep) -> np.ndarray:
    """Share of the assignments [L, T, J] that found no place: [L]."""
    keep = np.asarray(keep)
    return 1 - keep.reshape(len(keep), -1).mean(axis=1)
