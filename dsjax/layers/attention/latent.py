"""Multi-head latent attention as a layer: projections, and the two forms of attending (§2.1)."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.cache import LatentPool, Part, View
from dsjax.config import AttentionConfig
from dsjax.kernels import MAX_DECODE_TOKENS
from dsjax.layers.attention.context import Row, Settings, attend_over_row, merge
from dsjax.layers.attention.divided import attend_to_own_tokens
from dsjax.layers.linear import Linear
from dsjax.layers.norm import RMSNorm
from dsjax.layers.options import LayerOptions
from dsjax.layers.rope import apply_rope, rope_angles, softmax_scale
from pallas_kernels.mla_attention import mla_attention, mla_attention_with_lse
from pallas_kernels.mla_decode import LatentPages, mla_decode
from pallas_kernels.mla_decode import supported as mla_decode_supported

# The released code builds the latents' norms with this epsilon whatever `rms_norm_eps` says.
_LATENT_NORM_EPS = 1e-6

# Bytes at whose multiples Mosaic's GPU kernels want their operands to begin.
_KERNEL_ALIGNMENT = 256

_HEADS = ("batch", "length", "heads", "head_dim")


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

        def linear(shape: tuple[int, ...], *dims: str, num_contracted: int = 1) -> Linear:
            return Linear(shape, dims, options, rngs, num_contracted=num_contracted)

        if config.q_lora_rank is None:
            self.wq_a = self.q_norm = None
            size, dim = hidden_dim, "param_embed"
        else:
            self.wq_a = linear((hidden_dim, config.q_lora_rank), "param_embed", "q_latent")
            self.q_norm = RMSNorm(config.q_lora_rank, options, _LATENT_NORM_EPS)
            size, dim = config.q_lora_rank, "q_latent_in"
        self.wq_nope = linear((size, heads, nope), dim, "heads", "head_dim")
        self.wq_rope = linear((size, heads, rope), dim, "heads", "head_dim")
        self.wkv_a = linear((hidden_dim, latent + rope), "param_embed", "kv_latent")
        self.kv_norm = RMSNorm(latent, options, _LATENT_NORM_EPS)
        self.wk_b = linear((latent, heads, nope), "kv_latent_in", "heads", "head_dim")
        self.wv_b = linear((latent, heads, value), "kv_latent_in", "heads", "head_dim")
        self.wo = linear(
            (heads, value, hidden_dim), "heads", "head_dim", "param_embed", num_contracted=2
        )
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
        q_nope_BTHN, q_rope_BTHR = self._queries(x_BTD, positions_BT)
        latent_BTC, k_rope_BTR = self._latents(x_BTD, positions_BT)
        if self.options.rules.dividing_axes("length"):
            tokens = _Tokens(q_nope_BTHN, q_rope_BTHR, latent_BTC, k_rope_BTR)
            return self._output(self._over_row(tokens, segment_ids_BT))
        k_nope_BTHN, v_BTHV = self._expand(latent_BTC)
        ids = None if segment_ids_BT is None else ("batch", "length")

        def attend(
            q_nope_BTHN: jax.Array,
            q_rope_BTHR: jax.Array,
            k_nope_BTHN: jax.Array,
            k_rope_BTR: jax.Array,
            v_BTHV: jax.Array,
            segment_ids_BT: jax.Array | None,
        ) -> jax.Array:
            return mla_attention(
                q_nope_BTHN,
                q_rope_BTHR,
                k_nope_BTHN,
                k_rope_BTR,
                v_BTHV,
                scale=softmax_scale(self.config),
                q_segment_ids_BT=segment_ids_BT,
                kv_segment_ids_BS=segment_ids_BT,
                implementation=self.options.kernels.mla_attention,
            )

        shared = ("batch", "length", "head_dim")
        run = self.options.rules.shard_map(
            attend, in_dims=(_HEADS, _HEADS, _HEADS, shared, _HEADS, ids), out_dims=_HEADS
        )
        out_BTHV = run(q_nope_BTHN, q_rope_BTHR, k_nope_BTHN, k_rope_BTR, v_BTHV, segment_ids_BT)
        return self._output(out_BTHV)

    def _over_row(self, tokens: _Tokens, segment_ids_BT: jax.Array | None) -> jax.Array:
        """Attends where devices divide the row; its tokens are in striped order."""
        rules, kernels = self.options.rules, self.options.kernels
        (axis,) = rules.dividing_axes("length")
        gathered = rules.dividing_axes("kv_latent_in")
        settings = Settings(
            axis, kernels.latent_exchange, softmax_scale(self.config), kernels.mla_attention
        )

        def attend(row: Row, segment_ids_BT: jax.Array | None) -> jax.Array:
            wk_b, wv_b = row.wk_b, row.wv_b
            for minor in reversed(gathered):  # one axis after another, as `gather_minor_axes` says
                wk_b, wv_b = (
                    jax.lax.all_gather(w, minor, axis=0, tiled=True) for w in (wk_b, wv_b)
                )
            return attend_over_row(settings, row._replace(wk_b=wk_b, wv_b=wv_b), segment_ids_BT)

        heads: Any = _HEADS
        shared: Any = ("batch", "length", "head_dim")
        weights: Any = self.wk_b.dims
        ids = None if segment_ids_BT is None else ("batch", "length")
        row_dims = Row(heads, heads, shared, shared, weights, weights)
        run = rules.shard_map(attend, in_dims=(row_dims, ids), out_dims=heads)
        wk_b, wv_b = self.wk_b.divided(), self.wv_b.divided()
        assert isinstance(wk_b, jax.Array)  # quantised weights have no gradient
        assert isinstance(wv_b, jax.Array)
        return run(Row(*tokens, wk_b, wv_b), segment_ids_BT)

    def extend(
        self, x_BTD: jax.Array, pool: LatentPool, view: View, layer: jax.Array
    ) -> tuple[jax.Array, LatentPool]:
        """Attends from new tokens to themselves and to what the pool holds of their sequences.

        Args:
            x_BTD: normalised residual stream of the view's rows of tokens.
            pool: the latents so far.
            view: the rows' parts, and where their sequences lie in the pool.
            layer: int32 scalar, the layer whose part of the pool this is.

        Returns:
            out_BTD, and the pool with the new tokens' latents written.
        """
        positions_BT = view.positions()
        num_rows = view.num_rows
        row = (*self._queries(x_BTD, positions_BT), *self._latents(x_BTD, positions_BT))
        outs = []
        for part, first in view.places():
            tokens = _Tokens(*(_cut(array, part, first) for array in row))
            latent_BTC, k_rope_BTR = tokens.latent_BTC, tokens.k_rope_BTR
            pool = pool.write(layer, part, latent_BTC, k_rope_BTR, self.options.rules)
            attend = self._absorbed if self._prefers_absorbed(part, pool) else self._expanded
            out_BTHV = attend(tokens, pool, part, layer)
            outs.append(out_BTHV.reshape(num_rows, -1, *out_BTHV.shape[2:]))
        out_BTHV = outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=1)
        return self._output(out_BTHV), pool

    def _prefers_absorbed(self, part: Part, pool: LatentPool) -> bool:
        """Chooses the form that costs less, from sizes that are known while tracing."""
        config = self.config
        # Of what comes first no cached key has to be expanded.
        if part.is_first or not costs_less_absorbed(config, part.num_tokens):
            return False
        if self.options.rules.dividing_axes("page_tokens"):
            return part.num_tokens <= MAX_DECODE_TOKENS  # pages are read once for each token
        refused = mla_decode_supported(
            self.options.kernels.mla_decode,
            kv_rank=config.kv_lora_rank,
            rope_dim=pool.pages.rope.shape[-1],
            num_heads=config.num_heads,
            num_tokens=part.num_tokens,
            page_size=pool.page_size,
            table_pages=part.page_table_BP.shape[1],
            dtype=self.options.dtype,
            pages_dtype=pool.pages.latent.dtype,
            rope_dtype=pool.pages.rope.dtype,
        )
        return refused is None or part.num_tokens <= MAX_DECODE_TOKENS

    def _absorbed(
        self, tokens: _Tokens, pool: LatentPool, part: Part, layer: jax.Array
    ) -> jax.Array:
        """Attends in the latent space, which expands nothing (App. C)."""
        # Without T (M counts all tokens): with it XLA's GPU compiler writes the result transposed.
        q_nope_MHN = jax.lax.collapse(tokens.q_nope_BTHN, 0, 2)
        q_latent_MHC = self.wk_b("MHN,CHN->MHC", q_nope_MHN)
        q_latent_BTHC = q_latent_MHC.reshape(*tokens.q_nope_BTHN.shape[:3], -1)
        rules = self.options.rules
        axes = rules.dividing_axes("page_tokens")

        def attend(
            q_latent_BTHC: jax.Array,
            q_rope_BTHR: jax.Array,
            pages: LatentPages,
            table_BP: jax.Array,
            lengths_B: jax.Array,
        ) -> tuple[jax.Array, jax.Array]:
            return mla_decode(
                q_latent_BTHC,
                q_rope_BTHR,
                pages,
                table_BP,
                lengths_B,
                scale=softmax_scale(self.config),
                implementation=self.options.kernels.mla_decode,
            )

        run = rules.shard_map(
            functools.partial(attend_to_own_tokens, attend, axes),
            in_dims=(_HEADS, _HEADS, pool.dims(rules), ("batch", None), ("batch",)),
            out_dims=_HEADS,
        )
        table_BP = pool.layer_table(layer, part.page_table_BP)
        lengths_B = part.lengths_B + part.num_tokens
        out_BTHC = run(q_latent_BTHC, tokens.q_rope_BTHR, pool.pages, table_BP, lengths_B)
        return self.wv_b("BTHC,CHV->BTHV", out_BTHC)

    def _expanded(
        self, tokens: _Tokens, pool: LatentPool, part: Part, layer: jax.Array
    ) -> jax.Array:
        """Attends to the new tokens, then to blocks of the cached ones, each expanded in turn."""
        latent_BTC = pool.as_cached(tokens.latent_BTC)
        out_BTHV, lse_BHT = self._attend_expanded(
            tokens, latent_BTC, tokens.k_rope_BTR, visible_BS=None
        )
        if part.is_first:
            return out_BTHV
        # Each block costs a merge of all queries and a turn of a loop, 0.15 ms on an H200, where
        # the host waits for each: as many keys as queries, and many where sequences are few.
        least = self.options.kernels.expanded_keys
        keys = max(least, part.num_tokens, 4 * least // part.num_sequences)
        table_BP = part.page_table_BP
        pages = min(max(1, min(keys, 8 * least) // pool.page_size), table_BP.shape[1])
        table_BP = jnp.pad(table_BP, ((0, 0), (0, -table_BP.shape[1] % pages)))
        keys = pages * pool.page_size

        def add_block(
            index: jax.Array, sums: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array]:
            block_BP = jax.lax.dynamic_slice_in_dim(table_BP, index * pages, pages, axis=1)
            rope_dim, rules = self.config.qk_rope_head_dim, self.options.rules
            latent_BSC, k_rope_BSR = pool.read(layer, block_BP, rope_dim, rules)
            visible_BS = index * keys + jnp.arange(keys) < part.lengths_B[:, None]
            block = self._attend_expanded(tokens, latent_BSC, k_rope_BSR, visible_BS)
            return merge(sums, block)

        # As many blocks as the longest sequence has, not as many as there is room for.
        num_blocks = (jnp.max(part.lengths_B) + keys - 1) // keys
        sums = (out_BTHV.astype(jnp.float32), lse_BHT)
        sums = jax.lax.fori_loop(0, num_blocks, add_block, sums)
        return sums[0].astype(out_BTHV.dtype)

    def _attend_expanded(
        self,
        tokens: _Tokens,
        latent_BSC: jax.Array,
        k_rope_BSR: jax.Array,
        visible_BS: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns out_BTHV and lse_BHT over the visible keys, or causally where that is None."""
        causal = visible_BS is None
        k_nope_BSHN, v_BSHV = self._expand(latent_BSC)

        def attend(
            q_nope_BTHN: jax.Array,
            q_rope_BTHR: jax.Array,
            k_nope_BSHN: jax.Array,
            k_rope_BSR: jax.Array,
            v_BSHV: jax.Array,
            visible_BS: jax.Array | None,
        ) -> tuple[jax.Array, jax.Array]:
            return mla_attention_with_lse(
                q_nope_BTHN,
                q_rope_BTHR,
                k_nope_BSHN,
                k_rope_BSR,
                v_BSHV,
                scale=softmax_scale(self.config),
                causal=causal,
                # Queries are of document 1, visible keys too, others of document 0.
                q_segment_ids_BT=None if causal else jnp.ones(q_nope_BTHN.shape[:2], jnp.int32),
                kv_segment_ids_BS=None if visible_BS is None else visible_BS.astype(jnp.int32),
                implementation=self.options.kernels.mla_attention,
            )

        shared, ids = ("batch", "length", "head_dim"), None if causal else ("batch", "length")
        run = self.options.rules.shard_map(
            attend,
            in_dims=(_HEADS, _HEADS, _HEADS, shared, _HEADS, ids),
            out_dims=(_HEADS, ("batch", "heads", "length")),
        )
        return run(
            tokens.q_nope_BTHN, tokens.q_rope_BTHR, k_nope_BSHN, k_rope_BSR, v_BSHV, visible_BS
        )

    def _expand(self, latent_BTC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns every head's keys without position, and its values."""
        return self.wk_b("BTC,CHN->BTHN", latent_BTC), self.wv_b("BTC,CHV->BTHV", latent_BTC)

    def _queries(self, x_BTD: jax.Array, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        # `Q` stands for D as well: of V2-Lite, the queries' input is the residual stream itself.
        q_BTQ = x_BTD
        if self.wq_a is not None and self.q_norm is not None:
            q_BTQ = self.q_norm(self.wq_a("BTD,DQ->BTQ", x_BTD))
        q_nope_BTHN = self.wq_nope("BTQ,QHN->BTHN", q_BTQ)
        q_rope_BTHR = self.wq_rope("BTQ,QHR->BTHR", q_BTQ)
        return q_nope_BTHN, apply_rope(q_rope_BTHR, *rope_angles(positions_BT, self.config))

    def _latents(self, x_BTD: jax.Array, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        joint_BTC = self.wkv_a("BTD,DC->BTC", x_BTD)
        latent_BTC, k_rope_BTR = jnp.split(joint_BTC, [self.config.kv_lora_rank], axis=-1)
        k_rope_BTR = apply_rope(k_rope_BTR, *rope_angles(positions_BT, self.config))
        return self.kv_norm(latent_BTC), k_rope_BTR

    def _output(self, out_BTHV: jax.Array) -> jax.Array:
        out_BTD = self.wo("BTHV,HVD->BTD", out_BTHV)
        return self.options.rules.constrain(out_BTD, "batch", "length", "embed")


class _Tokens(NamedTuple):
    """What attention needs of a part's new tokens, [B, T, ...] each."""

    q_nope_BTHN: jax.Array
    q_rope_BTHR: jax.Array
    latent_BTC: jax.Array
    k_rope_BTR: jax.Array


def costs_less_absorbed(config: AttentionConfig, num_tokens: int) -> bool:
    """Says whether so few tokens of a sequence had better attend in the latent space.

    Absorbed, a query multiplies 2 C + R numbers with each key; expanded, N + R + V, but every
    cached key is expanded first, which is C (N + V) for all queries together. So the costs cross at
    C (N + V) / (2 C - N - V) tokens: 171 for DeepSeek-V2.
    """
    expanded = config.qk_nope_head_dim + config.v_head_dim
    absorbed = 2 * config.kv_lora_rank
    return num_tokens * (absorbed - expanded) < config.kv_lora_rank * expanded


def _cut(row_BTX: jax.Array, part: Part, first: int) -> jax.Array:
    """Cuts a part out of each row of tokens and puts its sequences one under the other."""
    tokens_BTX = row_BTX[:, first : first + part.total_tokens // row_BTX.shape[0]]
    offset = first * math.prod(row_BTX.shape[2:]) * row_BTX.dtype.itemsize
    if offset % _KERNEL_ALIGNMENT:
        # XLA would hand a kernel the part where it lies in the row.
        tokens_BTX = jax.lax.optimization_barrier(tokens_BTX)
    return tokens_BTX.reshape(part.num_sequences, part.num_tokens, *row_BTX.shape[2:])
