"""AdamW as one pass over each parameter: clipping, moments, decay, rounding and the skip together.

Optax's chain is the same arithmetic, but it keeps float32 moments, knows no rounding, and gives an
update that must be added, cast and chosen afterwards. Here what is stored is read once and written
once: a bad step is a condition inside of the same loop, not a second one over every array.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.config import OptimizerConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Moments:
    """What the optimiser remembers.

    Attributes:
        count: int32 scalar, updates applied.
        mu: mean gradients, in `optimizer.moment_dtype`; a tree like the parameters, without those
            of `optimizer.frozen`.
        nu: mean squared gradients, likewise.
        lost: what rounding took off the parameters, in their type; None unless
            `optimizer.rounding` is "compensated".
        ema: float32 moving average of the parameters; None unless `optimizer.ema_decay` is given.
    """

    count: jax.Array
    mu: nnx.State
    nu: nnx.State
    lost: nnx.State | None
    ema: nnx.State | None = None


class _Scalars(NamedTuple):
    """What all parameters share in a step: float32 scalars, and whether it is applied, bool."""

    clip: jax.Array
    rate: jax.Array
    mu_correction: jax.Array
    nu_correction: jax.Array
    applied: jax.Array
    ema_share: jax.Array | None  # of the new parameters in their moving average


def init_moments(config: OptimizerConfig, params: nnx.State) -> Moments:
    """Returns the moments before the first step, of all parameters but frozen ones.

    Raises:
        ValueError: `optimizer.frozen` names no parameter, or all of them.
    """
    params = _without_frozen(config.frozen, params)

    def zeros() -> nnx.State:
        return jax.tree.map(lambda p: jnp.zeros(p.shape, config.moment_dtype), params)

    lost = None
    if config.rounding == "compensated":
        lost = jax.tree.map(jnp.zeros_like, params)
    ema = None
    if config.ema_decay is not None:
        ema = jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)
    return Moments(jnp.zeros((), jnp.int32), zeros(), zeros(), lost, ema)


def _without_frozen(patterns: tuple[str, ...], params: nnx.State) -> nnx.State:
    if not patterns:
        return params
    flat = {".".join(map(str, path)): (path, leaf) for path, leaf in nnx.to_flat_state(params)}
    frozen: set[str] = set()
    for pattern in patterns:
        found = fnmatch.filter(flat, pattern)
        if not found:
            some = ", ".join(sorted(flat)[-3:])
            raise ValueError(f"optimizer.frozen={pattern!r}: names no parameter; some are {some}")
        frozen.update(found)
    if len(frozen) == len(flat):
        raise ValueError(f"optimizer.frozen={patterns}: leaves no parameter to train")
    return nnx.from_flat_state([item for name, item in flat.items() if name not in frozen])


def divide(params: nnx.State, moments: Moments) -> tuple[nnx.State, nnx.State | None]:
    """Returns the parameters that are trained, which have moments, and those that are frozen."""
    trained = {path for path, _ in nnx.to_flat_state(moments.mu)}
    flat = nnx.to_flat_state(params)
    if len(trained) == len(flat):
        return params, None
    parts: tuple[list[Any], list[Any]] = ([], [])
    for path, leaf in flat:
        parts[path not in trained].append((path, leaf))
    return nnx.from_flat_state(parts[0]), nnx.from_flat_state(parts[1])


def join(trained: nnx.State, frozen: nnx.State | None) -> nnx.State:
    """Undoes `divide`."""
    return trained if frozen is None else nnx.merge_state(trained, frozen)


def global_norm(gradients: nnx.State) -> jax.Array:
    """Returns the norm of all gradients together: a float32 scalar whatever their type."""
    squares = [jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(gradients)]
    return jnp.sqrt(jnp.sum(jnp.stack(squares)))


def apply_adamw(
    config: OptimizerConfig,
    params: nnx.State,
    moments: Moments,
    gradients: nnx.State,
    norm: jax.Array,
    learning_rate: jax.Array,
    applied: jax.Array,
    step: jax.Array,
) -> tuple[nnx.State, Moments]:
    """Takes a step of AdamW (Loshchilov & Hutter, 2019) on clipped gradients, or none.

    Computes in float32 whatever is stored.

    Args:
        config: what is done, and how what is stored in bfloat16 is rounded.
        params: the parameters that have moments.
        moments: what is remembered.
        gradients: of any float type.
        norm: float32, their global norm.
        learning_rate: float32 scalar.
        applied: bool scalar; where it is False everything stays as it is, bit by bit.
        step: int32 scalar, steps taken before; stochastic rounding draws from it.

    Returns:
        The parameters and the moments after the step.
    """
    count = moments.count + applied.astype(jnp.int32)
    steps = (moments.count + 1).astype(jnp.float32)
    shared = _Scalars(
        clip=jnp.where(norm < config.clip_norm, 1.0, config.clip_norm / norm),
        rate=learning_rate,
        mu_correction=1 - config.beta1**steps,
        nu_correction=1 - config.beta2**steps,
        applied=applied,
        ema_share=None if config.ema_decay is None else _ema_share(config.ema_decay, steps),
    )
    treedef: Any
    variables, treedef = jax.tree.flatten(params, is_leaf=_is_variable)
    columns = [treedef.flatten_up_to(tree) for tree in (moments.mu, moments.nu, gradients)]
    for tree in (moments.lost, moments.ema):
        missing = [None] * len(variables)
        columns.append(missing if tree is None else treedef.flatten_up_to(tree))
    seeds = random_bits(step.astype(jnp.uint32) * jnp.uint32(0x85EBCA6B), (len(variables),))
    results = []
    rows = zip(variables, *columns, strict=True)
    for i, (variable, mu, nu, gradient, lost, ema) in enumerate(rows):
        # The norms' gains are not decayed.
        decay = 0.0 if variable.get_metadata("dims") == ("norm",) else config.weight_decay
        rest, average = (None if one is None else one.get_value() for one in (lost, ema))
        old = _Stored(variable.get_value(), mu.get_value(), nu.get_value(), rest, average)
        new = _update(config, decay, old, gradient.get_value(), shared, seeds[i])
        results.append([variable.replace(value) for value in new])
    params, mu, nu = (treedef.unflatten([row[k] for row in results]) for k in range(3))
    lost = None if moments.lost is None else treedef.unflatten([row[3] for row in results])
    ema = None if moments.ema is None else treedef.unflatten([row[4] for row in results])
    return params, Moments(count, mu, nu, lost, ema)


def _ema_share(decay: float, updates: jax.Array) -> jax.Array:
    """Returns the share of the newest parameters in their moving average, a float32 scalar.

    Early on it is larger than 1 - decay, so that the initial weights are soon forgotten; the rule
    is that of TensorFlow's ExponentialMovingAverage with `num_updates`.
    """
    return 1 - jnp.minimum(decay, (1 + updates) / (10 + updates))


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


class _Stored(NamedTuple):
    """One parameter and what is remembered of it."""

    param: jax.Array
    mu: jax.Array
    nu: jax.Array
    lost: jax.Array | None
    ema: jax.Array | None


def _update(
    config: OptimizerConfig,
    decay: float,
    old: _Stored,
    gradient: jax.Array,
    shared: _Scalars,
    seed: jax.Array,
) -> _Stored:
    """Updates one parameter. Everything here is elementwise, so that it compiles to one loop."""
    param, mu, nu = (x.astype(jnp.float32) for x in old[:3])
    gradient = gradient.astype(jnp.float32) * shared.clip
    mu = config.beta1 * mu + (1 - config.beta1) * gradient
    nu = config.beta2 * nu + (1 - config.beta2) * jnp.square(gradient)
    root = jnp.sqrt(nu / shared.nu_correction) + config.epsilon
    param -= shared.rate * (mu / shared.mu_correction / root + decay * param)
    lost = None
    if config.rounding == "stochastic":
        bits = random_bits(seed, param.shape)
        others = random_bits(~seed, param.shape)
        new_param = round_stochastically(param, bits, old.param.dtype)
        new_mu = round_stochastically(mu, bits >> 16, old.mu.dtype)
        new_nu = round_stochastically(nu, others, old.nu.dtype)
    else:
        if old.lost is not None:
            param += old.lost.astype(jnp.float32)
            lost = (param - _rounded(param, old.param.dtype)).astype(old.lost.dtype)
        new_param = _rounded(param, old.param.dtype).astype(old.param.dtype)
        new_mu, new_nu = mu.astype(old.mu.dtype), nu.astype(old.nu.dtype)
    ema = None
    if old.ema is not None and shared.ema_share is not None:
        ema = old.ema + shared.ema_share * (new_param.astype(jnp.float32) - old.ema)
    new = _Stored(new_param, new_mu, new_nu, lost, ema)
    return jax.tree.map(lambda a, b: jnp.where(shared.applied, a, b), new, old)


def _rounded(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rounds float32 to what a type can hold, in float32.

    A cast there and back is no rounding to XLA, which may leave both out.
    """
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant)


def round_stochastically(x: jax.Array, bits: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rounds up or down at random, so that the mean of many roundings is what was rounded.

    Args:
        x: float32.
        bits: uint32 of x's shape, of which the low 16 are used.
        dtype: float32, which nothing is rounded to, or bfloat16.
    """
    if dtype == jnp.float32:
        return x
    assert dtype == jnp.bfloat16
    whole = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # bfloat16 is the upper half of a float32: the draw carries into it as often as the rest says.
    carried = (whole + (bits & 0xFFFF)) & jnp.uint32(0xFFFF0000)
    drawn = jax.lax.bitcast_convert_type(carried, jnp.float32)
    return jnp.where(jnp.isfinite(x), drawn, x).astype(jnp.bfloat16)


def random_bits(seed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Hashes every place of an array: uint32, the same on any mesh, and no array of its own.

    JAX's own generators are too slow here (threefry takes as long as the rest of the update) or
    write their bits out. This is a 32-bit finaliser (C. Wellons' lowbias32) of place and seed.

    Args:
        seed: uint32 scalar.
        shape: what to draw.
    """
    place = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for dim in reversed(range(len(shape))):
        index = jax.lax.broadcasted_iota(jnp.uint32, shape, dim)
        place += index * jnp.uint32(stride & 0xFFFFFFFF)
        stride *= shape[dim]
    x = place * jnp.uint32(0x9E3779B9) + seed
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * jnp.uint32(0x735A2D97)
    return x ^ (x >> 15)
