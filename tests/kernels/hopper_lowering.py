"""Lowers functions with Hopper kernels for an H100 that is not there, and reads what they need."""

import re

import jax
from jax._src.lib import mosaic_gpu_dialect
from jax.interpreters import mlir
from jax.sharding import AbstractDevice, AbstractMesh
from jaxlib.mlir import ir
import jaxlib.mlir.dialects.gpu
import jaxlib.mlir.dialects.llvm
import jaxlib.mlir.dialects.nvvm  # noqa: F401

H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")


def shared_memory(function, *arguments, mesh: AbstractMesh | None = None) -> dict[str, int]:
    """Bytes of shared memory of every Hopper kernel that a function of such arguments calls.

    Args:
      function: not jitted.
      *arguments: trees of ``jax.ShapeDtypeStruct``.
      mesh: of such devices; None for one.

    Returns:
      By the name of the kernel.
    """
    mesh = mesh or AbstractMesh((1,), ("device",), abstract_device=H100)
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    needed = {}
    for module in _kernels(lowered.compiler_ir("stablehlo").operation):
        with mlir.make_ir_context() as context:
            mosaic_gpu_dialect.register_dialect(context)
            context.allow_unregistered_dialects = True
            text = str(ir.Module.parse(module))
        name = re.search(r"module @(\w+)", text)[1]
        # The last operand of the launch.
        operand = re.search(r'gpu\.launch"\([^)]*(%\w+)\)', text)[1]
        constant = re.search(rf"{operand} = .*?value = (\d+)", text)
        needed[name] = int(constant[1])
    return needed


def _kernels(operation) -> list[bytes]:
    found = []
    for inner in (x for region in operation.regions for block in region for x in block):
        if "mosaic_gpu" in str(inner.attributes.get("call_target_name", "")):
            config = ir.DictAttr(inner.attributes["mhlo.backend_config"])
            found.append(ir.StringAttr(config["module"]).value_bytes)
        found += _kernels(inner.operation)
    return found
