"""Compiles training steps for TPUs that are not there, with the Pallas kernels in the real models.

  python tests/tpu_models.py        (where libtpu is installed: pip install -e '.[tpu]')

A language model of each scan, bfloat16, on four chips divided by fsdp and tensor. Checked: all
scans of the program are kernels; and how many arrays are copied into another layout right before
a kernel although they are larger than what it reads in a step. None should be; where the layer
does not yet give them in the layout of the kernel, the number is known and must not grow.
"""

import importlib.util
import pathlib
import re

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
STEP_BYTES = 8 * 128 * 128 * 2  # 8 heads, 128 tokens, 128 wide, bfloat16
# Config; kernel in the program; copies before forward and backward of one layer.
MODELS = {
    "lm_embedded.py": ("delta_product", 1, 2),
    "lightnet_lm_embedded.py": ("additive_scan", 0, 0),
}


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


def copies(hlo: str, kernel: str) -> list[str]:
    """Copies into another layout, larger than a step, among what the calls of a kernel read."""
    defined = dict(re.findall(r"(?m)^\s*(?:ROOT )?%(\S+) = (.*)", hlo))
    found = []
    for name, text in defined.items():
        if not (name.startswith(kernel) and "tpu_custom_call" in text):
            continue
        for operand in re.findall(r"%([\w.-]+)", re.search(r"custom-call\((.*?)\)", text)[1]):
            while (text := defined.get(operand, "")) and re.search(r" (bitcast|copy-done)\(", text):
                operand = re.search(r"(?:bitcast|copy-done)\(%([\w.-]+)", text)[1]
            if re.search(r" copy\(", text) and size(text) > STEP_BYTES:
                found.append(f"{name}: {text[:80]}")
    return found


def size(text: str) -> int:
    """Bytes of an array's definition."""
    kind, dims = re.match(r"(\w+)\[([\d,]*)\]", text).groups()
    bytes_ = {"bf16": 2, "f32": 4, "s32": 4, "pred": 1}[kind]
    for dim in filter(None, dims.split(",")):
        bytes_ *= int(dim)
    return bytes_


def main() -> None:
    for config_file, (kernel, forward, backward) in MODELS.items():
        hlo = program(config_file)
        for direction, known in (("forward", forward), ("backward", backward)):
            name = f"{kernel}_{direction}"
            calls = len(re.findall(rf"(?m)^\s*(?:ROOT )?%{name}\S* = .*tpu_custom_call", hlo))
            assert calls >= 2, f"{config_file}: {calls} calls of {name} for two layers"
            found = copies(hlo, name)
            print(f"{config_file}: {calls} calls of {name}, {len(found)} copies before them")
            assert len(found) <= known * calls, "\n".join(found)


if __name__ == "__main__":
    main()
