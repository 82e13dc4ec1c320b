"""Where metrics go: ``metrics.jsonl``, the console, and TensorBoard where it is installed."""

from collections.abc import Mapping
import json
import logging
import pathlib
import sys
import time

import jax
import numpy as np
from tqdm import tqdm

logger = logging.getLogger("scanax")


class Writers:
    """Writes metrics of one run.

    Args:
      workdir: the run's folder.
      first_step: step at which this process starts. Rows that an earlier process wrote
        after its last checkpoint are dropped: they are computed again.
      num_steps: of the whole run, for the time that is left.
      examples: per step, for the rate.
    """

    def __init__(self, workdir: pathlib.Path, first_step: int, num_steps: int, examples: int):
        index = jax.process_index()
        path = workdir / (f"metrics.{index}.jsonl" if index else "metrics.jsonl")
        _drop_rows_after(path, first_step)
        self._file = path.open("a")
        self._tensorboard = _tensorboard(workdir)
        self._progress = None
        if sys.stderr.isatty():
            self._progress = tqdm(total=num_steps, initial=first_step, unit="step", smoothing=0.05)
        self._num_steps, self._examples = num_steps, examples
        self._last_step, self._last_time = first_step, time.perf_counter()

    def train(self, step: int, metrics: Mapping[str, float], compilations: int) -> None:
        """Metrics of the update that made ``step``; called every log.every_steps."""
        now = time.perf_counter()
        steps = max(step - self._last_step, 1)
        seconds = (now - self._last_time) / steps
        self._last_step, self._last_time = step, now
        timing = {"step_seconds": seconds, "examples_per_second": self._examples / seconds}
        self._write("train", step, {**metrics, **timing})
        left = seconds * (self._num_steps - step)
        line = (
            f"loss {metrics['loss']:.4g}  {timing['examples_per_second']:.0f} examples/s"
            f"  {1000 * seconds:.0f} ms/step  {_duration(left)} left  compiled {compilations}x"
        )
        if self._progress is not None:
            self._progress.set_postfix_str(line, refresh=False)
        else:
            logger.info("step %d/%d  %s", step, self._num_steps, line)

    def advance(self, step: int) -> None:
        """Moves the progress bar of a terminal."""
        if self._progress is not None:
            self._progress.update(step - self._progress.n)

    def evaluation(self, step: int, means: Mapping[str, np.ndarray]) -> None:
        """Evaluation means after ``step`` updates; curves go to the files only."""
        scalars = {name: float(x) for name, x in means.items() if np.ndim(x) == 0}
        self._write("eval", step, scalars)
        text = "  ".join(f"{name} {value:.4g}" for name, value in scalars.items())
        self._say(f"evaluation at step {step}: {text}")

    def pause(self) -> None:
        """Leaves out of the step time what happened since the last row (an evaluation, say)."""
        self._last_time = time.perf_counter()

    def close(self) -> None:
        if self._progress is not None:
            self._progress.close()
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        row = {"kind": kind, "step": step, **values}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(f"{kind}/{name}", value, step)

    def _say(self, text: str) -> None:
        if self._progress is not None:
            self._progress.write(text, file=sys.stderr)
        else:
            logger.info("%s", text)


def _drop_rows_after(path: pathlib.Path, step: int) -> None:
    """Keeps whole rows of updates up to ``step``; a kill may have cut the last one."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["step"] < step or (row["step"] == step and row["kind"] == "train"):
            kept.append(line + "\n")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)


def _tensorboard(workdir: pathlib.Path):
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(workdir / "tensorboard"))


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
