"""Groups of the word problems against the tables of the published group library."""

import numpy as np
import pytest

from scanax.models.delta_product import groups


@pytest.mark.parametrize("name", groups.NAMES)
def test_tables_and_labels(golden, name):
    want = np.load(golden / f"deltaproduct/word_{name}.npz")
    group = groups.group(name)
    assert group.order == len(want["perm"])
    np.testing.assert_array_equal(group.permutations, want["perm"])
    np.testing.assert_array_equal(group.product, want["mult_table"])
    elements = np.arange(group.order)
    assert np.all(group.product[elements, want["inverse"]] == 0)
    assert np.all(group.product[want["inverse"], elements] == 0)
    labels = groups.prefix_products(group, want["inputs"])
    assert labels.dtype == want["inputs"].dtype
    np.testing.assert_array_equal(labels, want["labels"])


def test_unknown_group():
    with pytest.raises(ValueError, match="unknown group 'S6'; choose one of S3, S4, A5, S5"):
        groups.group("S6")
