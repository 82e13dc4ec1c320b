"""Converts checkpoints: published to a run of ours, a run to published, one naming to another.

  python -m scanax.models.interop --from DOWNLOAD --to runs/new --config configs/lm_fineweb.py
  python -m scanax.models.interop --from UNET --to runs/edm --config configs/flow_rfpp.py:cifar10
  python -m scanax.models.interop --from runs/trained --to EXPORT
  python -m scanax.models.interop --from DOWNLOAD --to EXPORT [--to_family official_delta_product]

A published checkpoint is a folder with config.json and one or more .safetensors files. A run made
from one begins at step 0 with its parameters: evaluate it, sample from it, or train it on with
the command that is printed. Data, optimizer and dtypes come from --config, the model's
sizes from the checkpoint.

This command stands above ``train/``; the library beside it does not.
"""

from collections.abc import Mapping
import dataclasses
import json
import pathlib
import shlex
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from ...train import flags as flags_lib, loop, run as run_lib, state as state_lib, tasks
from ...train.checkpoint import Checkpoints
from ...train.config import ConfigError, from_dict, to_dict
from .. import interop, params as params_lib

flags_lib.define_config()
FROM = flags.DEFINE_string("from", None, "A run's folder, or a published checkpoint's.")
TO = flags.DEFINE_string("to", None, "The folder to write; it must be new or empty.")
FAMILY = flags.DEFINE_string(
    "family", "", "Of --from, if it is published: by its tensors' names if not given."
)
TO_FAMILY = flags.DEFINE_string(
    "to_family", "", "Of --to, if it is published: flash-linear-attention's if not given."
)
STEP = flags.DEFINE_integer("step", None, "Of a run: a saved step; the newest by default.")
DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "Of the tensors that are written."
)
OURS = ("dtype", "param_dtype", "remat", "implementation")  # how to compute, not what


def main() -> None:
    if not FROM.value or not TO.value:
        raise ConfigError("--from and --to are required")
    source, target = pathlib.Path(FROM.value), pathlib.Path(TO.value)
    if not (source / "config.json").is_file():
        raise ConfigError(f"--from {source} has no config.json: it is no run and no checkpoint")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"--to {target} exists; give a new folder")
    try:
        public = json.loads((source / "config.json").read_text())
        if "task" in public and "optimizer" in public:
            export_run(source, target)
            return
        tensors = read_tensors(source)
        family = FAMILY.value or guess(tensors)
        if flags.FLAGS["config"].value is None:
            translate(tensors, public, family, target)
        else:
            import_run(tensors, public, family, target)
    except ConfigError:
        raise
    except (ValueError, OSError) as error:
        raise ConfigError(f"--from {source}: {error}") from error


def export_run(source: pathlib.Path, target: pathlib.Path) -> None:
    """A run's (averaged) parameters as a published checkpoint."""
    run = run_lib.load(source, STEP.value)
    family = target_family(run.config.family)
    model = dict(run.config.model)
    if "embeddings" in run.params:
        model["vocab_size"] = run.params["embeddings"].shape[0]
    elif run.config.task != "rectified_flow":
        raise ConfigError(f"{family} is a language model, and no model of task {run.config.task}")
    entry = interop.find(family)
    write(target, run.params, entry.public_config(entry.config_class(**model)), family)
    print(f"step {run.step} of {source} written to {target}")


def import_run(
    tensors: Mapping[str, Any], public: Mapping[str, Any], family: str, target: pathlib.Path
) -> None:
    """A published checkpoint as step 0 of a new run."""
    module, params = interop.from_torch(family, tensors, public)
    file, base = flags_lib.config_file()
    sizes = {k: v for k, v in dataclasses.asdict(module.config).items() if k not in OURS}
    values = base.to_dict()
    if values["family"] != interop.find(family).family:
        raise ConfigError(f"--config is of family {values['family']}, --from of {family}")
    values["model"] |= sizes
    config = from_dict(values)
    task = tasks.build(config)
    data = task.train_data(0, 1)
    state = jax.jit(lambda: state_lib.create(task, config))()
    params = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), params, state.params)
    ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
    state = dataclasses.replace(state, params=params, ema=ema)
    target.mkdir(parents=True, exist_ok=True)
    loop.write_config(target, config)
    checkpoints = Checkpoints(target, config.checkpoint)
    checkpoints.save(state, to_dict(config), data.get_state())
    checkpoints.wait()
    checkpoints.close()
    print(f"{params_lib.count(params):,} parameters written to {target}; train on with")
    overrides = flags_lib.overrides(file, values)
    where = [f"--config={file}", f"--workdir={target}"]
    print(shlex.join(["python", "-m", "scanax.train.main", *where, *overrides]))


def translate(
    tensors: Mapping[str, Any], public: Mapping[str, Any], family: str, target: pathlib.Path
) -> None:
    """A published checkpoint under the names of another family."""
    module, params = interop.from_torch(family, tensors, public)
    chosen = target_family(interop.find(family).family)
    write(target, params, interop.find(chosen).public_config(module.config), chosen)
    print(f"{params_lib.count(params):,} parameters written to {target}")


def target_family(model: str) -> str:
    """--to_family, or the first that publishes such models; a ConfigError if it does not."""
    names = [name for name, entry in interop.FAMILIES.items() if entry.family == model]
    if not names:
        raise ConfigError(f"there are no published models of family {model}")
    family = TO_FAMILY.value or names[0]
    if interop.find(family).family != model:
        raise ConfigError(f"--to_family must be one of {', '.join(names)}; got {family}")
    return family


def write(target: pathlib.Path, params: Any, public: Mapping[str, Any], name: str) -> None:
    """config.json and model.safetensors."""
    safetensors = _package()
    if DTYPE.value:
        params = jax.tree.map(lambda x: x.astype(DTYPE.value), params)
        public = {**public, "torch_dtype": DTYPE.value}
    tensors, family = interop.to_torch(name, params, public), interop.find(name)
    if family.write is not None:
        public = family.write({}, public)[1]
    target.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(public, indent=2) + "\n")


def read_tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of the folder's .safetensors files.

    Raises:
      ConfigError: if there are none, one is damaged, or an index names a file that is missing.
    """
    safetensors = _package()
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [folder / name for name in names]
    if not files:
        raise ConfigError(f"--from {folder} has no .safetensors files")
    tensors = {}
    for file in files:
        try:
            tensors |= safetensors.numpy.load_file(file)
        except (safetensors.SafetensorError, OSError) as error:
            raise ConfigError(f"{file} cannot be read: {error}; download it again") from error
    return tensors


def guess(tensors: Mapping[str, Any]) -> str:
    """The family by its tensors' names."""
    has = lambda part: any(part in name for name in tensors)
    for part, family in (
        (".g_proj.0.", "fla_lightnet"),
        (".block_sparse_moe.", "rmoe_llama"),
        (".smoe.", "rmoe_seq"),
        ("vocab_embed.", "radd"),
        ("all_modules.", "ncsnpp"),
        ("_aux_norm.", "edm_songunet"),
        ("out_norm.", "edm_dhariwal"),
    ):
        if has(part):
            return family
    return "official_delta_product" if has(".k_projs.0.") else "fla_delta_product"


def _package() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ConfigError("this needs: pip install 'scanax[interop]'") from error
    return safetensors


if __name__ == "__main__":
    flags_lib.launch(main)
