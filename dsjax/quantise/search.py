"""Numbers of 4 bits chosen by what a matrix multiplies, after GPTQ (Frantar et al., 2022).

Plain rounding takes the number next to each weight, with the scale that the largest weight of a
group asks for. Here a group's scale is the one of several with the least error, each weight's error
counted by the mean square of its input. Then one input's weights after another are rounded, and the
error of each is taken off the weights that follow, as far as their inputs go together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.quantised import Format, QuantisedWeights

# Inputs whose errors are taken off all that follow in one product.
_BLOCK = 128
# Added to the inputs' mean squares, by their mean; more where float32 cannot factor the sum.
_DAMPING = (0.01, 0.1, 1.0)
# Scales that are tried, by the one that spans the group. Errors of others may widen a group.
_SPANS = np.linspace(0.6, 1.1, 21, dtype=np.float32)


def is_searched(form: Format | None) -> bool:
    """Whether `search` takes a form: those of 4 bits."""
    return form is not None and form.dtype in ("int4", "uint4")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Inputs:
    """What a search needs to know of the rows that a matrix [K, N] multiplies.

    Attributes:
        order_K: int32, inputs as they are rounded: those of large mean square first.
        squares_K: float32, mean square of each input, damped.
        factor_JJ: float32 [J, J], J the next multiple of the block: upper triangular, its square
            the inverse of the damped second moments in that order.
    """

    order_K: jax.Array
    squares_K: jax.Array
    factor_JJ: jax.Array


def inputs_of(moments_KK: Any) -> Inputs:
    """Returns what `search` needs of the second moments of a matrix's inputs.

    Args:
        moments_KK: float32, the sum of x xᵀ over the rows x, at any scale; of no rows at all 0.

    Raises:
        ValueError: they are not finite.
    """
    for damping in _DAMPING:
        inputs = _factored(jnp.asarray(moments_KK, jnp.float32), damping)
        if bool(jnp.isfinite(inputs.factor_JJ).all()):
            return inputs
    raise ValueError("calibrate: what the weights multiply is not finite; the model is damaged")


@jax.jit
def _factored(moments_KK: jax.Array, damping: jax.Array) -> Inputs:
    num_k = moments_KK.shape[0]
    squares_K = jnp.diagonal(moments_KK)
    mean = jnp.mean(squares_K)
    # Of inputs that were never there, each is as good as another.
    moments_KK = jnp.where(mean == 0, jnp.eye(num_k), moments_KK / mean)
    moments_KK += damping * jnp.eye(num_k)
    order_K = jnp.argsort(-squares_K, stable=True)
    ordered_KK = moments_KK[order_K][:, order_K]
    pad = -num_k % _BLOCK
    padded_JJ = jax.scipy.linalg.block_diag(ordered_KK, jnp.eye(pad)) if pad else ordered_KK
    # Of A = U Uᵀ with U upper triangular, A⁻¹ is the square of U⁻¹.
    upper_JJ = jnp.linalg.cholesky(padded_JJ[::-1, ::-1])[::-1, ::-1]
    factor_JJ = jax.scipy.linalg.solve_triangular(upper_JJ, jnp.eye(num_k + pad), lower=False)
    return Inputs(order_K.astype(jnp.int32), jnp.diagonal(moments_KK), factor_JJ)


def search(inputs: Inputs) -> Callable[[Any, Format], QuantisedWeights]:
    """Returns what stands in for `pallas_kernels.quantised.quantise`.

    Args:
        inputs: of the matrices that it will be given.

    Returns:
        A function of float [..., N, K], leading dims of one matrix alone, and a form of 4 bits with
        groups. The same weights and inputs give the same numbers; as in other forms, columns do
        not depend on one another. Its arrays are NumPy's.
    """

    def quantise(weights: Any, form: Format) -> QuantisedWeights:
        assert is_searched(form), form
        *lead, num_n, num_k = weights.shape
        found = _search(jnp.asarray(weights, jnp.float32).reshape(num_n, num_k), inputs, form)
        values, scales, zeros = (None if part is None else np.asarray(part) for part in found)
        assert values is not None
        assert scales is not None
        return QuantisedWeights(
            values.astype(form.dtype).reshape(*lead, num_n, num_k),
            scales.reshape(*lead, *scales.shape),
            None if zeros is None else zeros.reshape(*lead, *zeros.shape),
            form,
        )

    return quantise


@functools.partial(jax.jit, static_argnames="form")
def _search(
    weights_NK: jax.Array, inputs: Inputs, form: Format
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Returns numbers int8 [N, K], scales and zeros [N, groups]."""
    num_n, num_k = weights_NK.shape
    group = form.block_in or num_k
    least, most = (0, 15) if form.zero_points else (-8, 7)
    scales_NG, zeros_NG = _best_scales(weights_NK, inputs.squares_K, form, group)
    group_K, order_K = inputs.order_K // group, inputs.order_K

    def rows(array_KN: jax.Array, fill: float) -> jax.Array:
        """Pads the inputs to whole blocks."""
        pad = inputs.factor_JJ.shape[0] - num_k
        return jnp.pad(array_KN, ((0, pad), (0, 0)), constant_values=fill)

    left_JN = rows(weights_NK.T[order_K], 0)
    scales_JN = rows(scales_NG.astype(jnp.float32).T[group_K], 1)
    zeros_JN = rows(zeros_NG.T[group_K], 0)

    def block(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        left_JN, numbers_JN = carry
        first = index * _BLOCK

        def own(array: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(array, first, _BLOCK)

        scales_CN, zeros_CN, factor_CJ = own(scales_JN), own(zeros_JN), own(inputs.factor_JJ)
        factor_CC = jax.lax.dynamic_slice_in_dim(factor_CJ, first, _BLOCK, axis=1)

        def one(
            row: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            left_CN, numbers_CN, errors_CN = carry
            weight_N, scale_N, zero_N = left_CN[row], scales_CN[row], zeros_CN[row]
            number_N = jnp.clip(jnp.round(weight_N / scale_N) + zero_N, least, most)
            error_N = (weight_N - (number_N - zero_N) * scale_N) / factor_CC[row, row]
            left_CN -= factor_CC[row][:, None] * error_N
            return left_CN, numbers_CN.at[row].set(number_N), errors_CN.at[row].set(error_N)

        empty_CN = jnp.zeros((_BLOCK, num_n), jnp.float32)
        _, numbers_CN, errors_CN = jax.lax.fori_loop(
            0, _BLOCK, one, (own(left_JN), empty_CN, empty_CN)
        )
        later = jnp.arange(factor_CJ.shape[1]) >= first + _BLOCK
        left_JN -= jnp.einsum(
            "CJ,CN->JN",
            jnp.where(later, factor_CJ, 0),
            errors_CN,
            precision=jax.lax.Precision.HIGHEST,
        )
        return left_JN, jax.lax.dynamic_update_slice_in_dim(
            numbers_JN, numbers_CN.astype(jnp.int8), first, axis=0
        )

    _, numbers_JN = jax.lax.fori_loop(
        0, left_JN.shape[0] // _BLOCK, block, (left_JN, jnp.zeros(left_JN.shape, jnp.int8))
    )
    numbers_KN = jnp.zeros((num_k, num_n), jnp.int8).at[order_K].set(numbers_JN[:num_k])
    zeros = zeros_NG.astype(jnp.uint8) if form.zero_points else None
    return numbers_KN.T, scales_NG, zeros


def _best_scales(
    weights_NK: jax.Array, squares_K: jax.Array, form: Format, group: int
) -> tuple[jax.Array, jax.Array]:
    """Returns scales in their stored type and zeros in float32, [N, G], of the least error."""
    num_n, num_k = weights_NK.shape
    pad = -num_k % group
    blocks_NGC = jnp.pad(weights_NK, ((0, 0), (0, pad))).reshape(num_n, -1, group)
    squares_GC = jnp.pad(squares_K, (0, pad)).reshape(-1, group)
    least_NG = jnp.minimum(jnp.min(blocks_NGC, axis=-1), 0)
    most_NG = jnp.maximum(jnp.max(blocks_NGC, axis=-1), 0)
    stored = jnp.dtype(form.scale_dtype)

    def tried(span: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Scales and zeros for a part of what the weights span."""
        if form.zero_points:
            ideal_NG = (most_NG - least_NG) * jnp.abs(span) / 15
        else:  # -8 is at the end that the sign names
            ideal_NG = jnp.maximum(most_NG, -least_NG) * span / 8
        ideal_NG = jnp.where(jnp.abs(ideal_NG) < jnp.finfo(jnp.float32).tiny, 1.0, ideal_NG)
        scales_NG = ideal_NG.astype(stored).astype(jnp.float32)
        if not form.zero_points:
            return scales_NG, jnp.zeros_like(scales_NG)
        return scales_NG, jnp.clip(jnp.round(-least_NG * jnp.abs(span) / scales_NG), 0, 15)

    def try_one(
        best: tuple[jax.Array, jax.Array, jax.Array], span: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
        scales_NG, zeros_NG = tried(span)
        low, high = (0, 15) if form.zero_points else (-8, 7)
        scale, zero = scales_NG[..., None], zeros_NG[..., None]
        numbers_NGC = jnp.clip(jnp.round(blocks_NGC / scale) + zero, low, high)
        errors_NGC = jnp.square(blocks_NGC - (numbers_NGC - zero) * scale)
        error_NG = jnp.einsum("NGC,GC->NG", errors_NGC, squares_GC)
        new = (error_NG, scales_NG, zeros_NG)
        better = error_NG < best[0]
        return jax.tree.map(lambda old, found: jnp.where(better, found, old), best, new), None

    spans = np.concatenate([_SPANS, -_SPANS]) if not form.zero_points else _SPANS
    worst = jnp.full(least_NG.shape, jnp.inf)
    start = (worst, jnp.ones_like(worst), jnp.zeros_like(worst))
    (_, scales_NG, zeros_NG), _ = jax.lax.scan(try_one, start, jnp.asarray(spans))
    return scales_NG.astype(stored), zeros_NG
