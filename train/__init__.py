"""The training system: one loop, one step, one checkpoint format for every family.

Read ``loop.py`` first, then ``task.py`` for what a family supplies.
"""

from .run import Run, load, train

__all__ = ["Run", "load", "train"]
