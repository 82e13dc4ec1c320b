"""Command lines: absl flags and config overrides, with one clear message for every mistake.

A user's mistake ends the process with exit code 2 and one message, before anything is
compiled or written. It wraps ``config_flags``, which reports a mistyped key as a bare
AttributeError and passes over stray arguments.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import importlib.util
import logging
import os
import pathlib
import sys
from typing import Any

from absl import app, flags, logging as absl_logging
import jax
import ml_collections
from ml_collections import config_flags

from .checkpoint import CheckpointError
from .config import Config, ConfigError, flatten, from_dict, unknown_key
from .data.pipeline import DataError

USER_ERRORS = (ConfigError, CheckpointError, DataError, flags.Error)
CACHE = flags.DEFINE_string(
    "compilation_cache",
    os.environ.get("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path.home() / ".cache/scanax/jax")),
    "Folder that keeps compiled programs between runs; empty for none.",
)


def define_config():
    """Defines --config, a config file or FILE:ARGUMENT, and --config.KEY overrides."""
    return config_flags.DEFINE_config_file("config", None, "A file of configs/.")


def define_workdir():
    """Defines --workdir, the folder of a run."""
    return flags.DEFINE_string("workdir", None, "The run's folder: checkpoints, metrics, pictures.")


def define_sampler():
    """Defines --sampler KEY=VALUE, once or more, in place of the config's ``sampler``."""
    return flags.DEFINE_multi_string("sampler", [], "KEY=VALUE: instead of the config's sampler.")


def sampler() -> dict[str, str]:
    """The values of --sampler, as they were written."""
    given = {}
    for text in flags.FLAGS["sampler"].value or ():
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--sampler {text} should look like KEY=VALUE")
        given[key] = value
    return given


def launch(main: Callable[..., None], commands: Sequence[str] = ()) -> None:
    """Parses the command line and runs ``main``; exit code 2 for a user's mistake.

    With ``commands``, the first argument must be one of them, and ``main`` is called with it.

    Other exceptions keep their traceback, except that ``main`` may raise errors with an
    ``exit_code`` attribute, whose message is printed alone.
    """
    _log_to_console()

    def run(argv: list[str]) -> None:
        try:
            if CACHE.value:
                jax.config.update("jax_compilation_cache_dir", CACHE.value)
                jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
            main(*argv[1:])
        except USER_ERRORS as error:
            _fail(error, 2)
        except RuntimeError as error:
            if not hasattr(error, "exit_code"):
                raise
            _fail(error, error.exit_code)  # pyright: ignore[reportAttributeAccessIssue]

    app.run(run, flags_parser=functools.partial(_parse, commands))


def workdir() -> pathlib.Path:
    """The value of --workdir; a ConfigError if it was not given."""
    value = flags.FLAGS["workdir"].value
    if not value:
        raise ConfigError("--workdir is required")
    return pathlib.Path(value)


def config() -> Config:
    """The validated value of --config with its overrides; a ConfigError if not given."""
    value = flags.FLAGS["config"].value
    if value is None:
        raise ConfigError("--config is required")
    return from_dict(value.to_dict())


def _log_to_console() -> None:
    """Our messages as they are; the libraries' warnings and errors only."""
    logger = logging.getLogger("scanax")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    absl_logging.set_verbosity(absl_logging.WARNING)
    for library in ("jax", "orbax", "grain"):
        logging.getLogger(library).setLevel(logging.WARNING)


def _parse(commands: Sequence[str], argv: list[str]) -> list[str]:
    try:
        app.define_help_flags()
        _check_overrides(argv)
        left = flags.FLAGS(argv)
        if commands and (len(left) < 2 or left[1] not in commands):
            raise ConfigError(f"the first argument must be one of {', '.join(commands)}")
        if len(left) > (2 if commands else 1):
            raise ConfigError(
                f"unexpected argument {left[-1]!r}; write --flag=value (--config.key=false for a"
                " switch)"
            )
        app.parse_flags_with_usage(argv[:1])  # prints and exits for --help
        return left
    except (*USER_ERRORS, OSError, TypeError, AttributeError, ValueError) as error:
        _fail(error, 2)
        raise


def _check_overrides(argv: list[str]) -> None:
    """Names the nearest key for a --config.KEY that does not exist."""
    path, overrides = None, []
    arguments = iter(argv[1:])
    for argument in arguments:
        name, equals, value = argument.lstrip("-").partition("=")
        if not argument.startswith("-"):
            continue
        if name == "config":
            path = value if equals else next(arguments, None)
        elif name.startswith("config."):
            overrides.append(name.removeprefix("config."))
    if path is None:
        if overrides:
            raise ConfigError("--config.KEY needs --config=FILE")
        return
    file = path.partition(":")[0]
    if not pathlib.Path(file).is_file():
        folder = pathlib.Path(file).parent
        near = sorted(str(p) for p in folder.glob("*.py") if not p.name.startswith("_"))
        raise ConfigError(
            f"--config {file} does not exist"
            + (f"; there are {', '.join(near)}" if near else f" (current folder: {os.getcwd()})")
        )
    known = list(flatten(load(path).to_dict()))
    groups = {key.rsplit(".", i)[0] for key in known for i in (1, 2) if key.count(".") >= i}
    for key in overrides:
        if key in groups:
            raise ConfigError(f"--config.{key} is a group of keys; set one of its keys")
        if key not in known:
            raise ConfigError(unknown_key(key, known))
        if key == "family":
            raise ConfigError(
                "--config.family decides which keys model has: choose a config file of that family"
            )


def load(path: str) -> ml_collections.ConfigDict:
    """Runs a config file's get_config; FILE:ARGUMENT passes it the argument.

    Raises:
      ConfigError: if the file is no Python file, or rejects its argument.
    """
    path, colon, argument = path.partition(":")
    spec = importlib.util.spec_from_file_location("scanax_config_file", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--config {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        return module.get_config(argument) if colon else module.get_config()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--config {path}{colon}{argument}: {error}") from error


def config_file() -> tuple[str, ml_collections.ConfigDict]:
    """--config as it was written, and its value with overrides; a ConfigError if not given."""
    flag: Any = flags.FLAGS["config"]
    if flag.value is None:
        raise ConfigError("--config is required")
    return flag.config_filename, flag.value


def overrides(path: str, values: Mapping[str, Any]) -> list[str]:
    """The flags that turn what a config file returns into ``values``."""
    original = flatten(load(path).to_dict())
    changed = {k: v for k, v in flatten(values).items() if v != original[k]}
    return [f"--config.{key}={value}" for key, value in changed.items()]


def _fail(error: BaseException, code: int) -> None:
    text = str(error).strip() or type(error).__name__
    print(f"error: {text}", file=sys.stderr, flush=True)
    sys.exit(code)
