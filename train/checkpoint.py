"""Checkpoints: the only file that imports Orbax.

A step holds these items: ``params``, ``ema`` and ``extra`` (if there are any), ``rest`` (step,
moments, key, counters) and ``meta``: JSON with the config, the data position, the versions
and, per array, shape, dtype and checksum. Evaluation reads only what it needs.

Orbax writes into a temporary folder and renames it, so a killed run leaves whole steps only.
What it does not notice is a damaged file: bytes may restore to wrong values in silence. So
``files.sha256`` (in the format of the tool of that name) lists the digest of every file, and is
checked before anything is read; a restored array must have the checksum in ``meta``, computed
on the device before it was written. A damaged step is reported in one line and moved to
``damaged/``; the one before is taken.
"""

from collections.abc import Iterable, Mapping
import concurrent.futures
import dataclasses
import hashlib
import importlib.metadata
import logging
import pathlib
import shutil
from typing import Any

from absl import logging as absl_logging
import jax
import orbax.checkpoint as ocp

from .checksum import fingerprint, tree_checksums
from .config import CheckpointConfig
from .state import TrainState

FILES = "files.sha256"
PACKAGES = ("scanax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used; the message says which, why, and what to do."""


class _Damaged(Exception):
    """One step cannot be read or does not hold what was saved."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """What was read of a checkpoint: ``value`` (as asked for) and the metadata of ``step``."""

    step: int
    value: Any
    meta: Mapping[str, Any]


class Checkpoints:
    """The checkpoints of a working directory.

    Args:
      workdir: holds ``checkpoints/`` and, when needed, ``damaged/``.
      config: when to save; None to read only, which never changes the folder.
    """

    def __init__(self, workdir: pathlib.Path, config: CheckpointConfig | None = None):
        self.folder = workdir.resolve() / "checkpoints"
        self._damaged_folder = workdir.resolve() / "damaged"
        self._writable = config is not None
        if not self._writable and not self.folder.is_dir():
            raise CheckpointError(
                f"{workdir} holds no checkpoints; give the --workdir of a training run"
            )
        self._config = config
        self._asynchronous = config is not None and config.asynchronous
        self._manager = self._open()

    def steps(self) -> list[int]:
        """Saved steps, oldest first; they may be damaged."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, config: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        """Saves the state, the config and the data position under the state's step.

        Does nothing if that step is already saved. Returns when the state may be changed;
        the writing goes on in the background if the config says so.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        items = _split(state)
        meta = {
            "config": config,
            "data": data,
            "versions": _versions(),
            "arrays": {name: _describe(tree) for name, tree in items.items()},
        }
        arguments = ocp.args.Composite(
            meta=ocp.args.JsonSave(meta),
            **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
        )
        if not self._manager.save(step, args=arguments, force=True):
            raise CheckpointError(
                f"step {step} was not saved in {self.folder}: a later step exists there already"
            )
        if not self._asynchronous:
            self.wait()

    def restore(self, shapes: TrainState, shardings: TrainState) -> Restored | None:
        """The newest undamaged state, or None if nothing was ever saved.

        Args:
          shapes, shardings: of the state to restore, which may be on another mesh than the
            saved one.

        Raises:
          CheckpointError: if every step is damaged, or holds another model's state.
        """

        def read(step: int) -> Restored:
            targets, places = _split(shapes), _split(shardings)
            meta = self._meta(step, targets)
            trees = {
                name: self._arrays(step, name, meta, targets[name], places[name])
                for name in targets
            }
            return Restored(step, _join(shapes, trees), meta)

        return self._newest(read, self.steps())

    def restore_for_evaluation(
        self, shapes: TrainState, shardings: TrainState, step: int | None
    ) -> Restored | None:
        """Only (params, extra), the averaged parameters where there are any.

        Args:
          shapes, shardings: of the whole state.
          step: a saved step, or None for the newest undamaged one.
        """
        name = "params" if shapes.ema is None else "ema"
        targets, places = _split(shapes), _split(shardings)

        def read(step: int) -> Restored:
            meta = self._meta(step, (name, "extra"))
            params, extra = (
                self._arrays(step, item, meta, targets[item], places[item])
                if item in targets
                else {}
                for item in (name, "extra")
            )
            return Restored(step, (params, extra), meta)

        return self._newest(read, self._choose(step))

    def restore_params(self, shapes: Any, shardings: Any, average: bool = False) -> Restored:
        """Only the parameters of the newest undamaged step.

        Args:
          shapes, shardings: of the parameters.
          average: their average, where there is one.

        Raises:
          CheckpointError: if there are none, or they are another model's.
        """

        def read(step: int) -> Restored:
            name = "ema" if average and "ema" in self._meta(step)["arrays"] else "params"
            meta = self._meta(step, (name,))
            return Restored(step, self._arrays(step, name, meta, shapes, shardings), meta)

        found = self._newest(read, self.steps())
        if found is None:
            raise CheckpointError(f"{self.folder} holds no checkpoint")
        return found

    def read_meta(self, step: int | None = None) -> tuple[int, Mapping[str, Any]]:
        """Step and ``meta`` (config, data position, versions) of the newest readable step."""
        found = self._newest(lambda s: Restored(s, None, self._meta(s)), self._choose(step))
        if found is None:
            raise CheckpointError(f"{self.folder} holds no checkpoint")
        return found.step, found.meta

    def fingerprint(self, step: int | None = None) -> str:
        """Of the parameters that evaluation uses (the average where there is one)."""
        arrays = self.read_meta(step)[1]["arrays"]
        used = arrays.get("ema", arrays["params"])
        return fingerprint({key: entry[2] for key, entry in used.items()})

    def wait(self) -> None:
        """Blocks until everything saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    def _choose(self, step: int | None) -> list[int]:
        steps = self.steps()
        if step is None:
            return steps
        if step not in steps:
            raise CheckpointError(f"{self.folder} has no step {step}; it has {steps}")
        return [step]

    def _newest(self, read, steps: list[int]) -> Restored | None:
        """Reads the newest step that is whole; sets damaged ones aside once one is found."""
        damaged: dict[int, str] = {}
        for step in reversed(steps):
            try:
                found = read(step)
            except _Damaged as error:
                damaged[step] = str(error)
                continue
            for bad, why in damaged.items():
                where = self._set_aside(bad) if self._writable else "ignored"
                logging.getLogger("scanax").warning(
                    "checkpoint %d is damaged (%s; %s): continuing from step %d",
                    *(bad, why, where, step),
                )
            return found
        if damaged:
            details = "; ".join(f"step {step}: {why}" for step, why in damaged.items())
            raise CheckpointError(
                f"every checkpoint asked for in {self.folder} is damaged ({details})."
                " Restore the folder from a copy, or start in a new --workdir"
            )
        return None

    def _set_aside(self, step: int) -> str:
        """Moves a damaged step out of the way, so that it can be saved again."""
        self._damaged_folder.mkdir(exist_ok=True)
        number = sum(1 for _ in self._damaged_folder.glob(f"{step}*"))
        target = self._damaged_folder / (f"{step}.{number}" if number else str(step))
        shutil.move(self.folder / str(step), target)
        self._manager.close()
        self._manager = self._open()
        return f"moved to {target.parent.name}/{target.name}"

    def _open(self) -> ocp.CheckpointManager:
        config = self._config
        if config is None:
            shown = absl_logging.get_verbosity()
            absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax warns that reading is reading
            try:
                options = ocp.CheckpointManagerOptions(create=False, read_only=True)
                return ocp.CheckpointManager(self.folder, options=options)
            finally:
                absl_logging.set_verbosity(shown)
        self.folder.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.keep,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._list_files),
            cleanup_tmp_directories=True,
            create=True,
        )
        return ocp.CheckpointManager(self.folder, options=options)

    def _list_files(self) -> None:
        """Writes ``FILES``: called by Orbax when all else is written, before the rename."""
        (folder,) = self.folder.glob("*.orbax-checkpoint-tmp*")  # one save at a time
        files = sorted(str(p.relative_to(folder)) for p in folder.glob("*/**/*") if p.is_file())
        lines = [f"{digest}  {name}\n" for name, digest in _digests(folder, files).items()]
        (folder / FILES).write_text("".join(lines))

    def _check_files(self, step: int, items: Iterable[str]) -> None:
        """Raises _Damaged unless every listed file of these items is as it was written."""
        folder = self.folder / str(step)
        try:
            lines = (folder / FILES).read_text().splitlines()
            listed = {name: digest for digest, name in (line.split("  ") for line in lines)}
        except (OSError, ValueError) as error:
            raise _Damaged(f"{FILES} cannot be read: {_first_line(error)}") from error
        wanted = [name for name in listed if name.split("/")[0] in items]
        missing = [name for name in wanted if not (folder / name).is_file()]
        if missing:
            raise _Damaged(f"{missing[0]} is missing")
        for name, digest in _digests(folder, wanted).items():
            if listed[name] != digest:
                raise _Damaged(f"{name} is not as it was written")

    def _meta(self, step: int, items: Iterable[str] = ()) -> Mapping[str, Any]:
        """``meta`` of a step, once its files and those of ``items`` are known to be whole."""
        self._check_files(step, {"meta", *items})
        try:
            composite = ocp.args.Composite(meta=ocp.args.JsonRestore())
            return self._manager.restore(step, args=composite)["meta"]
        except Exception as error:  # Orbax raises five unrelated types for damaged files
            raise _Damaged(f"its metadata is unreadable: {_first_line(error)}") from error

    def _arrays(self, step: int, name: str, meta: Mapping[str, Any], shapes, shardings) -> Any:
        saved, wanted = meta["arrays"].get(name, {}), _layout(shapes)
        different = [
            f"{key}: saved {saved.get(key, ['nothing'])[:2]}, wanted {wanted.get(key, 'nothing')}"
            for key in sorted(saved.keys() | wanted.keys())
            if saved.get(key, [])[:2] != wanted.get(key)
        ]
        if different:
            more = f" and {len(different) - 3} more" if len(different) > 3 else ""
            raise CheckpointError(
                f"step {step} in {self.folder} holds another {name}:"
                f" {'; '.join(different[:3])}{more}. Use the config it was trained with"
            )
        targets = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
        )
        try:
            composite = ocp.args.Composite(**{name: ocp.args.StandardRestore(targets)})
            tree = self._manager.restore(step, args=composite)[name]
        except Exception as error:
            raise _Damaged(f"{name} cannot be read: {_first_line(error)}") from error
        for key, checksum in tree_checksums(tree).items():
            if saved[key][2] != checksum:
                raise _Damaged(f"{name}/{key} has checksum {checksum}, saved was {saved[key][2]}")
        return tree


def _split(state: TrainState) -> dict[str, Any]:
    """A state (or its shapes, or shardings) as the items of a checkpoint."""
    rest = {
        field.name: getattr(state, field.name)
        for field in dataclasses.fields(state)
        if field.name not in ("params", "ema", "extra", "key")
    }
    key = state.key
    if isinstance(key, jax.Array):
        rest["key"] = jax.random.key_data(key)
    elif isinstance(key, jax.ShapeDtypeStruct):
        rest["key"] = jax.eval_shape(jax.random.key_data, key)
    else:
        rest["key"] = key  # a sharding
    items = {"params": state.params, "ema": state.ema, "extra": state.extra, "rest": rest}
    return {name: tree for name, tree in items.items() if jax.tree.leaves(tree)}


def _join(shapes: TrainState, items: Mapping[str, Any]) -> TrainState:
    rest = dict(items["rest"])
    rest["key"] = jax.random.wrap_key_data(rest["key"])
    extra = items.get("extra", shapes.extra)  # without leaves it is its own shape
    return dataclasses.replace(
        shapes, params=items["params"], ema=items.get("ema"), extra=extra, **rest
    )


def _layout(tree: Any) -> dict[str, list]:
    """Path -> [shape, dtype]."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): [list(x.shape), str(x.dtype)]
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def _describe(tree: Any) -> dict[str, list]:
    """Path -> [shape, dtype, checksum]."""
    checksums = tree_checksums(tree)
    return {key: [*layout, checksums[key]] for key, layout in _layout(tree).items()}


def _digests(folder: pathlib.Path, names: list[str]) -> dict[str, str]:
    """SHA-256 of files, several at a time (hashing releases the interpreter's lock)."""

    def digest(name: str) -> str:
        with (folder / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    return f"{type(error).__name__}: {text[:200]}"
