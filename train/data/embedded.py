"""Data that every machine has: nothing is downloaded.

The text is CPython's own documentation of its keywords and topics, about 0.46 MB of English;
it differs between Python versions, and so does its fingerprint. The images are scikit-learn's
1,797 digits of 8 x 8 pixels.
"""

from typing import Any

import numpy as np


def text() -> list[str]:
    """The documents, in the order of their names."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Images [1797, 8, 8, 1] uint8, 0 .. 255, and labels [1797] int32."""
    from sklearn.datasets import load_digits  # scipy behind it takes a second to import

    data: Any = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)
    return images[..., None], data.target.astype(np.int32)
