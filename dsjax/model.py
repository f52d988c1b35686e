"""DeepSeek-V2 as one module: blocks, the scanned stacks, prefill and decode (§2)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.cache import LatentCache
from dsjax.config import ModelConfig, RuntimeConfig, TokenDropping
from dsjax.kernels import Kernels
from dsjax.layers.basic import MLP, LayerOptions, RMSNorm, float32_matmul
from dsjax.layers.expert_passes import Experts, Weights
from dsjax.layers.mla import MLA
from dsjax.layers.moe import MoE
from dsjax.layers.router import RouterStats
from dsjax.mesh import ShardingRules, check_divisible
from pallas_kernels.grouped_matmul import LayerOfStack


class Block(nnx.Module):
    """One decoder layer: attention, then a dense MLP or a mixture of experts."""

    def __init__(self, config: ModelConfig, sparse: bool, options: LayerOptions, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.hidden_dim, options)
        self.attention = MLA(config.attention, config.hidden_dim, options, rngs)
        self.feed_forward_norm = RMSNorm(config.hidden_dim, options)
        self.feed_forward: MLP | MoE
        if sparse:
            assert config.moe is not None
            self.feed_forward = MoE(config.moe, config.hidden_dim, options, rngs)
        else:
            self.feed_forward = MLP(config.hidden_dim, config.intermediate_dim, options, rngs)

    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array | None,
        dropping: TokenDropping | None,
    ) -> tuple[jax.Array, RouterStats | None]:
        """Returns the residual stream behind the layer, and its router's statistics if sparse."""
        x_BTD += self.attention(self.attention_norm(x_BTD), positions_BT, segment_ids_BT)
        mask_BT = None if segment_ids_BT is None else segment_ids_BT > 0
        return self._feed_forward(x_BTD, mask_BT, dropping)

    def prefill(
        self,
        x_BTD: jax.Array,
        num_tokens_B: jax.Array,
        cache: LatentCache,
        layer: jax.Array,
        experts: Experts | None = None,
    ) -> tuple[jax.Array, LatentCache]:
        """Runs over prompts from their first token and writes their latents to the cache."""
        positions_BT = jnp.broadcast_to(jnp.arange(x_BTD.shape[1]), x_BTD.shape[:2])
        attended = self.attention.prefill(self.attention_norm(x_BTD), positions_BT, None)
        out_BTD, latent_BTC, k_rope_BTR = attended
        cache = cache.write(layer, latent_BTC, k_rope_BTR, num_tokens_B)
        mask_BT = positions_BT < num_tokens_B[:, None]
        x_BTD, _ = self._feed_forward(x_BTD + out_BTD, mask_BT, None, experts)
        return x_BTD, cache

    def decode(
        self,
        x_BTD: jax.Array,
        cache: LatentCache,
        layer: jax.Array,
        experts: Experts | None = None,
    ) -> tuple[jax.Array, LatentCache]:
        """Runs over the next tokens of sequences whose earlier ones are in the cache."""
        positions_BT = cache.lengths_B[:, None] + jnp.arange(x_BTD.shape[1])
        normed_BTD = self.attention_norm(x_BTD)
        out_BTD, cache = self.attention.decode(normed_BTD, positions_BT, cache, layer)
        x_BTD, _ = self._feed_forward(x_BTD + out_BTD, None, None, experts)
        return x_BTD, cache

    def _feed_forward(
        self,
        x_BTD: jax.Array,
        mask_BT: jax.Array | None,
        dropping: TokenDropping | None,
        experts: Experts | None = None,
    ) -> tuple[jax.Array, RouterStats | None]:
        normed_BTD = self.feed_forward_norm(x_BTD)
        if isinstance(self.feed_forward, MLP):
            return x_BTD + self.feed_forward(normed_BTD), None
        out_BTD, stats = self.feed_forward(normed_BTD, mask_BT, dropping, experts)
        return x_BTD + out_BTD, stats


class DeepSeekV2(nnx.Module):
    """The decoder-only language model.

    Attributes:
        config: what it is.
        embed: [vocab, hidden] embedding.
        dense_layers: the first layers, stacked along a leading layer dim, or None.
        moe_layers: the layers with experts, likewise.
        norm: the final norm.
        lm_head: [hidden, vocab] output projection.
    """

    def __init__(
        self,
        config: ModelConfig,
        rngs: nnx.Rngs,
        *,
        runtime: RuntimeConfig | None = None,
        rules: ShardingRules | None = None,
        kernels: Kernels | None = None,
    ):
        options = LayerOptions.of(
            config, runtime or RuntimeConfig(), rules or ShardingRules(), kernels or Kernels()
        )
        self.embed = options.weight(
            rngs, (config.vocab_size, config.hidden_dim), ("vocab", "param_embed")
        )
        self.dense_layers = _stack(config.num_dense_layers, config, False, options, rngs)
        self.moe_layers = _stack(config.num_moe_layers, config, True, options, rngs)
        self.norm = RMSNorm(config.hidden_dim, options)
        self.lm_head = options.weight(
            rngs, (config.hidden_dim, config.vocab_size), ("param_embed", "vocab")
        )
        self.config = config
        self.options = options

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Computes the logits of the token after each token.

        Args:
            tokens_BT: int32 token ids.
            positions: int32 [B, T], counted from the start of each document; None counts the row.
            segment_ids: int32 [B, T], document of each token, 0 for padding; None for one a row.

        Returns:
            logits_BTW: float32.
        """
        hidden_BTD, _ = self.hidden(tokens_BT, positions, segment_ids)
        return self.unembed(hidden_BTD)

    def hidden(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
        dropping: TokenDropping | None = None,
    ) -> tuple[jax.Array, RouterStats | None]:
        """Computes what `unembed` takes, so that a loss need not hold all logits at once.

        Returns:
            hidden_BTD in the compute dtype, and the routers' statistics stacked over the sparse
            layers, or None where there are none.
        """
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)

        def run(x_BTD: jax.Array, block: Block) -> tuple[jax.Array, RouterStats | None]:
            return block(x_BTD, positions_BT, segment_ids_BT, dropping)

        run_block = _with_remat(run, self.options.runtime.remat)
        x_BTD = self._embed(tokens_BT)
        stats = None
        for layers in (self.dense_layers, self.moe_layers):
            if layers is not None:
                x_BTD, stats = jax.lax.scan(run_block, x_BTD, layers)
        return self.norm(x_BTD), stats

    def unembed(self, hidden_BTD: jax.Array, head: jax.Array | None = None) -> jax.Array:
        """Projects to the vocabulary.

        Args:
            hidden_BTD: what `hidden` gave.
            head: [D, W] stands in for `lm_head`, so that its gradient may have another dtype.

        Returns:
            logits_BTW: float32.
        """
        logits_BTW = float32_matmul(hidden_BTD, self.lm_head[...] if head is None else head)
        return self.options.rules.constrain(logits_BTW, "batch", "length", "vocab")

    def prefill(
        self, tokens_BT: jax.Array, num_tokens_B: jax.Array, cache: LatentCache
    ) -> tuple[jax.Array, LatentCache]:
        """Reads prompts into an empty cache, in the expanded form.

        Args:
            tokens_BT: int32 prompts, padded at the end.
            num_tokens_B: int32 tokens of each prompt.
            cache: an empty cache.

        Returns:
            logits_BW of the token after each prompt, float32, and the filled cache.
        """

        def run(
            carry: tuple[jax.Array, LatentCache], xs: tuple[Block, jax.Array]
        ) -> tuple[tuple[jax.Array, LatentCache], None]:
            block, layer = xs
            experts = self._experts_in_place(layer)
            return block.prefill(carry[0], num_tokens_B, carry[1], layer, experts), None

        x_BTD, cache = self._through_layers(run, self._embed(tokens_BT), cache)
        last_B1D = jnp.take_along_axis(x_BTD, (num_tokens_B - 1)[:, None, None], axis=1)
        return self.unembed(self.norm(last_B1D))[:, 0], cache.advance(num_tokens_B)

    def decode(self, tokens_BT: jax.Array, cache: LatentCache) -> tuple[jax.Array, LatentCache]:
        """Reads the next tokens of every sequence, in the absorbed form.

        Args:
            tokens_BT: int32, the newest tokens; T is 1 but for speculative decoding.
            cache: what came before them.

        Returns:
            logits_BTW, float32, and the longer cache.
        """

        def run(
            carry: tuple[jax.Array, LatentCache], xs: tuple[Block, jax.Array]
        ) -> tuple[tuple[jax.Array, LatentCache], None]:
            block, layer = xs
            return block.decode(*carry, layer, self._experts_in_place(layer)), None

        x_BTD, cache = self._through_layers(run, self._embed(tokens_BT), cache)
        return self.unembed(self.norm(x_BTD)), cache.advance(tokens_BT.shape[1])

    def _through_layers(
        self, run: Any, x_BTD: jax.Array, cache: LatentCache
    ) -> tuple[jax.Array, LatentCache]:
        """Carries the cache through the layers, so that it is updated in place."""
        first = 0
        for layers, count in (
            (self.dense_layers, self.config.num_dense_layers),
            (self.moe_layers, self.config.num_moe_layers),
        ):
            if layers is not None:
                numbers = jnp.arange(first, first + count, dtype=jnp.int32)
                (x_BTD, cache), _ = jax.lax.scan(run, (x_BTD, cache), (layers, numbers))
            first += count
        return x_BTD, cache

    def _experts_in_place(self, layer: jax.Array) -> Experts | None:
        """Returns a layer's experts within those of all, for kernels that read them there.

        The scan's own slice of them would be written out before every call of a TPU's kernel.
        """
        layers, dtype = self.moe_layers, self.options.dtype
        if not self.options.kernels.experts_in_place or layers is None:
            return None
        moe = layers.feed_forward
        assert isinstance(moe, MoE)
        stacks = (moe.w_gate[...], moe.w_up[...], moe.w_down[...])
        if self.options.rules.dividing_axes("expert_embed") or moe.w_gate.dtype != dtype:
            return None  # they are gathered or cast first, which is a copy anyway
        number = layer - self.config.num_dense_layers
        return Weights(*(LayerOfStack(stack, number) for stack in stacks))

    def _embed(self, tokens_BT: jax.Array) -> jax.Array:
        x_BTD = self.embed[...][tokens_BT].astype(self.options.dtype)
        return self.options.rules.constrain(x_BTD, "batch", "length", "embed")


def _stack(
    count: int, config: ModelConfig, sparse: bool, options: LayerOptions, rngs: nnx.Rngs
) -> Block | None:
    if count == 0:
        return None

    @nnx.vmap
    def create(layer_rngs: nnx.Rngs) -> Block:
        return Block(config, sparse, options, layer_rngs)

    return create(rngs.split(count))


def _with_remat(run: Any, policy: str) -> Any:
    policies = jax.checkpoint_policies
    match policy:
        case "none":
            return run
        case "full":
            return jax.checkpoint(run)
        case "save_dots":
            return jax.checkpoint(run, policy=policies.dots_with_no_batch_dims_saveable)
        case "save_attention":
            return jax.checkpoint(run, policy=policies.save_only_these_names("attention"))
    raise ValueError(f"runtime.remat={policy!r}: no such policy")


def param_dims(state: nnx.State) -> dict[tuple[Any, ...], tuple[str | None, ...]]:
    """Returns the logical dims of every parameter, by path; stacked ones begin with "layers"."""
    dims = {}
    for path, variable in nnx.to_flat_state(state):
        names = tuple(variable.get_metadata("dims"))
        dims[path] = ("layers",) * (variable.ndim - len(names)) + names
    return dims


def param_shardings(state: nnx.State, rules: ShardingRules) -> nnx.State:
    """Returns a state of NamedShardings, one per parameter, after checking that they fit.

    Args:
        state: the parameters, real or abstract.
        rules: a table with a mesh.

    Raises:
        ValueError: names every parameter dim that the mesh does not divide.
    """
    dims = param_dims(state)
    flat = dict(nnx.to_flat_state(state))
    check_divisible(
        rules, {".".join(map(str, p)): (flat[p].shape, names) for p, names in dims.items()}
    )
    return nnx.from_flat_state(
        [(p, flat[p].replace(rules.sharding(*names))) for p, names in dims.items()]
    )


def abstract_model(
    config: ModelConfig,
    runtime: RuntimeConfig | None = None,
    rules: ShardingRules | None = None,
    kernels: Kernels | None = None,
) -> tuple[nnx.GraphDef[DeepSeekV2], nnx.State]:
    """Returns a model's graph and its parameters' shapes, allocating nothing."""
    abstract = nnx.eval_shape(
        lambda: DeepSeekV2(config, nnx.Rngs(0), runtime=runtime, rules=rules, kernels=kernels)
    )
    return nnx.split(abstract)


def create_model(
    config: ModelConfig,
    seed: int,
    runtime: RuntimeConfig | None = None,
    rules: ShardingRules | None = None,
    kernels: Kernels | None = None,
) -> DeepSeekV2:
    """Creates a model with random weights, each device making its own shards."""
    return nnx.merge(
        abstract_model(config, runtime, rules, kernels)[0],
        _creator(config, runtime, rules, kernels)(jax.random.key(seed)),
    )


@functools.cache  # so that a second model of one config compiles nothing
def _creator(
    config: ModelConfig,
    runtime: RuntimeConfig | None,
    rules: ShardingRules | None,
    kernels: Kernels | None,
) -> Callable[[jax.Array], nnx.State]:
    def create(key: jax.Array) -> nnx.State:
        return nnx.state(
            DeepSeekV2(config, nnx.Rngs(key), runtime=runtime, rules=rules, kernels=kernels)
        )

    shardings = None
    if rules is not None and rules.mesh is not None:
        shardings = param_shardings(abstract_model(config, runtime, rules, kernels)[1], rules)
    return jax.jit(create, out_shardings=shardings)
