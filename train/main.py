"""Trains, or continues, a run: flags and nothing else. The loop is in ``loop.py``.

python -m scanax.train.main --config configs/word_problem_s3.py --workdir runs/s3
"""

from absl import flags
import jax

from . import dry_run, flags as flags_lib, loop, tasks

flags_lib.define_config()
flags_lib.define_workdir()
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Compile for the mesh and print what it costs.")
TOPOLOGY = flags.DEFINE_string(
    "topology", "", "With --dry_run: a TPU slice that need not be there, for example v5e:4x4."
)
ALLOW_CHANGE = flags.DEFINE_bool(
    "allow_config_change", False, "Continue a run although its config differs."
)
ALLOW_DATA = flags.DEFINE_bool(
    "allow_data_change", False, "Continue a run at the same batch number although its data differs."
)
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Call jax.distributed.initialize first: one process per host."
)


def main() -> None:
    config = flags_lib.config()
    if DRY_RUN.value or TOPOLOGY.value:
        dry_run.dry_run(tasks.build(config), config, TOPOLOGY.value)
        return
    workdir = flags_lib.workdir()
    if DISTRIBUTED.value:
        jax.distributed.initialize()
    task = tasks.build(config)
    loop.train(
        task,
        config,
        workdir,
        allow_config_change=ALLOW_CHANGE.value,
        allow_data_change=ALLOW_DATA.value,
    )


if __name__ == "__main__":
    flags_lib.launch(main)
