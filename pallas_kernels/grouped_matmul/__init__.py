"""The experts' FFN: rows sorted by group, each times its group's matrix (arXiv 2405.04434, 2.2).

Four implementations have one meaning: "reference" (plain jax.numpy, small sizes), "xla" (portable:
the CPU and GPUs older than Hopper), "tpu" (Pallas, Mosaic TPU) and "hopper" (Pallas, Mosaic GPU,
sm_90). Shape letters: M rows, K contracted, N columns, G groups.

Each implementation is a module with two functions, in whose terms both ops and their gradients are
written here: `row_products` (rows times weights: one product, two with SwiGLU after them, or the
sum of two) and `weight_gradient`.
"""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from pallas_kernels.fp8_rows import PRODUCTS, rounded
from pallas_kernels.grouped_matmul import quantised_rows
from pallas_kernels.grouped_matmul.limits import STACKS_IN_PLACE, supported
from pallas_kernels.grouped_matmul.stacks import LayerOfStack
from pallas_kernels.implementations import IMPLEMENTATIONS, check_supported, keep, load
from pallas_kernels.manual_axes import vary_alike
from pallas_kernels.quantised import (
    BlockScaledWeights,
    Format,
    QuantisedWeights,
    block_scaled,
    dequantise,
)

__all__ = [
    "IMPLEMENTATIONS",
    "PRODUCTS",
    "PRODUCT_NAME",
    "STACKS_IN_PLACE",
    "BlockScaledWeights",
    "LayerOfStack",
    "QuantisedWeights",
    "block_scaled",
    "dequantise",
    "grouped_matmul",
    "grouped_swiglu",
    "supported",
]

Weights = Array | BlockScaledWeights | QuantisedWeights | LayerOfStack

# For policies of jax.checkpoint: saving what is named so spares the backward pass a second product.
PRODUCT_NAME = "grouped_matmul_product"
# The module of "hopper" for many rows in float8, which rounds them itself.
_FLOAT8 = "hopper_fp8"


def grouped_matmul(
    lhs_MK: Float[Array, "M K"],
    rhs_GKN: Float[Array, "G _ _"] | BlockScaledWeights | QuantisedWeights | LayerOfStack,
    group_sizes_G: Int[Array, " groups"],
    *,
    transpose_rhs: bool = False,
    group_offset: Int[Array, ""] | int | None = None,
    products: str = "widen",
    implementation: str,
) -> Float[Array, "M N"]:
    """Multiplies each row by the matrix of its group (DeepSeek-V2, arXiv 2405.04434, equation 20).

    Rows of group g follow those of group g - 1. Rows at or beyond sum(group_sizes_G), and rows of
    groups that rhs_GKN does not hold, give 0. Sums are in float32. Differentiable in lhs_MK and
    rhs_GKN (when that is an array); the gradient of an empty group is exactly 0.

    Args:
        lhs_MK: bfloat16 or float32 rows.
        rhs_GKN: matrices of lhs_MK's dtype, [G, K, N], or [G, N, K] when transpose_rhs; or their
            quantised form; or a layer of a stack, which "tpu" and "hopper" use where it lies
            (quantised ones in most formats, "hopper" where rows are few), and others copy.
        group_sizes_G: int32 rows of every group, those not held by rhs_GKN included; their sum is
            at most M.
        transpose_rhs: whether to multiply by the transposes, which are not materialised.
        group_offset: int32, the first group that rhs_GKN holds; None when it holds all.
        products: how rows multiply quantised matrices: "widen", as they are, by widened weights, or
            "fp8", rounded to float8 (see `fp8_rows`), by weights stored in float8.
        implementation: one of IMPLEMENTATIONS.

    Returns:
        Rows [M, N] of lhs_MK's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit, an unknown implementation, or what it does not
            take (see `supported`).
    """
    weights = {"rhs_GKN": rhs_GKN}
    _check(lhs_MK, weights, group_sizes_G, group_offset, transpose_rhs, products, implementation)
    offset = jnp.asarray(0 if group_offset is None else group_offset, jnp.int32)
    arrays = vary_alike((lhs_MK, rhs_GKN, group_sizes_G.astype(jnp.int32), offset))
    if lhs_MK.shape[0] == 0:
        num_columns = rhs_GKN.shape[1 if transpose_rhs else 2]
        return lax.full_like(arrays[0], 0, shape=(0, num_columns))
    module, rows = _multiplied(products, implementation, *arrays[:2])
    return _matmul(module, transpose_rhs, rows, *arrays[1:])


def grouped_swiglu(
    lhs_MK: Float[Array, "M K"],
    gate_GKN: Float[Array, "G K N"] | BlockScaledWeights | QuantisedWeights | LayerOfStack,
    up_GKN: Float[Array, "G K N"] | BlockScaledWeights | QuantisedWeights | LayerOfStack,
    group_sizes_G: Int[Array, " groups"],
    *,
    group_offset: Int[Array, ""] | int | None = None,
    products: str = "widen",
    implementation: str,
) -> Float[Array, "M N"]:
    """Gives silu(lhs gate) * (lhs up) by group, in one pass (arXiv 2405.04434, equation 20).

    The two products and the activation stay in float32 and are rounded once. Groups and zeros as
    in grouped_matmul. Under differentiation the two products are kept, in lhs_MK's dtype.

    Args:
        lhs_MK: bfloat16 or float32 rows.
        gate_GKN: gate matrices of lhs_MK's dtype, or their quantised form or a layer of a stack
            (then no gradients).
        up_GKN: up matrices, as gate_GKN; of a stack, with the very `layer` object of gate_GKN.
        group_sizes_G: int32 rows of every group. Their sum is at most M.
        group_offset: int32, the first group that gate_GKN and up_GKN hold; None when they hold all.
        products: as in grouped_matmul.
        implementation: one of IMPLEMENTATIONS.

    Returns:
        Hidden rows [M, N] of lhs_MK's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit, an unknown implementation, or what it does not
            take (see `supported`).
    """
    weights = {"gate_GKN": gate_GKN, "up_GKN": up_GKN}
    _check(lhs_MK, weights, group_sizes_G, group_offset, False, products, implementation)
    plain = _form(gate_GKN) is None and _form(up_GKN) is None
    if gate_GKN.shape != up_GKN.shape or (plain and gate_GKN.dtype != up_GKN.dtype):
        raise ValueError(
            f"up_GKN: shape {up_GKN.shape} and dtype {up_GKN.dtype} must be those of gate_GKN, "
            f"{gate_GKN.shape} and {gate_GKN.dtype}"
        )
    layers = [getattr(rhs, "layer", None) for rhs in (gate_GKN, up_GKN)]
    if layers[0] is not layers[1]:
        raise ValueError(
            f"up_GKN: layer {layers[1]} must be the same object as gate_GKN's, {layers[0]}"
        )
    offset = jnp.asarray(0 if group_offset is None else group_offset, jnp.int32)
    arrays = vary_alike((lhs_MK, gate_GKN, up_GKN, group_sizes_G.astype(jnp.int32), offset))
    if lhs_MK.shape[0] == 0:
        return lax.full_like(arrays[0], 0, shape=(0, gate_GKN.shape[2]))
    module, rows = _multiplied(products, implementation, *arrays[:2])
    return _swiglu(module, rows, *arrays[1:])


def _check(
    lhs_MK: Array,
    weights: dict[str, Weights],
    group_sizes_G: Array,
    group_offset: Array | int | None,
    transpose_rhs: bool,
    products: str,
    implementation: str,
) -> None:
    if lhs_MK.ndim != 2:
        raise ValueError(f"lhs_MK: shape {lhs_MK.shape} must be [M, K]")
    if group_sizes_G.ndim != 1 or not jnp.issubdtype(group_sizes_G.dtype, jnp.integer):
        raise ValueError(
            f"group_sizes_G: shape {group_sizes_G.shape} and dtype {group_sizes_G.dtype} must be "
            "one dim of integers"
        )
    for name, rhs in weights.items():
        _check_rhs(name, lhs_MK, rhs, group_sizes_G, group_offset, transpose_rhs)
        reason = supported(
            implementation,
            width_in=lhs_MK.shape[1],
            width_out=rhs.shape[1 if transpose_rhs else 2],
            dtype=lhs_MK.dtype,
            weights_dtype=rhs.dtype if _form(rhs) is None else None,
            form=_form(rhs),
            products=products,
            transpose_rhs=transpose_rhs,
        )
        check_supported(implementation, reason)


def _check_rhs(
    name: str,
    lhs_MK: Array,
    rhs: Weights,
    group_sizes_G: Array,
    group_offset: Array | int | None,
    transpose_rhs: bool,
) -> None:
    if isinstance(rhs, BlockScaledWeights | QuantisedWeights):
        rhs.check(name)
    elif isinstance(rhs, LayerOfStack) and isinstance(rhs.stack, QuantisedWeights):
        rhs.stack.check(f"{name}.stack")
    elif rhs.ndim != 3 or rhs.dtype != lhs_MK.dtype:
        raise ValueError(
            f"{name}: shape {rhs.shape} and dtype {rhs.dtype} must be three dims of lhs_MK's "
            f"dtype, {lhs_MK.dtype}"
        )
    contracted_dim = 2 if transpose_rhs else 1
    if rhs.shape[contracted_dim] != lhs_MK.shape[1]:
        raise ValueError(
            f"{name}: dim {contracted_dim} of shape {rhs.shape} must be lhs_MK's last, "
            f"{lhs_MK.shape[1]}"
        )
    num_groups, held = group_sizes_G.shape[0], rhs.shape[0]
    if held > num_groups or held == 0 or (group_offset is None and held != num_groups):
        constraint = "as many" if group_offset is None else "at least 1 and at most as many"
        raise ValueError(
            f"{name}: {held} groups must be {constraint} as group_sizes_G has, {num_groups}"
        )


def _multiplied(
    products: str, implementation: str, lhs_MK: Array, rhs: Weights
) -> tuple[str, Array]:
    """The module that multiplies, and what it does to rows: many go to Hopper as they are."""
    if products == "widen":
        return implementation, lhs_MK
    many = lhs_MK.shape[0] > quantised_rows.MOST_MEAN_ROWS * rhs.shape[0]
    if implementation == "hopper" and many:
        return _FLOAT8, lhs_MK
    return implementation, rounded(lhs_MK)


def _placed(implementation: str, rhs: Weights) -> Weights:
    """The weights as the implementation takes them."""
    if implementation == _FLOAT8 or not isinstance(rhs, LayerOfStack):
        return rhs
    in_place = implementation in STACKS_IN_PLACE and _form(rhs) is None
    return rhs if in_place else rhs.take()


def _row_products(
    implementation: str,
    lhs_MK: Array,
    rhs: tuple[Weights, ...],
    group_sizes_G: Array,
    group_offset: Array,
    *,
    transpose_rhs: bool = False,
    activation: bool = False,
) -> tuple[Array, ...]:
    """Rows times weights in whatever form these are."""
    module = load(__name__, implementation)
    quantised = [array for array in rhs if _form(array) is not None]

    def own() -> tuple[Array, ...]:
        """The implementation's own product; one for a chip takes no quantised weights."""
        placed = [_placed(implementation, array) for array in rhs]
        if implementation in ("tpu", "hopper"):
            placed = [
                array.dequantised(lhs_MK.dtype).swapaxes(1, 2)
                if isinstance(array, QuantisedWeights)
                else array
                for array in placed
            ]
        found: tuple[Array, ...] = module.row_products(
            (lhs_MK,),
            tuple(placed),
            group_sizes_G,
            group_offset,
            transpose_rhs=transpose_rhs,
            activation=activation,
        )
        return found

    if implementation in ("reference", _FLOAT8) or len(quantised) < len(rhs):
        return own()
    return quantised_rows.row_products(
        own,
        implementation,
        lhs_MK,
        cast(Any, quantised),
        group_sizes_G,
        group_offset,
        activation=activation,
    )


def _form(rhs: Weights) -> Format | None:
    weights = rhs.stack if isinstance(rhs, LayerOfStack) else rhs
    return weights.format if isinstance(weights, QuantisedWeights) else None


def _refuse_gradient(name: str, rhs: Weights) -> None:
    if isinstance(rhs, BlockScaledWeights | QuantisedWeights | LayerOfStack):
        raise ValueError(f"{name}: {type(rhs).__name__} of {rhs.dtype} have no gradient")


Arrays = tuple[Any, ...]  # The arguments of a differentiated function, pytrees among them.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(
    implementation: str,
    transpose_rhs: bool,
    lhs_MK: Array,
    rhs_GKN: Weights,
    group_sizes_G: Array,
    group_offset: Array,
) -> Array:
    (out_MN,) = _row_products(
        implementation, lhs_MK, (rhs_GKN,), group_sizes_G, group_offset, transpose_rhs=transpose_rhs
    )
    return out_MN


def _matmul_fwd(implementation: str, transpose_rhs: bool, *arrays: Any) -> tuple[Array, Arrays]:
    _refuse_gradient("rhs_GKN", arrays[1])
    out_MN = _matmul(implementation, transpose_rhs, *arrays)
    return keep(out_MN, PRODUCT_NAME, implementation), arrays


def _matmul_bwd(
    implementation: str, transpose_rhs: bool, arrays: Arrays, d_out_MN: Array
) -> Arrays:
    module = load(__name__, implementation)
    lhs_MK, rhs_GKN, *groups = arrays
    # Inside a scan's backward pass a constant offset arrives as a NumPy scalar.
    groups = [jnp.asarray(x) for x in groups]
    (d_lhs_MK,) = module.row_products(
        (d_out_MN,), (rhs_GKN,), *groups, transpose_rhs=not transpose_rhs
    )
    # The gradient of transposed weights is the same product with its sides exchanged.
    sides = (d_out_MN, lhs_MK) if transpose_rhs else (lhs_MK, d_out_MN)
    d_rhs_GKN = module.weight_gradient(*sides, *groups, rhs_GKN.shape[0])
    return d_lhs_MK, d_rhs_GKN, None, None


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _swiglu(
    implementation: str,
    lhs_MK: Array,
    gate_GKN: Weights,
    up_GKN: Weights,
    group_sizes_G: Array,
    group_offset: Array,
) -> Array:
    (hidden_MN,) = _row_products(
        implementation, lhs_MK, (gate_GKN, up_GKN), group_sizes_G, group_offset, activation=True
    )
    return hidden_MN


def _swiglu_fwd(
    implementation: str, lhs_MK: Array, gate_GKN: Weights, up_GKN: Weights, *groups: Array
) -> tuple[Array, Arrays]:
    _refuse_gradient("gate_GKN", gate_GKN)
    _refuse_gradient("up_GKN", up_GKN)
    # The backward pass needs both products, so they are kept rather than made again there.
    products = load(__name__, implementation).row_products(
        (lhs_MK,), (gate_GKN, up_GKN), *groups, activation=True, keep_products=True
    )
    hidden_MN, gate_MN, up_MN = (keep(array, PRODUCT_NAME, implementation) for array in products)
    return hidden_MN, (lhs_MK, gate_GKN, up_GKN, gate_MN, up_MN, *groups)


def _swiglu_bwd(implementation: str, residuals: Arrays, d_hidden_MN: Array) -> Arrays:
    module = load(__name__, implementation)
    lhs_MK, gate_GKN, up_GKN, gate_MN, up_MN, *groups = residuals
    groups = [jnp.asarray(x) for x in groups]
    gate, up = gate_MN.astype(jnp.float32), up_MN.astype(jnp.float32)
    d_hidden = d_hidden_MN.astype(jnp.float32)
    sigmoid = jax.nn.sigmoid(gate)
    d_up_MN = (d_hidden * gate * sigmoid).astype(lhs_MK.dtype)
    d_gate_MN = (d_hidden * up * sigmoid * (1 + gate * (1 - sigmoid))).astype(lhs_MK.dtype)
    (d_lhs_MK,) = module.row_products(
        (d_gate_MN, d_up_MN), (gate_GKN, up_GKN), *groups, transpose_rhs=True
    )
    d_gate_GKN, d_up_GKN = (
        module.weight_gradient(lhs_MK, d_product_MN, *groups, gate_GKN.shape[0])
        for d_product_MN in (d_gate_MN, d_up_MN)
    )
    return d_lhs_MK, d_gate_GKN, d_up_GKN, None, None


_swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)
