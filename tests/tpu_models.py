"""Compiles training steps for TPUs that are not there, with the Pallas kernels in the real models.

  python tests/tpu_models.py        (where libtpu is installed: pip install -e '.[tpu]')

A language model of each scan, bfloat16, on four chips divided by fsdp and tensor. Checked: all
scans of the program are kernels; and no array that is larger than what a kernel reads in a step is
moved, to another layout or device, between the products of matrices and the kernel that reads it.
"""

import importlib.util
import math
import pathlib
import re

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
STEP_BYTES = 8 * 128 * 128 * 2  # 8 heads, 128 tokens, 128 wide, bfloat16
# Operations of an optimised program that compute nothing; where bytes stay, it says bitcast.
MOVES = ("copy", "reshape", "transpose", "all-to-all", "all-gather", "collective-permute")
# Config, and the kernel in its program.
MODELS = {"lm_embedded.py": "delta_product", "lightnet_lm_embedded.py": "additive_scan"}


def program(config_file: str) -> str:
    """The optimised HLO of a training step."""
    from scanax.train import dry_run, tasks
    from scanax.train.config import from_dict

    spec = importlib.util.spec_from_file_location("config", CONFIGS / config_file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.model.implementation, config.model.dtype = "pallas_tpu", "bfloat16"
    config.model.hidden_size, config.model.num_heads, config.model.vocab_size = 512, 4, 258
    if "head_dim" in config.model and config.model.head_dim:
        config.model.head_dim = 128
    config.data.length = 1024
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 1, 2, 2
    config = from_dict(config.to_dict())
    compiled, *_ = dry_run.compile_step(tasks.build(config), config, "v5e:2x2")
    return compiled.as_text()


def moved(hlo: str, kernel: str) -> set[str]:
    """Arrays larger than a step that are moved on their way from products to calls of a kernel."""
    defined, bodies = {}, {}
    for header, lines in re.findall(r"(?ms)^(?:ENTRY )?%(\S+) \(.*?\{$(.*?)^\}", hlo):
        bodies[header] = re.findall(r"(?m)^\s+(?:ROOT )?%(\S+) = (.*)", lines)
        defined.update(bodies[header])
    found, seen = set(), set()

    def steps_of(name):
        """The operation, and with a fusion those inside."""
        called = re.search(r"calls=%([\w.-]+)", defined[name])
        inner = [step for x, _ in bodies[called[1]] for step in steps_of(x)] if called else []
        return [(name, *parts(defined[name])), *inner]

    def visit(name):
        steps = [step for step in steps_of(name) if size(step[1]) > STEP_BYTES]
        if name in seen or not steps:
            return
        seen.add(name)
        for step, kind, operation, operands in steps:
            same = operation == "copy" and layout(kind) == layout(parts(defined[operands[0]])[0])
            if operation in MOVES and not same:
                found.add(f"{step}: {kind} {operation}")
        if not {"convolution", "dot"} & {operation for _, _, operation, _ in steps}:
            for operand in parts(defined[name])[2]:
                visit(operand)

    for name, text in defined.items():
        if name.startswith(kernel) and "tpu_custom_call" in text:
            for operand in parts(text)[2]:
                visit(operand)
    return found


def parts(text: str) -> tuple[str, str, list[str]]:
    """A definition's type, operation and operands."""
    kind, operation, rest = re.match(r"(\(.*?\)|\S+) ([\w-]+)\((.*)", text).groups()
    return kind, operation, re.findall(r"%([\w.-]+)", rest.split("), ")[0])


def layout(kind: str) -> str:
    """The order of dimensions and the tiles of a type, without its memory."""
    return re.sub(r"S\(\d\)", "", kind)


def size(kind: str) -> int:
    """Bytes of the arrays of a type."""
    width = {"bf16": 2, "f32": 4, "s32": 4, "u32": 4, "pred": 1}
    arrays = re.findall(r"\b(\w+)\[([\d,]*)\]", kind)
    return sum(
        width.get(name, 0) * math.prod(map(int, dims.split(",") if dims else []))
        for name, dims in arrays
    )


def main() -> None:
    for config_file, kernel in MODELS.items():
        hlo = program(config_file)
        for direction in ("forward", "backward"):
            name = f"{kernel}_{direction}"
            calls = len(re.findall(rf"(?m)^\s*(?:ROOT )?%{name}\S* = .*tpu_custom_call", hlo))
            assert calls >= 2, f"{config_file}: {calls} calls of {name} for two layers"
            found = moved(hlo, name)
            print(f"{config_file}: {calls} calls of {name}, {len(found)} arrays moved before them")
            assert not found, "\n".join(found)


if __name__ == "__main__":
    main()
