"""What the Hopper kernels do with accumulators in registers."""

import functools

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.lib.mlir.dialects import arith, nvvm, scf, vector  # Not all in jax.extend.mlir.
from jax.experimental.mosaic import gpu as mgpu
from jax.extend.mlir import ir
from jaxtyping import Array


def opaque(index: int) -> Array:
    """Returns an index that the compiler cannot see through.

    The descriptors of a wgmma's operands depend on it. From a constant they would all be computed
    before the loop, and there are not the registers to hold them.
    """
    return lax.optimization_barrier(jnp.int32(index))


def rescaled(acc: Array, factor: Array) -> Array:
    """Multiplies rows by their factors; a warp whose factors are all 1 skips its rows."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)),
        return_type=plgpu.ShapeDtypeStruct(acc.shape, acc.dtype, layout=plgpu.Layout.WGMMA),
    )
    def scale(_, acc, factor):  # type: ignore[no-untyped-def]
        one = mgpu.utils.c(1.0, ir.F32Type.get())
        first = ir.DenseI64ArrayAttr.get([0])
        values = [vector.extract(vector_, [], first) for vector_ in factor.registers.flat]
        changed = [arith.cmpf(arith.CmpFPredicate.UNE, value, one) for value in values]
        any_changed = nvvm.vote_sync(
            mgpu.utils.c(-1, ir.IntegerType.get_signless(32)),  # All lanes of the warp.
            functools.reduce(arith.ori, changed),
            nvvm.VoteSyncKind.any,
            results=[ir.IntegerType.get_signless(1)],
        )
        registers = list(acc.registers.flat)
        types = [register.type for register in registers]
        branch = scf.IfOp(any_changed, types, has_else=True)  # type: ignore[call-arg]
        with ir.InsertionPoint(branch.then_block):
            scaled = acc * factor.broadcast_in_dim(acc.shape, (0,), acc.layout)
            scf.yield_(list(scaled.registers.flat))
        with ir.InsertionPoint(branch.else_block):
            scf.yield_(registers)
        result = np.asarray(branch.results, dtype=object).reshape(acc.registers.shape)
        return mgpu.FragmentedArray(_registers=result, _layout=acc.layout, _is_signed=None)

    return scale(acc, factor)
