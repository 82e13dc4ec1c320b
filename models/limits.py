"""What the keys of models' configurations may be: checks that several families share."""

from collections.abc import Sequence
from typing import Any

DTYPES = ("float32", "bfloat16", "float64")


def at_least(config: Any, least: int, *names: str) -> None:
    """Raises a ValueError that names the first key below ``least``."""
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"model.{name} must be at least {least}, got {getattr(config, name)}")


def one_of(config: Any, allowed: Sequence[str], *names: str) -> None:
    """Raises a ValueError that lists what is allowed for the first key that is none of it."""
    for name in names:
        if getattr(config, name) not in allowed:
            raise ValueError(
                f"model.{name} must be one of {', '.join(allowed)}; got {getattr(config, name)!r}"
            )
