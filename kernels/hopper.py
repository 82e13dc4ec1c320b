"""What the kernels for Hopper GPUs share: tiles, products of matrices, buffers that are read ahead.

They are written in Pallas' Mosaic GPU. A program runs on one or two warpgroups of 128 threads; a
matrix of a warpgroup has rows in multiples of 64, one quarter of them in each warp. Products take
bfloat16 factors: the left one from registers or shared memory, the right one from shared memory,
each as it lies there or transposed; they sum in float32 in registers.
"""

from collections.abc import Callable, Iterator
import contextlib
import contextvars
import inspect
from typing import Any, NamedTuple

import jax
from jax.experimental.layout import Layout, with_layout_constraint
import jax.experimental.pallas as pl
import jax.numpy as jnp

from .per_device import varying

try:
    import jax.experimental.pallas.mosaic_gpu as plgpu
except ImportError as error:  # a jaxlib without the compiler
    plgpu: Any = None
    MISSING = f"Pallas' Mosaic GPU cannot be imported: {error}"
    WHOLE = {}
else:
    MISSING = None
    # JAX 0.10 must be told that all of an array is loaded; later versions need not or may not.
    _index = inspect.signature(plgpu.load).parameters.get("idx")
    WHOLE = {"idx": ()} if _index and _index.default is inspect.Parameter.empty else {}

ROWS = 64  # of a matrix of one warpgroup
SHARED_BYTES = 232_448  # shared memory that a program may have
PROCESSORS = 132  # that run programs side by side, of an H100
MOST_PROGRAMS = 65_535  # along all but one axis of a grid

_interpreter: contextvars.ContextVar[Any] = contextvars.ContextVar("interpreter", default=None)


@contextlib.contextmanager
def interpreted(params: Any) -> Iterator[None]:
    """Kernels that are traced inside run in Pallas' interpreter for GPUs, without one."""
    token = _interpreter.set(params)
    try:
        yield
    finally:
        _interpreter.reset(token)


def unavailable(*programs: int) -> str | None:
    """Why kernels cannot run, or None; what is no GPU at all is told by Pallas itself.

    Args:
      *programs: along one axis of a grid.
    """
    if max(programs, default=0) > MOST_PROGRAMS:
        return f"at most {MOST_PROGRAMS} rows times heads, and chunks of a row, not {programs}"
    if MISSING is None and jax.default_backend() == "gpu":
        capability = getattr(jax.devices()[0], "compute_capability", "?")
        if capability != "9.0":
            return f"the kernels are for GPUs of compute capability 9.0 (Hopper), not {capability}"
    return MISSING


def processors() -> int:
    """How many programs of the device run side by side."""
    return getattr(jax.devices()[0], "core_count", None) or PROCESSORS


def row_major(tree: Any) -> Any:
    """The arrays, in memory in the order of their axes, as the kernels read and write them.

    XLA would take the order that suits what else computes them, and copy them here and there.
    """
    order = lambda x: Layout(tuple(range(x.ndim)))
    return jax.tree.map(lambda x: with_layout_constraint(x, order(x)), tree)


def tile(*shape: int, dtype=jnp.bfloat16):
    """Shared memory for matrices, in the order of bytes that tensor cores want."""
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle(shape[-1] * bits)
    transforms = (
        plgpu.TilingTransform((8, 8 * swizzle // bits)),
        plgpu.SwizzleTransform(swizzle),
    )
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def vectors(*shape: int):
    """Shared memory for float32 vectors."""
    return plgpu.SMEM(shape, jnp.float32)


def product(a, b, init: jax.Array | None = None) -> jax.Array:
    """a b + init, of which a has a multiple of 64 rows; finished when it returns.

    The barrier keeps the compiler from reading the result's registers before they are ready.
    """
    shape = (a.shape[0], b.shape[1])
    if _interpreter.get() is not None:  # it multiplies nothing that is in registers
        a, b = (x if isinstance(x, jax.Array) else x[...] for x in (a, b))
        sums = jnp.matmul(a, b, preferred_element_type=jnp.float32, precision="highest")
        return sums if init is None else init + sums
    if init is None:

        def fresh(sums):
            plgpu.wgmma(sums, a, b)
            return sums[...]

        sums = pl.run_scoped(fresh, plgpu.ACC(shape, jnp.float32))
    else:
        sums = pl.run_state(lambda sums: plgpu.wgmma(sums, a, b))(plgpu.ACC.init(init))
    return jax.lax.optimization_barrier(sums)


def zeros(*shape: int, dtype=jnp.float32) -> jax.Array:
    """A matrix in registers."""
    return plgpu.layout_cast(jnp.zeros(shape, dtype), plgpu.Layout.WGMMA)


def load(ref) -> jax.Array:
    """A matrix from shared memory."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA, **WHOLE)


def load_transposed(ref) -> jax.Array:
    """The transposed matrix."""
    x = plgpu.load(ref.T, layout=plgpu.Layout.WGMMA_TRANSPOSED, **WHOLE)
    return plgpu.layout_cast(x, plgpu.Layout.WGMMA)


def store_transposed(ref, x: jax.Array) -> None:
    """Puts the transposed matrix into shared memory."""
    ref.T[...] = plgpu.layout_cast(x, plgpu.Layout.WGMMA_TRANSPOSED)


def column(ref) -> jax.Array:
    """A vector from shared memory, an entry per row of a matrix."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1), **WHOLE)


def row(ref) -> jax.Array:
    """A vector from shared memory, an entry per column of a matrix."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(0), **WHOLE)


def by_column(vector: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """A column, repeated to all columns of a matrix."""
    return jax.lax.broadcast_in_dim(vector, shape, [0])


def by_row(vector: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """A row, repeated to all rows of a matrix."""
    return jax.lax.broadcast_in_dim(vector, shape, [1])


def index(shape: tuple[int, int], axis: int) -> jax.Array:
    """Row (axis 0) or column (axis 1) numbers of a matrix, int32."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


class Read(NamedTuple):
    """An array of which programs read one tile after the other, or one.

    Attributes:
      array: in the GPU's memory.
      memory: ``tile`` or ``vectors``; shape: of a tile in it.
      index: (place, n) -> what the n-th tile holds of the array.
      rows: how many of the tile's are read, if not all; the others are 0.
    """

    array: jax.Array
    memory: Callable[..., Any]
    shape: tuple[int, ...]
    index: Callable[..., tuple[Any, ...]]
    rows: int | None = None

    @property
    def _partly(self) -> bool:
        return self.rows not in (None, self.shape[0])

    def start(self, array_ref, tile_ref, place, n, barrier) -> None:
        target = tile_ref.at[pl.ds(0, self.rows)] if self._partly else tile_ref
        plgpu.copy_gmem_to_smem(array_ref.at[self.index(place, n)], target, barrier)

    def clear(self, tile_ref) -> None:
        """Before the first copy: the rows that no copy fills."""
        if self._partly:
            tile_ref[...] = zeros(*tile_ref.shape, dtype=self.array.dtype)


def one_tile(
    name: str,
    grid: dict[str, int],
    reads: dict[str, Read],
    inputs: dict[str, jax.Array],
    outputs,
    scratch,
    compute: Callable[..., None],
):
    """A kernel whose programs read one tile of every array, and compute.

    Args:
      name: of the kernel; grid: the axes of its programs, the last varies the fastest.
      reads: arrays by name; inputs: those that ``compute`` copies itself; outputs: shapes by name;
      scratch: shared memory by name.
      compute: (place, refs), with the index on every axis, and all tiles, inputs, outputs and
        scratch.

    Returns:
      The outputs by name.
    """

    def body(*refs, tiles, ready, **scratch):
        place = {axis: jax.lax.axis_index(axis) for axis in grid}
        arrays, others = refs[: len(reads)], refs[len(reads) :]
        others = {**scratch, **dict(zip((*inputs, *outputs), others, strict=True))}
        for key, read in reads.items():
            read.clear(tiles[key])
        plgpu.commit_smem()
        for (key, read), array in zip(reads.items(), arrays, strict=True):
            read.start(array, tiles[key], place, 0, ready)
        plgpu.barrier_wait(ready)
        compute(place, {**tiles, **others})
        plgpu.wait_smem_to_gmem(0)

    memory = {
        **scratch,
        "tiles": {key: read.memory(*read.shape) for key, read in reads.items()},
        "ready": plgpu.Barrier(num_arrivals=len(reads)),
    }
    return _call(body, name, grid, reads, inputs, outputs, memory)


def through_tiles(
    name: str,
    grid: dict[str, int],
    count: int,
    reads: dict[str, Read],
    inputs: dict[str, jax.Array],
    outputs,
    scratch,
    first: Callable[..., Any],
    step: Callable[..., Any],
    last: Callable[..., None],
    slots: int = 2,
):
    """A kernel whose programs go through ``count`` tiles, which a second warpgroup reads ahead.

    Args:
      name, grid, reads, outputs, scratch: as of :func:`one_tile`.
      inputs: arrays that are not read by tiles, by name.
      first: (place, refs) -> what is carried; step: (place, n, refs, carried) -> carried;
      last: (place, refs, carried).
      slots: tiles of an array that shared memory holds at a time.

    Returns:
      The outputs by name.
    """

    def body(*refs, tiles, ready, free, done, **scratch):
        place = {axis: jax.lax.axis_index(axis) for axis in grid}
        arrays, others = refs[: len(reads)], refs[len(reads) :]
        others = {**scratch, **dict(zip((*inputs, *outputs), others, strict=True))}
        slot_of = lambda n: {key: ref.at[jax.lax.rem(n, slots)] for key, ref in tiles.items()}
        warpgroup = jax.lax.axis_index("warpgroup")

        def one_step(n, carried):
            plgpu.barrier_wait(ready.at[jax.lax.rem(n, slots)])
            carried = step(place, n, {**slot_of(n), **others}, carried)
            plgpu.commit_smem()  # what was read comes before what is copied there next
            plgpu.barrier_arrive(free.at[jax.lax.rem(n, slots)])
            return carried

        def start(n, slot: Any):
            for (key, read), array in zip(reads.items(), arrays, strict=True):
                read.start(array, tiles[key].at[slot], place, n, ready.at[slot])

        @pl.when(warpgroup == 0)
        def _():
            plgpu.set_max_registers(232, action="increase")
            carried = jax.lax.fori_loop(0, count, one_step, first(place, others))
            last(place, others, carried)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == 1)
        def _():
            for key, read in reads.items():
                for slot in range(slots):
                    read.clear(tiles[key].at[slot])
            plgpu.commit_smem()
            plgpu.set_max_registers(40, action="decrease")
            for n in range(min(slots, count)):
                start(n, n)

            @pl.loop(slots, count)
            def _(n):
                plgpu.barrier_wait(free.at[jax.lax.rem(n, slots)])
                start(n, jax.lax.rem(n, slots))

            for n in range(max(count - slots, 0), count):
                plgpu.barrier_wait(free.at[n % slots])

        # A warpgroup that left while another multiplies would take its instructions with it.
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)

    memory = {
        **scratch,
        "tiles": {key: read.memory(slots, *read.shape) for key, read in reads.items()},
        "ready": plgpu.Barrier(num_arrivals=len(reads), num_barriers=slots),
        "free": plgpu.Barrier(num_barriers=slots),
        "done": plgpu.Barrier(num_arrivals=2),
    }
    threads = {"num_threads": 2, "thread_name": "warpgroup"}
    return _call(body, name, grid, reads, inputs, outputs, memory, **threads)


def _call(body, name, grid, reads, inputs, outputs, memory, **threads):
    arrays = [*(read.array for read in reads.values()), *inputs.values()]
    results = plgpu.kernel(
        body,
        out_type=varying(list(outputs.values()), arrays),
        scratch_types=memory,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        kernel_name=name,
        interpret=_interpreter.get(),
        **threads,
    )(*arrays)
    return dict(zip(outputs, results, strict=True))
