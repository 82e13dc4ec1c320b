"""Choice of an implementation: a table per operation, and one rule.

``implementation=None`` takes the first entry of the platform's order that supports the
call. A named implementation is never replaced by another one: it runs, or it raises an
error that says why it cannot and which name would work.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an operation.

    Attributes:
      run: the function; all implementations of an operation share its signature.
      supports: called with the same arguments; returns None if they are supported, else
        the reason why not.
      platforms: platforms on which this implementation may be picked by default.
    """

    run: Callable[..., Any]
    supports: Callable[..., str | None] = lambda *args, **kwargs: None
    platforms: tuple[str, ...] = ("cpu", "gpu", "tpu")


def call(operation: str, table: Mapping[str, Implementation], name: str | None, *args, **kwargs):
    """Runs implementation ``name`` of ``operation``, or the first that fits if it is None.

    Raises:
      ValueError: if there is no implementation of that name, or it does not support the
        arguments; the message names those that do.
    """
    reasons = {key: entry.supports(*args, **kwargs) for key, entry in table.items()}
    usable = [key for key, reason in reasons.items() if reason is None]
    if name is None:
        platform = jax.default_backend()
        name = next((key for key in usable if platform in table[key].platforms), None)
        if name is None:
            raise ValueError(f"{operation}: no implementation runs here on {platform!r}: {reasons}")
    elif name not in table:
        raise ValueError(
            f"{operation}: unknown implementation {name!r}; choose one of {sorted(table)}"
        )
    elif reasons[name] is not None:
        raise ValueError(
            f"{operation}: implementation {name!r} does not support this call: {reasons[name]}."
            f" Usable here: {usable}"
        )
    return table[name].run(*args, **kwargs)
