"""How tokens reach the devices of their experts, and come back.

Three objects with one meaning, used inside a `shard_map`: `OneDevice` has all experts,
`EverywhereAlready` has some of the experts and all tokens, as in generation, and `Exchange` sends
tokens between devices that have different ones, as in training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from dsjax.config import MoEConfig
from dsjax.kernels import Kernels
from dsjax.layers.moe.experts import PassSize
from pallas_kernels.expert_exchange import (
    ExchangePlan,
    plan_exchange,
    return_tokens,
    send_choices,
    send_tokens,
)


class Sent(NamedTuple):
    """Tokens that are where their experts are.

    Attributes:
        x_RD: the tokens, compute dtype.
        experts_RK: int32 experts of this device; their number for one that is elsewhere.
        gates_RK: float32.
        num_tokens: how many of the R tokens are real; they come first.
        size: room of a pass over the experts.
        plan: of the exchange that brought them, or None.
    """

    x_RD: jax.Array
    experts_RK: jax.Array
    gates_RK: jax.Array
    num_tokens: jax.Array | int
    size: PassSize
    plan: ExchangePlan | None = None


class Dispatch(Protocol):
    """How tokens reach experts.

    Attributes:
        sum_axes: mesh axes over which every device has a part of each token's sum.
        waits: whether `send` and `combine` take time that the shared experts can fill.
        num_chunks: parts of a device's tokens that are brought one by one, so that one is computed
            while the next is under way.
    """

    @property
    def sum_axes(self) -> tuple[str, ...]: ...

    @property
    def waits(self) -> bool: ...

    @property
    def num_chunks(self) -> int: ...

    def send(self, x_ND: jax.Array, gates_NK: jax.Array, indices_NK: jax.Array) -> Sent:
        """Brings tokens to the devices of their experts.

        Args:
            x_ND: this device's tokens, compute dtype.
            gates_NK: float32.
            indices_NK: int32 experts, counted over all devices; their number for none.
        """
        ...

    def combine(self, out_RD: jax.Array, sent: Sent) -> jax.Array:
        """Brings the experts' results back; returns out_ND, summed but for `sum_axes`."""
        ...

    def own(self, shared_ND: jax.Array) -> jax.Array:
        """Returns what this device adds to its tokens' sums of the shared experts' results."""
        ...


@dataclass(frozen=True)
class OneDevice:
    """All experts and all tokens are here."""

    sum_axes: tuple[str, ...] = ()
    waits: bool = False
    num_chunks: int = 1

    def send(self, x_ND: jax.Array, gates_NK: jax.Array, indices_NK: jax.Array) -> Sent:
        """Returns the tokens as they are."""
        num_tokens, top_k = indices_NK.shape
        size = PassSize(num_tokens, num_tokens * top_k)
        return Sent(x_ND, indices_NK, gates_NK, num_tokens, size)

    def combine(self, out_RD: jax.Array, sent: Sent) -> jax.Array:
        """Returns the results as they are."""
        return out_RD

    def own(self, shared_ND: jax.Array) -> jax.Array:
        """Returns all of it."""
        return shared_ND


@dataclass(frozen=True)
class EverywhereAlready:
    """Every device has all tokens and some of the experts: what decoding does."""

    config: MoEConfig
    kernels: Kernels
    num_shards: int
    sum_axes: tuple[str, ...] = ("expert",)
    waits: bool = False
    num_chunks: int = 1

    def send(self, x_ND: jax.Array, gates_NK: jax.Array, indices_NK: jax.Array) -> Sent:
        """Leaves out the experts of other devices."""
        num_tokens, top_k = indices_NK.shape
        num_local = self.config.num_experts // self.num_shards
        indices_NK = indices_NK - jax.lax.axis_index("expert") * num_local
        here_NK = (indices_NK >= 0) & (indices_NK < num_local)
        indices_NK = jnp.where(here_NK, indices_NK, num_local)
        gates_NK = jnp.where(here_NK, gates_NK, 0)
        rows = _with_room(num_tokens * top_k / self.num_shards, self.kernels)
        return Sent(x_ND, indices_NK, gates_NK, num_tokens, PassSize(num_tokens, rows))

    def combine(self, out_RD: jax.Array, sent: Sent) -> jax.Array:
        """Returns this device's part of the sum."""
        return out_RD

    def own(self, shared_ND: jax.Array) -> jax.Array:
        """Returns all of it on the first device: every device has it, one may add it."""
        return jnp.where(jax.lax.axis_index("expert") == 0, shared_ND, 0)


@dataclass(frozen=True)
class Exchange:
    """Devices have different tokens and different experts: tokens are sent, once to each device."""

    config: MoEConfig
    kernels: Kernels
    num_shards: int
    sum_axes: tuple[str, ...] = ()
    waits: bool = True

    @property
    def num_chunks(self) -> int:
        """Parts of a device's tokens that are sent one by one."""
        return self.kernels.exchange_chunks

    def send(self, x_ND: jax.Array, gates_NK: jax.Array, indices_NK: jax.Array) -> Sent:
        """Sends each token to every device that has any of its experts."""
        config, num_shards = self.config, self.num_shards
        plan = plan_exchange(
            indices_NK,
            num_experts=config.num_experts,
            max_shards=max_shards(config, num_shards),
            axis_name="expert",
            transport=self.kernels.expert_exchange,
        )
        rows_RD = send_tokens(x_ND, plan)
        experts_RK, gates_RK = send_choices(indices_NK, gates_NK, plan)
        num_tokens, top_k = indices_NK.shape
        size = PassSize(
            tokens=_with_room(num_tokens * _mean_shards(config, num_shards), self.kernels),
            rows=_with_room(num_tokens * top_k, self.kernels),
        )
        return Sent(rows_RD, experts_RK, gates_RK, plan.num_received, size, plan)

    def combine(self, out_RD: jax.Array, sent: Sent) -> jax.Array:
        """Sends results back, and sums each token's."""
        assert sent.plan is not None
        return return_tokens(out_RD, sent.plan)

    def own(self, shared_ND: jax.Array) -> jax.Array:
        """Returns all of it; the barrier keeps the product out of the sum of what returns."""
        return jax.lax.optimization_barrier(shared_ND)


def choose_dispatch(
    config: MoEConfig, kernels: Kernels, *, num_shards: int, tokens_divided: bool
) -> Dispatch:
    """Chooses how tokens reach experts.

    Args:
        config: how tokens are routed, which bounds the devices a token goes to.
        kernels: how they are sent, and how much room there is.
        num_shards: devices that divide the experts.
        tokens_divided: whether those devices have different tokens.
    """
    if num_shards == 1:
        return OneDevice()
    if tokens_divided:
        return Exchange(config, kernels, num_shards)
    return EverywhereAlready(config, kernels, num_shards)


def max_shards(config: MoEConfig, num_shards: int) -> int:
    """Returns how many devices of the expert axis a token may go to.

    A group of experts (§2.2.2) lies on one device where the axis has at most as many devices as
    there are groups and divides them, so that this is the paper's M; else it spans several.
    """
    reachable = min(config.top_k, num_shards)
    if config.routing != "group_limited_greedy":
        return reachable
    return min(reachable, config.top_groups * _shards_of_a_group(config, num_shards))


def _shards_of_a_group(config: MoEConfig, num_shards: int) -> int:
    """Devices that a group of experts may span."""
    per_group = config.num_experts // config.num_groups
    per_shard = config.num_experts // num_shards
    return max(
        (first + per_group - 1) // per_shard - first // per_shard + 1
        for first in range(0, config.num_experts, per_group)
    )


def _with_room(even_share: float, kernels: Kernels) -> int:
    step = kernels.pass_step
    # With room for at least two steps, few tokens take one pass.
    return max(math.ceil(kernels.exchange_room * even_share / step), 2) * step


def _mean_shards(config: MoEConfig, num_shards: int) -> float:
    """Devices a token goes to when its experts are spread evenly over those it may go to."""
    reach = num_shards
    if config.routing == "group_limited_greedy":
        reach = min(num_shards, config.top_groups * _shards_of_a_group(config, num_shards))
    return reach * (1 - (1 - 1 / reach) ** config.top_k)
