"""The benchmarks run, and their tables have the ratios."""

import contextlib
import functools
import importlib.util
import itertools
import json
from pathlib import Path
import subprocess
import sys
import sysconfig
import venv

import chex
from delta_product_cases import IMPLEMENTATIONS
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scanax.kernels import bench, bench_decode, bench_linear, peers

# What is timed is not under test.
pytestmark = pytest.mark.usefixtures("hurried_compiler")

DELTA, ADDITIVE = bench.OPERATIONS["delta_product"], bench.OPERATIONS["additive_scan"]
CONVOLUTION, SHORT = bench.OPERATIONS["convolution_3x3"], bench.OPERATIONS["short_convolution"]
EXPERTS = bench.OPERATIONS["expert_mlp"]


@pytest.mark.parametrize("operation", [DELTA, ADDITIVE, CONVOLUTION, SHORT])
def test_rows_and_table(operation):
    shape = (1, 12, 2, 4, 8, 2)[: len(operation.dimensions.split(","))]
    rows = bench.benchmark(operation, shape, gated=True, repetitions=2, others={})
    here = set(IMPLEMENTATIONS) - ({"reference"} if operation.baseline == "xla" else set())
    assert {(row["what"], row["implementation"]) for row in rows} == {
        (what, name) for what in bench.WHATS for name in here
    }
    for row in rows:
        assert row["milliseconds"] > 0 and row["over_floor"] > 0
        if row["implementation"] == operation.baseline:
            assert row["baseline_over_this"] == 1
    assert bench.table(operation, rows).count("\n") == len(rows) + 1


def test_experts_are_counted_by_the_compiler():
    """ragged_dot on CPU computes all experts twice over, blocks and places little too much."""
    rows = bench.benchmark(EXPERTS, (512, 16, 16, 8, 2), gated=True, repetitions=1, others={})
    assert len(rows) == 2 * len(EXPERTS.implementations()) and "gmm" not in str(rows)
    for row in rows:
        assert row["temporary_mb"] > 0 and row["milliseconds"] > 0
        ratio = row["compiled_gflops"] / row["gflops"]
        name = row["implementation"]
        if name in ("dense", "ragged"):
            assert ratio > 4
        else:
            assert 1 < ratio < (2.5 if name == "block 128" else 2)
        assert (row["baseline_over_this"] == 1) == (name == "ragged")
    table = bench.table(EXPERTS, rows)
    assert "| ragged / this | compiled / GFLOP | temporary MB |" in table
    assert table.count("\n") == len(rows) + 1


def test_peers_are_checked_and_timed():
    def peer(wrong, closed):
        @contextlib.contextmanager
        def make(*arguments):
            o = np.asarray(DELTA.function(*arguments)[0]) + wrong
            yield peers.Peer(lambda: 0.5, lambda: 0.25, lambda: o)
            closed.append(True)

        return make

    closed = []
    rows = bench.benchmark(DELTA, (1, 6, 1, 4, 4, 2), False, 1, {"package": peer(0.0, closed)})
    assert closed and {row["implementation"] for row in rows} == {*IMPLEMENTATIONS, "package"}
    for row in rows:
        seconds = 0.5 if row["what"] == "forward" else 0.25
        assert row["peer_over_this"]["package"] == 1e3 * seconds / row["milliseconds"]
    assert "| package / this |" in bench.table(DELTA, rows)
    with pytest.raises(RuntimeError, match="package and ours differ by"):
        bench.benchmark(DELTA, (1, 6, 1, 4, 4, 2), False, 1, {"package": peer(1.0, [])})


# The benchmark times peers where a user has them; two gigabytes for one test are too much.
@pytest.mark.parametrize(
    ("operation", "name", "packages"),
    [
        ("delta_product", "transformers", ("torch", "transformers")),
        ("delta_product", "fla", ("torch", "einops", "fla")),
        ("additive_scan", "torch_gla", ("torch",)),
        ("convolution_3x3", "torch", ("torch",)),
        ("short_convolution", "torch", ("torch",)),
    ],
)
def test_peers_are_the_same_operation(operation, name, packages):
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"pip install {package} to compare with it")
    shape = (2, 70, 2, 8, 8, 2)[: len(bench.OPERATIONS[operation].dimensions.split(","))]
    peer = peers.installed(operation)[name]
    bench.benchmark(bench.OPERATIONS[operation], shape, True, 1, {name: peer})


FAKE_JLA = """
import jax.numpy as jnp
from scanax.kernels import delta_product

def linear_attention(kind, *, impl, q, k, v, g, beta=None):
    assert impl == "chunked"
    if kind == "gated_deltaproduct":
        k, v, beta = (x.reshape(*q.shape[:2], -1, *x.shape[2:]) for x in (k, v, beta))
        return delta_product(q, k, v, beta, g)
    assert kind == "gla"
    state, outputs = 0.0, []
    for t in range(q.shape[1]):
        state = jnp.exp(g[:, t, :, :, None]) * state + k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append(q.shape[-1] ** -0.5 * jnp.einsum("bhk,bhkv->bhv", q[:, t], state))
    return jnp.stack(outputs, axis=1), state
"""


@pytest.fixture
def python_with_jla(tmp_path):
    """An interpreter that has what this one has and a package jla, with our functions."""
    venv.create(tmp_path / "venv", symlinks=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")}))
    (packages / "jla").mkdir()
    (packages / "jla" / "__init__.py").touch()
    (packages / "jla" / "ops.py").write_text(FAKE_JLA)
    here = sysconfig.get_path("purelib")
    (packages / "here.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    return tmp_path / "venv" / "bin" / "python"


def test_jla_runs_in_an_interpreter_of_its_own(python_with_jla):
    peer = peers.installed("delta_product", str(python_with_jla))["jla"]
    rows = bench.benchmark(DELTA, (1, 6, 1, 4, 4, 2), True, 1, {"jla": peer})
    assert all(row["peer_over_this"]["jla"] > 0 for row in rows)

    inputs = ADDITIVE.inputs((1, 6, 1, 4, 4), True)
    peer = peers.installed("additive_scan", str(python_with_jla))["jla"]
    with peer(*map(np.asarray, inputs)) as jla:
        np.testing.assert_allclose(jla.outputs(), ADDITIVE.function(*inputs)[0], atol=1e-5)
        assert jla.forward() > 0 and jla.both() > 0
        [operations] = python_with_jla.parent.parent.rglob("jla/ops.py")
        operations.write_text("raise ImportError('broken')")
    with peer(*map(np.asarray, inputs)) as jla, pytest.raises(RuntimeError, match="jla under"):
        jla.forward()


def test_jla_is_asked_for_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ValueError, match="is not an interpreter"):
        peers.installed("delta_product", str(tmp_path / "python"))
    with pytest.raises(ValueError, match="has no expert_mlp"):
        peers.installed("expert_mlp", sys.executable)
    if importlib.util.find_spec("jla") is None:
        with pytest.raises(ValueError, match="pip install jax-linear-attention"):
            peers.installed("delta_product", sys.executable)


def test_linear_cost(tmp_path):
    rows = []
    for tokens in (80, 160):  # more than a stride: kernels keep states in between
        rows += bench_linear.benchmark(tokens, (1, 4, 4), [2], 1, memory_gb=1.0)
    names = ("delta_product N=2", "additive_scan")
    assert list(bench_linear.curves(rows)) == list(itertools.product(names, bench.WHATS))
    assert all(row["milliseconds"] > 0 and row["temporary_mb"] > 0 for row in rows)
    assert bench_linear.table(rows).count("\n") == 5
    line = [{"tokens": t, "milliseconds": 3.0 * t} for t in (1, 4, 16)]
    assert bench_linear.exponent(line, "milliseconds") == pytest.approx(1)
    bench_linear.draw(rows, str(tmp_path / "linear.png"))
    assert (tmp_path / "linear.png").stat().st_size > 10_000

    unrun = bench_linear.benchmark(8, (1, 4, 4), [], 1, memory_gb=1e-8)
    assert all(row["milliseconds"] is None for row in unrun)
    assert bench_linear.table(unrun).count("not run") == len(unrun)
    bench_linear.draw(unrun, str(tmp_path / "unrun.png"))


def test_decoding():
    bandwidth, rows = bench_decode.benchmark([(2, 1, 4, 4)], [1, 2], 3, 1, 2)
    assert bandwidth > 0 and len(rows) == 3 and bench_decode.table(rows).count("\n") == 4
    for row in rows:
        traffic = 2e6 * row["state_mb"] / bandwidth
        assert row["over_floor"] == pytest.approx(1e-6 * row["microseconds"] / traffic)


def test_decoding_is_the_scan_token_by_token():
    for steps in (2, None):
        step, state, inputs = bench_decode.decoding((2, 1, 4, 4), steps, 3)
        call = bench_decode.going_on(functools.partial(jax.lax.scan, step), state, inputs)
        operation = ADDITIVE if steps is None else DELTA
        dims = (2, 3, 1, 4, 4) if steps is None else (2, 3, 1, 4, 4, 2)
        o, state = operation.function(*operation.inputs(dims, True))
        chex.assert_trees_all_close(call(), (state, jnp.moveaxis(o, 1, 0)), rtol=1e-4, atol=1e-5)
        first = call()[1]
        assert not np.allclose(first, jnp.moveaxis(o, 1, 0), atol=1e-3)  # goes on from the state


@pytest.mark.parametrize(
    ("module", "argument", "message"),
    [
        ("bench", "--shapes=1,5", "6 positive integers B,T,H,K,V,N"),
        ("bench", "--jla_python=no_such_python", "is not an interpreter"),
        ("bench", "--without=xla", "'xla' is not a peer"),
        ("bench_linear", "--steps=1", "--picture is missing"),
        ("bench_decode", "--shapes=1,2", "4 positive integers B,H,K,V"),
    ],
)
def test_bad_arguments(module, argument, message):
    command = [sys.executable, "-m", f"scanax.kernels.{module}", argument]
    wrong = subprocess.run(command, text=True, stderr=subprocess.PIPE, check=False)
    assert wrong.returncode == 2 and wrong.stderr.count("error:") == 1 and message in wrong.stderr


def test_command_line(tmp_path):
    command = [sys.executable, "-m", "scanax.kernels.bench", "--repetitions=1"]
    out = tmp_path / "bench.json"
    arguments = ["--shapes=1,5,1,2,2,1", "--nopeers", f"--out={out}"]
    assert "| 1,5,1,2,2,1 |" in subprocess.check_output([*command, *arguments], text=True)
    assert len(json.loads(out.read_text())["rows"]) == 2 * len(IMPLEMENTATIONS)


def test_flops_of_the_definition():
    assert DELTA.flops((4, 2048, 4, 64, 64, 1)) == 8 * 4 * 2048 * 4 * 64 * 64
    assert ADDITIVE.flops((4, 2048, 4, 64, 64)) == 5 * 4 * 2048 * 4 * 64 * 64
    assert CONVOLUTION.flops((8, 32, 16, 96, 64)) == 2 * 9 * 8 * 32 * 16 * 96 * 64
    assert EXPERTS.flops((2048, 352, 352, 16, 2)) == 4 * 2048 * 2 * 352 * 352


@pytest.mark.parametrize("text", ["4,2048", "a,b,c,d,e,f", "1,0,1,1,1,1", ""])
def test_malformed_shape(text):
    with pytest.raises(ValueError, match="6 positive integers B,T,H,K,V,N"):
        bench.parse_shape(DELTA.dimensions, text)


def test_defaults_are_measured_and_those_of_other_devices_kept(tmp_path):
    path = tmp_path / "defaults.json"
    size = {"tokens": 4, "width": 4, "fastest": "xla"}
    rows = [{"operation": "delta_product", "device": d, **size} for d in ("another", "cpu")]
    path.write_text(json.dumps(rows))
    command = [sys.executable, "-m", "scanax.kernels.bench_defaults", f"--out={path}"]
    arguments = ["--lengths=4", "--widths=4", "--repetitions=1"]
    subprocess.run([*command, *arguments], check=True, stdout=subprocess.DEVNULL)
    kept, *new = json.loads(path.read_text())
    assert kept == rows[0]
    assert [(row["operation"], row["tokens"], row["width"]) for row in new] == [
        ("delta_product", 4, 4),
        ("additive_scan", 4, 4),
        ("convolution_3x3", 4, 4),
        ("short_convolution", 4, 4),
    ]
    for row in new:
        assert row["device"] == "cpu" and min(row["time_over_fastest"].values()) == 1
        assert row["time_over_fastest"][row["fastest"]] == 1
