"""Runs the command line as a user does, on a word problem small enough for seconds."""

from collections.abc import Callable
import multiprocessing
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = "configs/word_problem_s3.py"

# A complete run of about 30k examples per second: the machinery is under test, not the model.
SMALL = (
    "--config.num_steps=60",
    "--config.batch_size=8",
    "--config.model.hidden_size=16",
    "--config.model.num_heads=2",
    "--config.model.head_dim=4",
    "--config.model.intermediate_size=16",
    "--config.data.length=8",
    "--config.data.curriculum_lengths=(4,8)",
    "--config.data.curriculum_steps=(0,20)",
    "--config.data.eval_lengths=(8,12)",
    "--config.optimizer.ema_decay=0.9",
    "--config.optimizer.warmup_steps=5",
    "--config.optimizer.schedule=cosine",
    "--config.optimizer.decay_steps=0",
    "--config.evaluation.batches=1",
    "--config.evaluation.batch_size=8",
    "--config.evaluation.samples=4",
    "--config.checkpoint.every_steps=20",
    "--config.log.every_steps=10",
)


def command(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"scanax.train.{module}", *arguments]


def train_command(workdir: pathlib.Path, *overrides: str) -> list[str]:
    flags = (f"--config={CONFIG}", f"--workdir={workdir}")
    return command("main", *flags, *SMALL, *overrides)


def environment(devices: int = 1) -> dict[str, str]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    return {**os.environ, "XLA_FLAGS": flags, "PYTHONUNBUFFERED": "1"}


def run(arguments: list[str], devices: int = 1) -> subprocess.CompletedProcess[str]:
    """Runs to the end; stdout and stderr together in ``stdout``."""
    return subprocess.run(
        arguments,
        cwd=ROOT,
        env=environment(devices),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )


def run_forked(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """As ``run``, in a fork of a process that has imported the libraries: without their 4 s."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["scanax.train.loop", "scanax.train.tasks"])
    with tempfile.NamedTemporaryFile("r") as output:
        process = context.Process(target=_run_module, args=(arguments, environment(), output.name))
        process.start()
        process.join(timeout=300)
        assert process.exitcode is not None, "still running"
        return subprocess.CompletedProcess(arguments, process.exitcode, output.read())


def _run_module(arguments: list[str], variables: dict[str, str], output: str) -> None:
    """What ``python -m`` would do, in this process."""
    descriptor = os.open(output, os.O_WRONLY)
    os.dup2(descriptor, sys.stdout.fileno())
    os.dup2(descriptor, sys.stderr.fileno())
    os.chdir(ROOT)
    os.environ.update(variables)
    _, _, module, *sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def start(arguments: list[str]) -> subprocess.Popen:
    """Starts a run and does not wait for it."""
    nowhere = subprocess.DEVNULL
    return subprocess.Popen(arguments, cwd=ROOT, env=environment(), stdout=nowhere, stderr=nowhere)


def wait_for(happened: Callable[[], object], process: subprocess.Popen) -> None:
    """Waits until something has happened; an error if the run ends before that."""
    while not happened():
        assert process.poll() is None, "the run has ended"
        time.sleep(0.01)


def interrupt(arguments: list[str], after: float, with_signal: signal.Signals) -> int:
    """Starts a run, sends a signal after some seconds, and returns the exit code.

    The run may have ended before the signal.
    """
    process = start(arguments)
    deadline = time.monotonic() + after
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(with_signal)
    return process.wait(timeout=120)
