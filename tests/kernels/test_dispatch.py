"""A name runs or raises; None takes the first implementation that fits."""

import jax
import pytest

from scanax import kernels
from scanax.kernels import dispatch
from scanax.kernels.additive_scan import api as additive_api
from scanax.kernels.convolution import api as convolution_api
from scanax.kernels.delta_product import api as delta_api
from scanax.kernels.short_convolution import api as short_api

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


def test_the_target_is_what_the_ambient_mesh_consists_of():
    assert dispatch.target() == (PLATFORM, jax.devices()[0].device_kind)
    device = jax.sharding.AbstractDevice("TPU v6e", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((2,), ("data",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert dispatch.target() == ("tpu", "TPU v6e")
        q = jax.ShapeDtypeStruct((2, 4, 1, 16), "float32")
        text = str(jax.make_jaxpr(kernels.additive_scan)(q, q, q))
    assert "ffi_call" not in text


ROWS = [
    {"operation": "op", "device": "a", "tokens": 16, "width": 64, "fastest": "slow"},
    {"operation": "op", "device": "a", "tokens": 4096, "width": 64, "fastest": "timed"},
    {"operation": "op", "device": "b", "tokens": 16, "width": 64, "fastest": "fast"},
    {"operation": "other", "device": "a", "tokens": 100, "width": 64, "fastest": "fast"},
]


@pytest.fixture
def measured(monkeypatch):
    """Measurements of the device that runs the test."""
    here = jax.devices()[0].device_kind
    rows = [{**row, "device": here if row["device"] == "a" else "b"} for row in ROWS]
    monkeypatch.setattr(dispatch, "_measurements", lambda: rows)
    dispatch.fastest_measured.cache_clear()
    yield
    dispatch.fastest_measured.cache_clear()


def test_the_nearest_measurement_decides(measured):
    timed = dispatch.Implementation(lambda x: ("timed", x), measured=True)
    table = {"timed": timed, **TABLE}
    assert dispatch.call("op", table, None, 3, size=(20, 32)) == ("slow", 3)
    assert dispatch.call("op", table, None, 3, size=(2000, 64)) == ("timed", 3)
    assert dispatch.call("unmeasured", table, None, 3, size=(2000, 64)) == ("fast", 3)


def test_what_cannot_run_is_replaced_with_one_logged_reason(measured, caplog):
    busy = dispatch.Implementation(lambda x: ("timed", x), lambda x: "it is busy", measured=True)
    caplog.set_level("INFO", "absl")
    dispatch._log_once.cache_clear()
    for _ in range(2):
        assert dispatch.call("op", {**TABLE, "timed": busy}, None, 3, size=(4096, 64))[0] == "fast"
    assert [r.getMessage() for r in caplog.records] == [
        "op: 'fast' in place of 'timed', because it is busy"
    ]


def test_every_measured_default_is_an_implementation():
    tables = {
        "delta_product": delta_api.IMPLEMENTATIONS,
        "additive_scan": additive_api.IMPLEMENTATIONS,
        "convolution_3x3": convolution_api.IMPLEMENTATIONS,
        "short_convolution": short_api.IMPLEMENTATIONS,
    }
    for row in dispatch._measurements():
        assert row["fastest"] in tables[row["operation"]]
