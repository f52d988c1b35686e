"""Multi-head latent attention (§2.1): one set of weights, expanded and absorbed."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.cache import LatentCache
from dsjax.config import AttentionConfig
from dsjax.layers.basic import LayerOptions, RMSNorm
from dsjax.layers.rope import apply_rope, rope_angles, softmax_scale
from pallas_kernels.mla_attention import mla_attention
from pallas_kernels.mla_decode import mla_decode

# The released code builds the latents' norms with this epsilon whatever `rms_norm_eps` says.
_LATENT_NORM_EPS = 1e-6


class MLA(nnx.Module):
    """Latent attention with DeepSeek's parameter names.

    `wkv_b` is stored as `wk_b` and `wv_b`, and each query projection as its nope and rope parts,
    so that neither form slices a weight or an activation. Where queries are not compressed
    (V2-Lite), `wq_nope` and `wq_rope` read the residual stream itself.
    """

    def __init__(
        self, config: AttentionConfig, hidden_dim: int, options: LayerOptions, rngs: nnx.Rngs
    ):
        heads, latent = config.num_heads, config.kv_lora_rank
        nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        weight = functools.partial(options.weight, rngs)
        if config.q_lora_rank is None:
            self.wq_a = self.q_norm = None
            size, dim = hidden_dim, "param_embed"
        else:
            self.wq_a = weight((hidden_dim, config.q_lora_rank), ("param_embed", "q_latent"))
            self.q_norm = RMSNorm(config.q_lora_rank, options, _LATENT_NORM_EPS)
            size, dim = config.q_lora_rank, "q_latent_in"
        self.wq_nope = weight((size, heads, nope), (dim, "heads", "head_dim"))
        self.wq_rope = weight((size, heads, rope), (dim, "heads", "head_dim"))
        self.wkv_a = weight((hidden_dim, latent + rope), ("param_embed", "kv_latent"))
        self.kv_norm = RMSNorm(latent, options, _LATENT_NORM_EPS)
        self.wk_b = weight((latent, heads, nope), ("kv_latent_in", "heads", "head_dim"))
        self.wv_b = weight((latent, heads, value), ("kv_latent_in", "heads", "head_dim"))
        self.wo = weight((heads, value, hidden_dim), ("heads", "head_dim", "param_embed"))
        self.config = config
        self.options = options

    def __call__(
        self, x_BTD: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array | None
    ) -> jax.Array:
        """Attends causally within each segment, in the expanded form (eq. 9 to 19).

        Args:
            x_BTD: normalised residual stream, compute dtype.
            positions_BT: int32, counted from the start of each document.
            segment_ids_BT: int32 document of each token, or None for one document a row.

        Returns:
            out_BTD in the compute dtype.
        """
        return self.prefill(x_BTD, positions_BT, segment_ids_BT)[0]

    def prefill(
        self, x_BTD: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Does what `__call__` does and also returns what a cache keeps of the tokens.

        Returns:
            out_BTD, latent_BTC after its norm, k_rope_BTR after rotation.
        """
        q_nope_BTHN, q_rope_BTHR = self._queries(x_BTD, positions_BT)
        latent_BTC, k_rope_BTR = self._latents(x_BTD, positions_BT)
        k_nope_BTHN = self._project("BTC,CHN->BTHN", latent_BTC, self.wk_b)
        v_BTHV = self._project("BTC,CHV->BTHV", latent_BTC, self.wv_b)
        heads = ("batch", "length", "heads", "head_dim")
        shared = ("batch", "length", "head_dim")
        ids = None if segment_ids_BT is None else ("batch", "length")
        attend = self.options.rules.shard_map(
            functools.partial(
                _attend,
                scale=softmax_scale(self.config),
                implementation=self.options.kernels.mla_attention,
            ),
            in_dims=(heads, heads, heads, shared, heads, ids),
            out_dims=heads,
        )
        out_BTHV = attend(q_nope_BTHN, q_rope_BTHR, k_nope_BTHN, k_rope_BTR, v_BTHV, segment_ids_BT)
        # Named, so that the "save_attention" remat policy keeps it.
        out_BTHV = jax.ad_checkpoint.checkpoint_name(out_BTHV, "attention")
        return self._output(out_BTHV), latent_BTC, k_rope_BTR

    def decode(
        self, x_BTD: jax.Array, positions_BT: jax.Array, cache: LatentCache, layer: jax.Array
    ) -> tuple[jax.Array, LatentCache]:
        """Attends to the cached latents in the absorbed form, which expands nothing (App. C).

        Args:
            x_BTD: normalised residual stream of the newest tokens.
            positions_BT: their positions.
            cache: latents of the tokens before them, with room for these.
            layer: int32 scalar, the layer whose part of the cache this is.

        Returns:
            out_BTD, and the cache with the new tokens' latents written.
        """
        q_nope_BTHN, q_rope_BTHR = self._queries(x_BTD, positions_BT)
        cache = cache.write(layer, *self._latents(x_BTD, positions_BT))
        q_latent_BTHC = self._project("BTHN,CHN->BTHC", q_nope_BTHN, self.wk_b)
        heads = ("batch", "length", "heads", "head_dim")
        num_tokens = x_BTD.shape[1]
        attend = self.options.rules.shard_map(
            functools.partial(
                mla_decode,
                scale=softmax_scale(self.config),
                implementation=self.options.kernels.mla_decode,
            ),
            in_dims=(heads, heads, (), ("batch", None), ("batch",)),
            out_dims=(heads, ("batch", "length", "heads")),
        )
        out_BTHC, _ = attend(
            q_latent_BTHC,
            q_rope_BTHR,
            cache.pages,
            cache.layer_table(layer),
            cache.lengths_B + num_tokens,
        )
        return self._output(self._project("BTHC,CHV->BTHV", out_BTHC, self.wv_b)), cache

    def _queries(self, x_BTD: jax.Array, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        if self.wq_a is not None and self.q_norm is not None:
            x_BTD = self.q_norm(self._project("BTD,DQ->BTQ", x_BTD, self.wq_a))
        q_nope_BTHN = self._project("BTD,DHN->BTHN", x_BTD, self.wq_nope)
        q_rope_BTHR = self._project("BTD,DHR->BTHR", x_BTD, self.wq_rope)
        return q_nope_BTHN, apply_rope(q_rope_BTHR, *rope_angles(positions_BT, self.config))

    def _latents(self, x_BTD: jax.Array, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        joint_BTC = self._project("BTD,DC->BTC", x_BTD, self.wkv_a)
        latent_BTC, k_rope_BTR = jnp.split(joint_BTC, [self.config.kv_lora_rank], axis=-1)
        k_rope_BTR = apply_rope(k_rope_BTR, *rope_angles(positions_BT, self.config))
        return self.kv_norm(latent_BTC), k_rope_BTR

    def _project(self, subscripts: str, x: jax.Array, weight: nnx.Param) -> jax.Array:
        return jnp.einsum(subscripts, x, self.options.read(weight))

    def _output(self, out_BTHV: jax.Array) -> jax.Array:
        out_BTD = self._project("BTHV,HVD->BTD", out_BTHV, self.wo)
        return self.options.rules.constrain(out_BTD, "batch", "length", "embed")


def _attend(
    q_nope_BTHN: jax.Array,
    q_rope_BTHR: jax.Array,
    k_nope_BSHN: jax.Array,
    k_rope_BSR: jax.Array,
    v_BSHV: jax.Array,
    segment_ids_BT: jax.Array | None,
    *,
    scale: float,
    implementation: str,
) -> jax.Array:
    return mla_attention(
        q_nope_BTHN,
        q_rope_BTHR,
        k_nope_BSHN,
        k_rope_BSR,
        v_BSHV,
        scale=scale,
        q_segment_ids_BT=segment_ids_BT,
        kv_segment_ids_BS=segment_ids_BT,
        implementation=implementation,
    )
