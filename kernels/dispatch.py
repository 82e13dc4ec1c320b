"""Choice of an implementation: a table per operation, and one rule.

``implementation=None`` takes what was measured to be the fastest on this kind of device
(``defaults.json``, which ``python -m scanax.kernels.bench_defaults`` writes), and otherwise the
first entry of the table that supports the call; an entry that needs to have been timed is never
taken unmeasured. A named implementation is never replaced by another one: it runs, or it raises an
error that says why it cannot and which name would work.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import json
import math
import pathlib
from typing import Any

from absl import logging
import jax


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an operation.

    Attributes:
      run: the function; all implementations of an operation share its signature.
      supports: called with the same arguments; returns None if they are supported, else
        the reason why not.
      platforms: platforms on which this implementation may be picked by default.
      measured: it is picked by default only on a kind of device on which it was timed.
    """

    run: Callable[..., Any]
    supports: Callable[..., str | None] = lambda *args, **kwargs: None
    platforms: tuple[str, ...] = ("cpu", "gpu", "tpu")
    measured: bool = False


def call(
    operation: str,
    table: Mapping[str, Implementation],
    name: str | None,
    *args,
    size: tuple[int, int] | None = None,
    **kwargs,
):
    """Runs implementation ``name`` of ``operation``, or the fastest that fits if it is None.

    Args:
      operation: its name in messages and in ``defaults.json``.
      table: of its implementations; their order is the order of choice where nothing is measured.
      name: of one of them, or None.
      *args: for the implementation.
      size: tokens and width of a head, or pixels and channels, by which measurements are looked up.
      **kwargs: for the implementation.

    Raises:
      ValueError: if there is no implementation of that name, or it does not support the
        arguments; the message names those that do.
    """
    reason = functools.cache(lambda key: table[key].supports(*args, **kwargs))
    if name is None:
        name = _choice(operation, table, reason, size)
    elif name not in table:
        raise ValueError(
            f"{operation}: unknown implementation {name!r}; choose one of {sorted(table)}"
        )
    elif reason(name) is not None:
        raise ValueError(
            f"{operation}: implementation {name!r} does not support this call: {reason(name)}."
            f" Usable here: {[key for key in table if reason(key) is None]}"
        )
    return table[name].run(*args, **kwargs)


def target() -> tuple[str, str]:
    """Platform ("cpu", "gpu", "tpu") and kind of the devices that a program is traced for.

    They are the ambient mesh's, which may consist of devices that are not there.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return jax.default_backend(), jax.devices()[0].device_kind
    platform = "gpu" if device.platform in ("cuda", "rocm") else device.platform
    return platform, device.device_kind


def _choice(operation: str, table, reason: Callable[[str], str | None], size) -> str:
    """The fastest as measured, or else the first of the table that supports the call."""
    platform, device = target()
    fastest = None if size is None else fastest_measured(operation, device, *size)
    if fastest is not None and fastest in table and reason(fastest) is None:
        return fastest
    for name, entry in table.items():
        if platform in entry.platforms and not entry.measured and reason(name) is None:
            if fastest is not None and fastest in table:
                _log_once(
                    f"{operation}: {name!r} in place of {fastest!r}, because {reason(fastest)}"
                )
            return name
    reasons = {name: reason(name) for name in table}
    raise ValueError(f"{operation}: no implementation runs here on {platform!r}: {reasons}")


@functools.cache
def fastest_measured(operation: str, device: str, tokens: int, width: int) -> str | None:
    """The fastest at the measured size that is nearest to this one, or None for other devices."""
    rows = [row for row in _measurements() if row["operation"] == operation]
    rows = [row for row in rows if row["device"] == device]
    distance = lambda a, b: abs(math.log(a / b))
    away = lambda row: distance(row["tokens"], tokens) + distance(row["width"], width)
    return min(rows, key=away)["fastest"] if rows else None


@functools.cache
def _measurements() -> list[dict[str, Any]]:
    return json.loads(pathlib.Path(__file__).with_name("defaults.json").read_text())


@functools.cache
def _log_once(message: str) -> None:
    logging.info(message)
