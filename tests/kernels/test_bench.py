"""The benchmark runs, and its table has the ratios."""

import pytest

from scanax.kernels import bench


def test_rows_and_table():
    rows = bench.benchmark((1, 12, 2, 4, 8, 2), gated=True, repetitions=2)
    assert {(row["what"], row["implementation"]) for row in rows} == {
        (what, name) for what in ("forward", "forward+backward") for name in ("reference", "xla")
    }
    for row in rows:
        assert row["milliseconds"] > 0 and row["over_floor"] > 0
        if row["implementation"] == "reference":
            assert row["reference_over_this"] == 1
    assert bench.table(rows).count("\n") == len(rows) + 1


def test_flops_of_the_definition():
    assert bench.flops((4, 2048, 4, 64, 64, 1)) == 8 * 4 * 2048 * 4 * 64 * 64


@pytest.mark.parametrize("text", ["4,2048", "a,b,c,d,e,f", "1,0,1,1,1,1", ""])
def test_malformed_shape(text):
    with pytest.raises(ValueError, match="six positive integers"):
        bench.parse_shape(text)
