"""Checksums: any flipped bit shows, sharding does not."""

import jax
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from scanax.train.checksum import tree_checksums
from scanax.train.mesh import MeshConfig, make_mesh

DTYPES = ("float32", "bfloat16", "int32", "uint8", "bool", "float16")


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_flipped_bit_changes_the_checksum(dtype):
    array = (np.arange(12).reshape(3, 4) % 7).astype(jax.numpy.dtype(dtype))
    original = tree_checksums({"a": jax.numpy.asarray(array)})
    seen = {original["a"]}
    bits = 1 if dtype == "bool" else 8
    for byte in range(array.nbytes):
        for bit in range(bits):
            changed = array.copy()
            changed.view(np.uint8).reshape(-1)[byte] ^= 1 << bit
            seen.add(tree_checksums({"a": jax.numpy.asarray(changed)})["a"])
    assert len(seen) == 1 + bits * array.nbytes


def test_swapped_values_change_the_checksum():
    swapped = np.asarray([2.0, 1.0, 3.0], np.float32)
    sums = [tree_checksums({"a": jax.numpy.asarray(x)}) for x in (np.sort(swapped), swapped)]
    assert sums[0] != sums[1]


def test_the_same_on_every_mesh():
    array = np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=1, expert=1, sequence=1))
    specs = (PartitionSpec(), PartitionSpec("data"), PartitionSpec("fsdp", "data"))
    sums = [
        tree_checksums({"a": jax.device_put(array, NamedSharding(mesh, spec))}) for spec in specs
    ]
    assert sums[0] == sums[1] == sums[2]
    assert tree_checksums({"a": jax.numpy.asarray(array)}) == sums[0]
