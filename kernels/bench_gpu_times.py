"""Timing of the entries at one shape, in turns, for the GPU benchmark."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import statistics
import sys
import time
from typing import Any

import jax.numpy as jnp
import numpy as np

from . import bench_gpu_entries as entries_lib
from .bench import WHATS

CALLS = 20  # enqueued before waiting
ROUNDS = 6  # every set of inputs twice
SETS = 3
SECONDS = 3.0  # spent on an entry, after which it gets no further repetition
THREADS = 8  # that compile

Tell = Callable[..., None]


@dataclasses.dataclass
class Timed:
    """Forward, or forward and backward, of an entry, with what was measured.

    Attributes:
      name: of the entry; what: of ``WHATS``.
      data: inputs, prepared, of every set.
      calls: that are enqueued one after the other.
    """

    name: str
    what: str
    entry: entries_lib.Entry
    data: list[Any]
    calls: int = 1
    compile_seconds: float = 0.0
    difference: float | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)
    do_bench_milliseconds: float | None = None
    compiling: Any = None

    @property
    def label(self) -> str:
        return f"{self.name} {self.what}"

    @property
    def alone(self) -> bool:
        return self.what == WHATS[0]

    def call(self, number: int = 0) -> Any:
        function = self.entry.forward if self.alone else self.entry.both
        return function(self.data[number])

    def compile(self, pool: ThreadPoolExecutor) -> None:
        if self.entry.compile is not None:
            self.compiling = self.entry.compile(self.alone, self.data[0], pool)

    def begin(self, pool: ThreadPoolExecutor) -> None:
        """The first calls, and from what one of them takes, how many make a repetition."""
        if self.compiling is None:
            self.compile(pool)
        waited = self.compiling.result()[1] if self.compiling is not None else 0.0
        self.compile_seconds = waited + sample(self.call, self.entry.wait, 1)
        warm = sample(self.call, self.entry.wait, 1)
        self.calls = max(1, min(CALLS, int(SECONDS / 3 / warm)))

    def repeat(self, number: int) -> None:
        call = lambda: self.call(number % SETS)
        self.seconds.append(sample(call, self.entry.wait, self.calls))

    def row(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "implementation": self.name,
            "milliseconds": 1e3 * statistics.median(self.seconds),
            "fastest_milliseconds": 1e3 * min(self.seconds),
            "do_bench_milliseconds": self.do_bench_milliseconds,
            "calls": self.calls,
            "repetitions": len(self.seconds),
            "compile_seconds": self.compile_seconds,
            "difference": self.difference,
        }


def times(
    item: dict[str, Any],
    tell: Tell,
    deadline: float,
    ahead: bool,
    make: Callable[..., entries_lib.Entry] = entries_lib.entry,
) -> list[dict[str, Any]]:
    """A row for forward and forward+backward of every entry that runs at the item's shape.

    Args:
      item: operation, shape, entries, and those without which it is timed ("name forward").
      tell: is told when an entry starts or fails.
      deadline: after which nothing is begun that can be left out.
      ahead: all entries are compiled side by side, before the first is called.
      make: (name, operation, shape) -> entry.
    """
    operation, shape = item["operation"], tuple(item["shape"])
    tell("start", entry="inputs")
    sets = [entries_lib.inputs(operation, shape, seed) for seed in range(SETS)]
    running: list[Timed] = []
    pool = ThreadPoolExecutor(THREADS)

    def attempt(one: Timed, step: Callable[[], None], event: str = "") -> None:
        """Does the step; if it raises, the entry is left out from then on."""
        tell("start", entry=event or one.label)
        try:
            step()
        except Exception as error:
            running.remove(one)
            tell("failed", entry=one.label, reason=reason_of(error))
            if not healthy():
                sys.exit("the device does not answer any more")

    for name in item["entries"]:
        names = [f"{name} {what}" for what in WHATS if f"{name} {what}" not in item["without"]]
        if names and names[0].endswith(f" {WHATS[0]}"):
            tell("start", entry=names[0])
            try:
                entry = make(name, operation, shape)
                data = [entry.prepare(*arrays) for arrays in sets]
            except Exception as error:
                tell("failed", entry=name, reason=reason_of(error))
                continue
            running += [Timed(name, what, entry, data) for what in WHATS[: len(names)]]
    if ahead:
        for one in running[:]:
            attempt(one, lambda one=one: one.compile(pool), "compile")
        for one in running:
            if one.compiling is not None:
                tell("start", entry="compile")
                one.compiling.exception()  # waits; raised where it begins
    for one in running[:]:
        if time.monotonic() < deadline:
            attempt(one, lambda one=one: one.begin(pool))
        else:
            running.remove(one)
    expected: list[np.ndarray] = []
    for one in running[:]:
        if one.alone:
            attempt(one, lambda one=one: _compare(one, expected))
    for number in range(ROUNDS):
        for one in running[:]:
            late = time.monotonic() > deadline or sum(one.seconds) * one.calls > SECONDS
            if not (one.seconds and late):
                attempt(one, lambda one=one: one.repeat(number))  # noqa: B023
    for one in running[:]:
        if one.entry.median is not None and time.monotonic() < deadline:
            attempt(one, lambda one=one: _by_do_bench(one))
    about = {"operation": operation, "shape": list(shape)}
    return [{**about, **one.row()} for one in running]


def _by_do_bench(one: Timed) -> None:
    if one.entry.median is not None:
        one.do_bench_milliseconds = one.entry.median(one.call)


def _compare(one: Timed, expected: list[np.ndarray]) -> None:
    """How far o is from that of the first entry at most, over its largest."""
    o = one.entry.numpy(one.call())
    expected[:] = expected or [o]
    one.difference = float(np.abs(o - expected[0]).max() / np.abs(expected[0]).max())


def sample(call: Callable[[], Any], wait: Callable[[Any], Any], calls: int) -> float:
    """Seconds per call, of so many that are enqueued one after the other."""
    start, result = time.perf_counter(), None
    for _ in range(calls):
        result = call()
    wait(result)
    return (time.perf_counter() - start) / calls


def healthy() -> bool:
    """False after an error of the device that no later call in this process survives."""
    try:
        return float(jnp.sum(jnp.ones(8))) == 8
    except Exception:
        return False


def name_of(item: dict[str, Any]) -> str:
    more = "".join(f" {extra}" for extra in item.get("extras", ()))
    return f"{item['operation']} {','.join(map(str, item['shape']))}{more}"


def reason_of(error: BaseException) -> str:
    """One line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
