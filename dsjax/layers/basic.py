"""What every layer shares, and the two plain ones: RMSNorm and the SwiGLU MLP."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.config import ModelConfig, RuntimeConfig
from dsjax.kernels import Kernels
from dsjax.mesh import ShardingRules


@dataclass(frozen=True)
class LayerOptions:
    """What all layers of a model have in common.

    Attributes:
        runtime: compute type, type of new parameters, and what is recomputed.
        init_std: standard deviation of the initial weights.
        norm_eps: epsilon of the norms on the residual stream.
        rules: where arrays live.
        kernels: which kernel implementations run.
    """

    runtime: RuntimeConfig
    init_std: float
    norm_eps: float
    rules: ShardingRules
    kernels: Kernels

    @classmethod
    def of(
        cls, config: ModelConfig, runtime: RuntimeConfig, rules: ShardingRules, kernels: Kernels
    ) -> LayerOptions:
        """Takes the shared fields out of a model's config."""
        return cls(
            runtime=runtime,
            init_std=config.init_std,
            norm_eps=config.norm_eps,
            rules=rules,
            kernels=kernels,
        )

    @property
    def dtype(self) -> jnp.dtype:
        """The compute type."""
        return jnp.dtype(self.runtime.dtype)

    @property
    def param_dtype(self) -> jnp.dtype:
        """The type of new parameters."""
        return jnp.dtype(self.runtime.param_dtype)

    def weight(self, rngs: nnx.Rngs, shape: tuple[int, ...], dims: tuple[str, ...]) -> nnx.Param:
        """Creates a normally distributed parameter with its logical dims as metadata."""
        # Drawn in float32 whatever the storage type, so that a bf16 model starts where its
        # float32 twin does.
        values = self.init_std * jax.random.normal(rngs.params(), shape, jnp.float32)
        return nnx.Param(values.astype(self.param_dtype), dims=dims)

    def read(self, weight: nnx.Param) -> jax.Array:
        """Returns a parameter made by `weight` in the compute type, its gathering begun (fsdp)."""
        array = weight[...].astype(self.dtype)
        return self.rules.gather_minor_axes(array, *weight.get_metadata("dims"))


@jax.custom_vjp
def float32_matmul(x_MD: jax.Array, w_DN: jax.Array) -> jax.Array:
    """Multiplies in x's dtype into a float32 result; the gradient's products run in x's dtype too.

    Without this the float32 cotangent would drag both products of the backward pass to float32.

    Args:
        x_MD: [..., D], compute dtype.
        w_DN: [D, N], any float dtype; its gradient is summed in that dtype.

    Returns:
        [..., N], float32.
    """
    w_DN = w_DN.astype(x_MD.dtype)
    return jnp.einsum("...D,DN->...N", x_MD, w_DN, preferred_element_type=jnp.float32)


def _float32_matmul_forward(
    x_MD: jax.Array, w_DN: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return float32_matmul(x_MD, w_DN), (x_MD, w_DN)


def _float32_matmul_backward(
    kept: tuple[jax.Array, jax.Array], dout_MN: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x_MD, w_DN = kept
    dout_MN = dout_MN.astype(x_MD.dtype)
    dx_MD = jnp.einsum("...N,DN->...D", dout_MN, w_DN.astype(x_MD.dtype))
    dw_DN = jnp.einsum("...D,...N->DN", x_MD, dout_MN, preferred_element_type=jnp.float32)
    return dx_MD, dw_DN.astype(w_DN.dtype)


float32_matmul.defvjp(_float32_matmul_forward, _float32_matmul_backward)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation, in float32."""

    def __init__(self, dim: int, options: LayerOptions, eps: float | None = None):
        self.weight = nnx.Param(jnp.ones(dim, options.param_dtype), dims=("norm",))
        self.eps = options.norm_eps if eps is None else eps
        self.options = options

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Normalises the last dim; returns the compute dtype."""
        x_BTD = x_BTD.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x_BTD), axis=-1, keepdims=True)
        x_BTD = x_BTD * jax.lax.rsqrt(mean_square + self.eps)
        return (x_BTD * self.weight[...].astype(jnp.float32)).astype(self.options.dtype)


class MLP(nnx.Module):
    """SwiGLU: a dense layer's feed-forward; of shared experts it holds the weights.

    Those are one wider MLP, which `apply_experts` runs beside the routed ones, not `__call__`.
    """

    def __init__(
        self, hidden_dim: int, intermediate_dim: int, options: LayerOptions, rngs: nnx.Rngs
    ):
        into = (hidden_dim, intermediate_dim), ("param_embed", "mlp")
        self.w_gate = options.weight(rngs, *into)
        self.w_up = options.weight(rngs, *into)
        self.w_down = options.weight(rngs, into[0][::-1], into[1][::-1])
        self.options = options

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Returns silu(x w_gate) * (x w_up) w_down, [B, T, D] in the compute dtype."""
        read, rules = self.options.read, self.options.rules
        gate_BTF = jnp.einsum("BTD,DF->BTF", x_BTD, read(self.w_gate))
        up_BTF = jnp.einsum("BTD,DF->BTF", x_BTD, read(self.w_up))
        hidden_BTF = rules.constrain(jax.nn.silu(gate_BTF) * up_BTF, "batch", "length", "mlp")
        out_BTD = jnp.einsum("BTF,FD->BTD", hidden_BTF, read(self.w_down))
        return rules.constrain(out_BTD, "batch", "length", "embed")
