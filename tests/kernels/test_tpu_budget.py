"""The budget of the TPU kernels: counting, comparing, messages. Compiling needs libtpu."""

import json
import subprocess
import sys

from scanax.kernels import tpu_budget

PROGRAM = """
// a listing
   0x0 LB: > { %s1 = something }
   0x1   : > { %s2 = something }
   0x2 LB: >> { %s3 = in a loop over heads }
   0x3   : { %s4 = before the grid }
"""


def test_loops_count_as_often_as_they_run():
    assert tpu_budget.executed(PROGRAM, 1) == 3
    assert tpu_budget.executed(PROGRAM, 4) == 6


def test_what_is_too_long_or_unknown_is_named():
    budget = {"v5e": {"a": 100, "b": 100}}
    assert tpu_budget.over_budget({"v5e": {"a": 105, "b": 60}}, budget) == []
    found = tpu_budget.over_budget({"v5e": {"a": 106}, "v6e": {"a": 1}}, budget)
    assert found == ["v5e a: 106 bundles, budget 100", "v6e a: no budget; --update writes one"]


def test_every_kernel_has_a_budget_on_every_chip():
    bundles = json.loads(tpu_budget.BUDGET.read_text())["bundles"]
    assert set(bundles) == set(tpu_budget.TOPOLOGIES)
    assert all(set(kernels) == set(map(str, tpu_budget.cases())) for kernels in bundles.values())


def test_unknown_chip():
    command = [sys.executable, "-m", "scanax.kernels.tpu_budget", "--chips=v9"]
    wrong = subprocess.run(command, text=True, stderr=subprocess.PIPE, check=False)
    assert wrong.returncode == 2 and "error: 'v9': chips are v5e, v5p, v6e" in wrong.stderr
