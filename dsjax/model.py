"""DeepSeek-V2 as one module: blocks, the scanned stacks, forward and extend (§2)."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsjax.cache import LatentPool, View
from dsjax.config import ModelConfig, QuantisationConfig, RuntimeConfig
from dsjax.kernels import MAX_DECODE_TOKENS, Kernels
from dsjax.layers.attention import MLA
from dsjax.layers.head import Embedding, Head
from dsjax.layers.linear import Linear
from dsjax.layers.mlp import MLP
from dsjax.layers.moe import Dropping, ExpertWeights, MoE, RouterStats
from dsjax.layers.norm import RMSNorm
from dsjax.layers.options import LayerOptions
from dsjax.layers.remat import with_remat
from dsjax.mesh import ShardingRules, check_divisible, from_stripes, to_stripes
from dsjax.quantise import choose_formats, format_of


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
        dropping: Dropping | None,
    ) -> tuple[jax.Array, RouterStats | None]:
        """Returns the residual stream after the layer, and its router's statistics if sparse."""
        with jax.named_scope("attention"):
            normed_BTD = self.attention_norm(x_BTD)
            x_BTD += self.attention(normed_BTD, positions_BT, segment_ids_BT)
        mask_BT = None if segment_ids_BT is None else segment_ids_BT > 0
        return self._feed_forward(x_BTD, mask_BT, dropping, None)

    def extend(
        self,
        x_BTD: jax.Array,
        pool: LatentPool,
        view: View,
        layer: jax.Array,
        experts: ExpertWeights | None,
    ) -> tuple[jax.Array, LatentPool]:
        """Runs over a row of new tokens; see `DeepSeekV2.extend`.

        Args:
            x_BTD: residual stream of the view's rows.
            pool: the latents so far.
            view: the rows' parts.
            layer: int32 scalar, this layer's number.
            experts: this layer's, where they lie in those of all layers; None for its own.
        """
        with jax.named_scope("attention"):
            out_BTD, pool = self.attention.extend(self.attention_norm(x_BTD), pool, view, layer)
        x_BTD, _ = self._feed_forward(x_BTD + out_BTD, view.mask(), None, experts)
        return x_BTD, pool

    def _feed_forward(
        self,
        x_BTD: jax.Array,
        mask_BT: jax.Array | None,
        dropping: Dropping | None,
        experts: ExpertWeights | None,
    ) -> tuple[jax.Array, RouterStats | None]:
        normed_BTD = self.feed_forward_norm(x_BTD)
        if isinstance(self.feed_forward, MLP):
            with jax.named_scope("mlp"):
                return x_BTD + self.feed_forward(normed_BTD), None
        out_BTD, stats = self.feed_forward(normed_BTD, mask_BT, dropping, experts)
        return x_BTD + out_BTD, stats


class DeepSeekV2(nnx.Module):
    """The decoder-only language model.

    Attributes:
        config: what it is.
        embed: the embedding.
        dense_layers: the first layers, stacked along a leading layer dim, or None.
        moe_layers: the layers with experts, likewise.
        norm: the final norm.
        lm_head: the output projection.
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
        self.embed = Embedding(config.vocab_size, config.hidden_dim, options, rngs)
        self.dense_layers = _stack(config.num_dense_layers, config, False, options, rngs)
        self.moe_layers = _stack(config.num_moe_layers, config, True, options, rngs)
        self.norm = RMSNorm(config.hidden_dim, options)
        self.lm_head = Head(config.hidden_dim, config.vocab_size, options, rngs)
        self.config = config
        self.options = options
        if options.runtime.quantisation is not None:
            self._quantise(options.runtime.quantisation)

    def _quantise(self, recipe: QuantisationConfig) -> None:
        """Stores matrices in fewer bits.

        Raises:
            ValueError: a rule of the recipe fits no matrix, a form or a mesh does not fit one.
        """
        matrices = dict(self.matrices())
        rules = self.options.rules
        gathered = [dim for dim in ("param_embed", "expert_embed") if rules.dividing_axes(dim)]
        if gathered:
            raise ValueError(
                f"quantisation: weights divided along {gathered[0]} would be gathered for each use;"
                " quantised ones are for generation, with inference_rules"
            )
        for name, form in choose_formats(recipe, list(matrices)).items():
            stored = format_of(form)
            assert stored is not None
            try:
                matrices[name].quantise(stored)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None

    def matrices(self) -> Iterator[tuple[str, Linear]]:
        """Yields every matrix with its name, such as "moe_layers.attention.wo"; norms are none."""
        for path, module in nnx.iter_modules(self):
            if isinstance(module, Linear):
                yield ".".join(map(str, path)), module

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
        stripes = self.options.rules.num_shards("length")
        rows = (tokens_BT, positions, segment_ids)
        striped: Any = [None if row is None else to_stripes(row, stripes) for row in rows]
        hidden_BTD, _ = self.hidden(*striped)
        return from_stripes(self.lm_head.logits(hidden_BTD), stripes)

    def hidden(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
        dropping: Dropping | None = None,
    ) -> tuple[jax.Array, RouterStats | None]:
        """Computes what `lm_head.logits` takes, so that a loss need not hold all logits at once.

        Where devices divide the rows, their tokens are in striped order (`dsjax.mesh.stripes`).

        Returns:
            hidden_BTD in the compute dtype, and the routers' statistics stacked over the sparse
            layers, or None where there are none.
        """
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
            positions_BT = to_stripes(positions_BT, self.options.rules.num_shards("length"))

        def run(x_BTD: jax.Array, block: Block) -> tuple[jax.Array, RouterStats | None]:
            return block(x_BTD, positions_BT, segment_ids_BT, dropping)

        run_block = with_remat(run, self.options.runtime.remat)
        with jax.named_scope("embed"):
            x_BTD, stats = self.embed.rows(tokens_BT), None
        for stack in self.stacks():
            unroll = self.options.kernels.unroll_layers
            x_BTD, stats = jax.lax.scan(run_block, x_BTD, stack.layers, unroll=unroll)
        return self.norm(x_BTD), stats

    def extend(
        self, tokens_T: jax.Array, pool: LatentPool, view: View, wanted_M: jax.Array
    ) -> tuple[jax.Array, LatentPool]:
        """Reads the next tokens of many sequences, each after what the pool holds of it.

        One row holds them all: sequences that decode with one to a few tokens each, and chunks of
        prompts. Projections and experts see the row's T tokens, attention alone sees its parts.
        Where devices divide the pool's pages, the view has a row for each of them, and T counts the
        tokens of all.

        Args:
            tokens_T: int32, the row, or one after the other; padding may hold any token.
            pool: the latents so far; donate it, and it is updated in place.
            view: the row's parts, and where their sequences lie in the pool.
            wanted_M: int32, places of the row whose logits are wanted.

        Returns:
            logits_MW of the token after each place wanted, float32, and the pool with the row's
            tokens. The view is still the one given: `Part.advanced` moves it on.
        """
        hidden_TD, pool = self.extend_hidden(tokens_T, pool, view)
        with jax.named_scope("head"):
            return self.lm_head.logits(self.norm(hidden_TD[None, wanted_M]))[0], pool

    def extend_hidden(
        self, tokens_T: jax.Array, pool: LatentPool, view: View
    ) -> tuple[jax.Array, LatentPool]:
        """Does the same without the final norm and the head, which few tokens may need.

        Returns:
            hidden_TD in the compute dtype, of every token of the row, and the pool.
        """

        def run(
            carry: tuple[jax.Array, LatentPool], xs: tuple[Block, jax.Array]
        ) -> tuple[tuple[jax.Array, LatentPool], None]:
            # The pool is carried through the layers, so that it is updated in place.
            block, layer = xs
            experts = self._experts_in_place(layer)
            return block.extend(carry[0], carry[1], view, layer, experts), None

        # A prompt's chunk takes so long that the copies which a loop makes do not matter.
        decodes = all(part.num_tokens <= MAX_DECODE_TOKENS for part in view.parts)
        unrolled = decodes and self.options.kernels.unroll_decode
        with jax.named_scope("embed"):
            carry = self.embed.rows(tokens_T.reshape(view.num_rows, -1)), pool
        for stack in self.stacks():
            if unrolled:
                carry = _run_each(run, carry, stack)
            else:
                numbers = stack.first + jnp.arange(stack.num_layers, dtype=jnp.int32)
                carry, _ = jax.lax.scan(run, carry, (stack.layers, numbers))
        x_BTD, pool = carry
        return x_BTD.reshape(tokens_T.size, -1), pool

    def stacks(self) -> list[Stack]:
        """Returns the model's layers as stacks of equal ones, from the first to the last."""
        dense, sparse = self.config.num_dense_layers, self.config.num_moe_layers
        stacks = ((0, dense, self.dense_layers), (dense, sparse, self.moe_layers))
        return [
            Stack(first, count, layers) for first, count, layers in stacks if layers is not None
        ]

    def _experts_in_place(self, layer: jax.Array) -> ExpertWeights | None:
        """Returns a layer's experts within those of all, for kernels that read them there.

        The scan's own slice of them would be written out before every call of a TPU's kernel.
        """
        layers, rules = self.moe_layers, self.options.rules
        if not self.options.kernels.experts_in_place or layers is None:
            return None
        moe = layers.feed_forward
        assert isinstance(moe, MoE)
        if rules.dividing_axes("expert_embed") or not moe.w_gate.is_ready:
            return None  # they are gathered or cast first, which is a copy anyway
        return moe.stacked_weights(layer - self.config.num_dense_layers)


def _run_each(run: Any, carry: Any, stack: Stack) -> Any:
    """Does what `scan` does, in a program that has every layer by itself."""
    graphdef, state = nnx.split(stack.layers)

    @jax.jit  # traced once for all layers
    def run_layer(carry: Any, state: nnx.State, number: jax.Array) -> Any:
        return run(carry, (nnx.merge(graphdef, state), number))[0]

    for index in range(stack.num_layers):
        state_now = jax.tree.map(operator.itemgetter(index), state)
        # NumPy's, so that it is a constant of the program and takes no kernel.
        carry = run_layer(carry, state_now, np.int32(stack.first + index))
    return carry


class Stack(NamedTuple):
    """Layers of one kind, stacked along a leading dim of their parameters.

    Attributes:
        first: number of the first of them among all layers of the model.
        num_layers: how many there are.
        layers: their modules as one.
    """

    first: int
    num_layers: int
    layers: Block


def _stack(
    count: int, config: ModelConfig, sparse: bool, options: LayerOptions, rngs: nnx.Rngs
) -> Block | None:
    if count == 0:
        return None

    @nnx.vmap
    def create(layer_rngs: nnx.Rngs) -> Block:
        return Block(config, sparse, options, layer_rngs)

    return create(rngs.split(count))


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
