"""A small run of the main job with the Python that runs this file: train, resume, reload.

python tests/smoke.py FOLDER
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent / "train"))
import command

from scanax.kernels import native
from scanax.kernels.additive_scan import native_cpu as additive_scan
from scanax.kernels.convolution import native_cpu as convolution
from scanax.kernels.delta_product import native_cpu as delta_product


def main(folder: pathlib.Path) -> None:
    for source in (native.HEADER, *(x.SOURCE for x in (additive_scan, convolution, delta_product))):
        assert source.exists(), f"{source} was not installed"
    for _ in range(2):  # trains, then finds the run finished
        result = command.run(command.train_command(folder / "run"))
        print(result.stdout)
        assert result.returncode == 0
    assert "continuing from step 60" in result.stdout
    result = command.run(command.command("evaluate", f"--workdir={folder / 'run'}"))
    assert result.returncode == 0 and "sequence_accuracy_12" in result.stdout, result.stdout
    warnings = [line for line in result.stdout.splitlines() if "DeprecationWarning" in line]
    assert not warnings, warnings
    print("smoke passed on Python", sys.version.split()[0])


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
