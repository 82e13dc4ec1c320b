"""Notices when a compiled function compiles again, and says what changed."""

import logging
import threading
from typing import Any

import jax

logger = logging.getLogger("scanax")


class _Compiled(threading.local):
    count = 0  # programs that this thread has compiled, or read from the compilation cache


_compiled = _Compiled()


def _listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
    del duration_secs, kwargs
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled.count += 1


jax.monitoring.register_event_duration_secs_listener(_listen)


class CompilationWatch:
    """Calls a jitted function and warns about every compilation after the first.

    Attributes:
      count: calls so far that compiled.
    """

    def __init__(self, function: Any, name: str):
        self._function, self._name = function, name
        self._signature: dict[str, str] = {}
        self.count = 0

    def __call__(self, *args: Any) -> Any:
        before = _compiled.count
        result = self._function(*args)
        if _compiled.count != before:
            self.count += 1
            signature = _signature(args)
            if self.count > 1:
                logger.warning(
                    "%s compiled again (%d times now): %s",
                    *(self._name, self.count, _difference(self._signature, signature)),
                )
            self._signature = signature
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
