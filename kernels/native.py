"""Kernels in C++ for CPUs: compiled for this machine when they are first used, and kept.

The compiler is ``$CXX``, or the first of g++ and clang++ that is found. What it makes is kept in
``$XDG_CACHE_HOME/scanax`` (``~/.cache/scanax``) by a name that depends on the source, the compiler,
the machine's instructions and the headers of jaxlib, so that nothing stale is ever loaded.
"""

import ctypes
import functools
import hashlib
from importlib.metadata import version
import os
import pathlib
import shlex
import shutil
import subprocess
import tempfile

from absl import logging
import jax
import jax.numpy as jnp

from .dispatch import target
from .per_device import varying

HEADER = pathlib.Path(__file__).with_name("native.h")
OPTIONS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fPIC",
    "-shared",
    "-pthread",
)


def why_not(source: pathlib.Path, functions: tuple[str, ...]) -> str | None:
    """Makes the functions of a source file targets of ``jax.ffi.ffi_call``, or says why not.

    Args:
      source: a C++ file that defines XLA FFI handlers.
      functions: names of handlers. Their targets are called ``scanax_`` and the name.
    """
    platform, _ = target()
    return (
        _not_loaded(source, functions) if platform == "cpu" else f"it needs a CPU, not {platform}"
    )


@functools.cache
def _not_loaded(source: pathlib.Path, functions: tuple[str, ...]) -> str | None:
    named = shlex.split(os.environ.get("CXX", ""))
    compilers = [named] if named else [["g++"], ["clang++"]]
    compiler = next((command for command in compilers if shutil.which(command[0])), None)
    if compiler is None:
        names = " or ".join(map(shlex.join, compilers))
        return f"there is no C++ compiler ({names}); CXX can name one"
    try:
        library = ctypes.CDLL(str(_compiled(source, compiler)))
    except subprocess.CalledProcessError as error:
        said = next((x for x in error.stderr.splitlines() if "error" in x), error.stderr)
        return f"{shlex.join(compiler)} did not compile {source.name}: {said.strip()}"
    except (OSError, RuntimeError) as error:  # the latter where there is no home
        return f"what {source.name} is compiled to cannot be kept: {error}; set XDG_CACHE_HOME"
    for name in functions:
        handler = jax.ffi.pycapsule(getattr(library, name))
        jax.ffi.register_ffi_target(f"scanax_{name}", handler, platform="cpu")
    return None


def call(name: str, outputs: list[jax.ShapeDtypeStruct], inputs, in_place=None, **attributes):
    """Calls a function of which :func:`why_not` said None.

    Inside ``jax.shard_map`` all outputs vary over the axes over which any input does.

    ``in_place``: the number of an input to that of the output that takes its place.
    """
    inputs = vary_alike(*inputs)
    outputs = varying(outputs, [x for x in inputs if x.size])
    function = jax.ffi.ffi_call(
        f"scanax_{name}", outputs, vmap_method="sequential", input_output_aliases=in_place
    )
    return function(*inputs, **attributes)


def vary_alike(*arrays: jax.Array) -> list[jax.Array]:
    """Arrays that all vary over the axes of ``jax.shard_map`` over which any of them does."""
    axes = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    missing = [tuple(sorted(frozenset().union(*axes) - own)) for own in axes]
    return [
        jax.lax.pcast(x, more, to="varying") if more else x
        for x, more in zip(arrays, missing, strict=True)
    ]


def or_nothing(x, dtype) -> jax.Array:
    """None as an array without entries."""
    return jnp.zeros((0,), dtype) if x is None else x.astype(dtype)


def _compiled(source: pathlib.Path, compiler: list[str]) -> pathlib.Path:
    """The library of a source file, from where it is kept or compiled now."""
    run = functools.partial(subprocess.run, check=True, capture_output=True, text=True)
    macros = run([*compiler, *OPTIONS, "-dM", "-E", "-x", "c++", os.devnull]).stdout
    what = (source.read_text(), HEADER.read_text(), macros, version("jaxlib"), *OPTIONS)
    name = f"{source.parent.name}-{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}.so"
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    path = pathlib.Path(home) / "scanax" / name
    if path.exists():
        return path
    logging.info("Compiling %s with %s, once.", source.name, shlex.join(compiler))
    path.parent.mkdir(parents=True, exist_ok=True)
    include = (f"-I{HEADER.parent}", "-isystem", jax.ffi.include_dir())
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        new = pathlib.Path(folder) / name
        run([*compiler, *OPTIONS, *include, str(source), "-o", str(new)])
        new.replace(path)  # in one step: other processes may be at it too
    return path
