"""Notices when a compiled function compiles again, and says what changed."""

import logging
from typing import Any

import jax

logger = logging.getLogger("scanax")


class CompilationWatch:
    """Calls a jitted function and warns about every compilation after the first.

    Attributes:
      count: compilations so far.
    """

    def __init__(self, function: Any, name: str):
        self._function, self._name = function, name
        self._signature: dict[str, str] = {}
        self.count = 0

    def __call__(self, *args: Any) -> Any:
        result = self._function(*args)
        size = self._function._cache_size()
        if size != self.count:
            signature = _signature(args)
            if self.count:
                logger.warning(
                    "%s compiled again (%d times now): %s",
                    *(self._name, size, _difference(self._signature, signature)),
                )
            self.count, self._signature = size, signature
        return result


def _signature(args: Any) -> dict[str, str]:
    """What a compilation depends on: shape, dtype and placement of every argument."""
    return {
        jax.tree_util.keystr(path): f"{x.dtype}{list(x.shape)} {getattr(x, 'sharding', 'on host')}"
        for path, x in jax.tree_util.tree_leaves_with_path(args)
    }


def _difference(old: dict[str, str], new: dict[str, str]) -> str:
    changed = [
        f"{key} was {old.get(key, 'absent')}, is {new.get(key, 'absent')}"
        for key in sorted(old | new)
        if old.get(key) != new.get(key)
    ]
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return "; ".join(changed[:3]) + more if changed else "nothing about its arguments changed"
