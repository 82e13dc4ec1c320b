"""Compiles training steps for TPUs that are not there, with the Pallas kernels in the real models.

  python tests/tpu_models.py [--only REGEX]    (where libtpu is installed: pip install -e '.[tpu]')

Language models of both scans on four chips. Checked: all scans of the program are kernels; and no
array that is larger than the keys a kernel reads in a step is moved, to another layout or device,
between the products of matrices and the kernel that reads it. A case is named by its model, dtype,
width of heads, N, chip, and the devices along fsdp and tensor; ``--only ""`` takes all.
"""

import argparse
import importlib.util
import itertools
import math
import pathlib
import re

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
# Operations of an optimised program that compute nothing; where bytes stay, it says bitcast.
MOVES = ("copy", "reshape", "transpose", "all-to-all", "all-gather", "collective-permute")
# Config, the kernel in its program, and numbers of steps N.
MODELS = {
    "lm_embedded": ("delta_product", (1, 2, 3)),
    "lightnet_lm_embedded": ("additive_scan", (1,)),
}
CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
WIDTHS = {"bfloat16": 2, "float32": 4}  # bytes
KEYS = {1: 8 * 128, 2: 16 * 64 * 2, 3: 16 * 32 * 3}  # that a kernel reads in a step, by N
QUICK = "lm_embedded bfloat16 128 2 v5e 2x2|lightnet_lm_embedded bfloat16 64 1 v5e 2x2"


def cases() -> list[tuple]:
    """(model, dtype, width of a head, N, chip, devices along fsdp and tensor)."""
    return [
        (model, *case)
        for model, (_, steps) in MODELS.items()
        for case in itertools.product(WIDTHS, (64, 128), steps, CHIPS, ("2x2", "4x1"))
    ]


def program(model: str, dtype: str, width: int, steps: int, chip: str, devices: str) -> str:
    """The optimised HLO of a training step."""
    from scanax.train import dry_run, tasks
    from scanax.train.config import from_dict

    spec = importlib.util.spec_from_file_location("config", CONFIGS / f"{model}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.model.implementation, config.model.dtype = "pallas_tpu", dtype
    config.model.hidden_size, config.model.vocab_size = 512, 258
    config.model.num_heads = 512 // width
    if model == "lm_embedded":
        config.model.head_dim, config.model.num_householder = width, steps
    config.data.length, config.mesh.data = 1024, 1
    config.mesh.fsdp, config.mesh.tensor = map(int, devices.split("x"))
    config = from_dict(config.to_dict())
    compiled, *_ = dry_run.compile_step(tasks.build(config), config, CHIPS[chip])
    return compiled.as_text()


def moved(hlo: str, kernel: str, step_bytes: int) -> set[str]:
    """Arrays larger than a step that are moved on their way from products to calls of a kernel."""
    defined, roots, found, seen = {}, {}, set(), set()
    for header, lines in re.findall(r"(?ms)^(?:ENTRY )?%(\S+) \(.*?\{$(.*?)^\}", hlo):
        for root, name, text in re.findall(r"(?m)^\s+(ROOT )?%(\S+) = (.*)", lines):
            defined[name] = text
            if root:
                roots[header] = name

    def visit(name, element=None, outer=()):
        """What flows into (an element of) a result, inside these fusions."""
        kind, operation, operands = parts(defined[name])
        place = name, element, outer
        if place in seen or size(kind) <= step_bytes or operation in ("convolution", "dot"):
            return
        seen.add(place)
        if operation == "fusion":
            called = re.search(r"calls=%([\w.-]+)", defined[name])[1]
            visit(roots[called], element, (*outer, name))
        elif operation == "parameter" and outer:
            number = int(re.search(r"parameter\((\d+)\)", defined[name])[1])
            visit(parts(defined[outer[-1]])[2][number], None, outer[:-1])
        elif operation == "get-tuple-element":
            visit(operands[0], int(re.search(r"index=(\d+)", defined[name])[1]), outer)
        elif operation == "tuple" and element is not None:
            visit(operands[element], None, outer)
        else:
            stays = operation == "copy" and layout(kind) == layout(parts(defined[operands[0]])[0])
            if operation in MOVES and not stays:
                found.add(f"{name}: {kind} {operation}")
            for operand in operands:
                visit(operand, None, outer)

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
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default=QUICK, metavar="REGEX", help="cases; all if empty")
    pattern = parser.parse_args().only
    chosen = [case for case in cases() if re.match(pattern, " ".join(map(str, case)))]
    if not chosen:
        names = ["  " + " ".join(map(str, case)) for case in cases()]
        parser.error("\n".join([f"--only {pattern!r} is none of these:", *names]))
    failed = []
    for model, dtype, width, steps, *others in chosen:
        kernel, step_bytes = MODELS[model][0], KEYS[steps] * width * WIDTHS[dtype]
        hlo = program(model, dtype, width, steps, *others)
        for direction in ("forward", "backward"):
            name = f"{kernel}_{direction}"
            calls = len(re.findall(rf"(?m)^\s*(?:ROOT )?%{name}\S* = .*tpu_custom_call", hlo))
            assert calls >= 2, f"{calls} calls of {name} for two layers"
            found = moved(hlo, name, step_bytes)
            case = " ".join(map(str, (model, dtype, width, steps, *others)))
            line = f"{case}: {calls} calls of {name}, {len(found)} arrays moved before them"
            print(line, *sorted(found), sep="\n  ", flush=True)
            failed += [case] * bool(found)
    assert not failed, failed


if __name__ == "__main__":
    main()
