"""A name runs or raises; None takes the first implementation that fits."""

import jax
import pytest

from scanax.kernels import dispatch

PLATFORM = jax.default_backend()
TABLE = {
    "fast": dispatch.Implementation(
        lambda x: ("fast", x), lambda x: None if x < 10 else "x must be below 10"
    ),
    "elsewhere": dispatch.Implementation(lambda x: ("elsewhere", x), platforms=("moon",)),
    "slow": dispatch.Implementation(lambda x: ("slow", x)),
}


def test_none_takes_the_first_that_fits():
    assert dispatch.call("op", TABLE, None, 3) == ("fast", 3)
    assert dispatch.call("op", TABLE, None, 30) == ("slow", 30)


def test_a_name_is_never_replaced():
    assert dispatch.call("op", TABLE, "elsewhere", 3) == ("elsewhere", 3)
    with pytest.raises(ValueError, match=r"'fast' does not support.*below 10.*'slow'"):
        dispatch.call("op", TABLE, "fast", 30)


def test_nothing_fits():
    with pytest.raises(ValueError, match=f"no implementation runs here on '{PLATFORM}'"):
        dispatch.call("op", {"fast": TABLE["fast"]}, None, 30)
