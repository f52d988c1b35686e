"""Grouped matmuls whose schedules are read: each returns a function and its abstract arguments."""

from typing import Any


def _arrays(shape: list[int]) -> Any:
    import jax
    import jax.numpy as jnp

    rows, depth, columns, groups = shape

    def array(*dims: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(dims, dtype)

    sizes = array(groups, dtype=jnp.int32)
    return array(rows, depth), array(groups, depth, columns), array(rows, columns), sizes


def ours(kind: str, shape: list[int]) -> Any:
    """Returns one of our kernels; `shape` is rows, depth, columns and groups of the forward."""
    import jax.numpy as jnp

    from pallas_kernels.grouped_matmul import tpu

    lhs, rhs, d_out, sizes = _arrays(shape)
    offset, groups = jnp.int32(0), shape[3]
    if kind == "forward":
        return lambda x, w, s: tpu.row_products((x,), (w,), s, offset)[0], (lhs, rhs, sizes)
    if kind == "rows-backward":
        return (
            lambda x, w, s: tpu.row_products((x,), (w,), s, offset, transpose_rhs=True)[0],
            (d_out, rhs, sizes),
        )
    if kind == "swiglu":
        return (
            lambda x, g, u, s: tpu.row_products((x,), (g, u), s, offset, activation=True)[0],
            (lhs, rhs, rhs, sizes),
        )
    return (
        lambda x, d, s: tpu.weight_gradient(x, d, s, offset, groups),
        (lhs, d_out, sizes),
    )


def stored(kind: str, shape: list[int], form: str) -> Any:
    """Returns our kernel of few rows, by weights that are stored in a format ("int4_g64")."""
    import jax
    import jax.numpy as jnp

    from dsjax.quantise import format_of
    from pallas_kernels.grouped_matmul import tpu_quantised
    from pallas_kernels.quantised import quantise

    lhs, rhs, _, sizes = _arrays(shape)
    groups, depth, columns = rhs.shape
    named = format_of(form)
    assert named is not None
    wide = jax.ShapeDtypeStruct((groups, columns, depth), jnp.bfloat16)
    weights = jax.eval_shape(lambda w: quantise(w, named), wide)
    offset, count = jnp.int32(0), 2 if kind == "swiglu" else 1

    def run(x: Any, w: Any, s: Any) -> Any:
        return tpu_quantised.row_products(x, [w] * count, 0, s, offset, activation=count == 2)

    return run, (lhs, weights, sizes)


def megablox(kind: str, shape: list[int], tiling: list[int]) -> Any:
    """Returns jax's megablox kernel that does the same, with (rows, depth, columns) of a tile."""
    import importlib

    import jax.numpy as jnp

    # The package has a function of the module's name.
    gmm = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")
    lhs, rhs, d_out, sizes = _arrays(shape)
    options: Any = {"preferred_element_type": jnp.bfloat16, "tiling": tuple(tiling)}
    if kind == "weights-backward":
        return lambda x, d, s: gmm.tgmm(x.T, d, s, **options), (lhs, d_out, sizes)
    transpose = kind == "rows-backward"
    operand = d_out if transpose else lhs
    return (
        lambda x, w, s: gmm.gmm(x, w, s, transpose_rhs=transpose, **options),
        (operand, rhs, sizes),
    )
