"""How tokens reach the devices of their experts, and come back.

Three objects with one meaning, used inside a `shard_map`: `OneDevice` has all experts,
`EverywhereAlready` has some of the experts and all tokens, as in generation, and `Exchange` sends
tokens between devices that have different ones, as in training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from dsjax.config import MoEConfig
from dsjax.kernels import Kernels
from pallas_kernels.expert_exchange import (
    ExchangePlan,
    most_assignments,
    plan_exchange,
    return_tokens,
    send_choices,
    send_tokens,
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routes:
    """Where a device's tokens go, in how many passes.

    Attributes:
        experts_NK: int32 experts, counted as `send` needs them.
        num_passes: int32, the same on all devices that exchange tokens; None for one.
        exchange: plan of the exchange in all passes, or None.
        windows: int32, windows of rows that each pass of the exchange is cut into, or None for one.
        num_rows: rows that a pass has room for, each an expert of a token.
    """

    experts_NK: jax.Array
    num_passes: jax.Array | None = None
    exchange: ExchangePlan | None = None
    windows: jax.Array | None = None
    num_rows: int = field(default=0, metadata={"static": True})


class Sent(NamedTuple):
    """Tokens that are where their experts are.

    Attributes:
        x_RD: the tokens, compute dtype.
        experts_RK: int32 experts of this device; their number for one that is elsewhere.
        gates_RK: float32.
        first_row: int32, the first row of the pass among those of the R tokens, sorted by expert.
        exchange: plan of the pass of the exchange that brought them, or None.
    """

    x_RD: jax.Array
    experts_RK: jax.Array
    gates_RK: jax.Array
    first_row: jax.Array | int
    exchange: ExchangePlan | None = None


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

    def plan(self, indices_NK: jax.Array) -> Routes:
        """Says where tokens go.

        Args:
            indices_NK: int32 experts, counted over all devices; their number for none.
        """
        ...

    def send(
        self, routes: Routes, index: jax.Array | int, x_ND: jax.Array, gates_NK: jax.Array
    ) -> Sent:
        """Brings the tokens of one pass to the devices of their experts.

        Args:
            routes: where they go.
            index: int32, the pass.
            x_ND: this device's tokens, compute dtype.
            gates_NK: float32.
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

    def plan(self, indices_NK: jax.Array) -> Routes:
        """One pass has room for all."""
        return Routes(indices_NK, num_rows=indices_NK.size)

    def send(
        self, routes: Routes, index: jax.Array | int, x_ND: jax.Array, gates_NK: jax.Array
    ) -> Sent:
        """Returns the tokens as they are."""
        return Sent(x_ND, routes.experts_NK, gates_NK, index * routes.num_rows)

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

    def plan(self, indices_NK: jax.Array) -> Routes:
        """Leaves out the experts of other devices."""
        num_tokens, top_k = indices_NK.shape
        num_local = self.config.num_experts // self.num_shards
        experts_NK = indices_NK - jax.lax.axis_index("expert") * num_local
        here_NK = (experts_NK >= 0) & (experts_NK < num_local)
        experts_NK = jnp.where(here_NK, experts_NK, num_local)
        most = num_tokens * min(top_k, num_local)
        num_rows = min(_with_room(num_tokens * top_k / self.num_shards, self.kernels), most)
        num_passes = None if num_rows == most else -(-jnp.sum(here_NK) // num_rows)
        return Routes(experts_NK, num_passes, num_rows=num_rows)

    def send(
        self, routes: Routes, index: jax.Array | int, x_ND: jax.Array, gates_NK: jax.Array
    ) -> Sent:
        """Returns the tokens as they are."""
        return Sent(x_ND, routes.experts_NK, gates_NK, index * routes.num_rows)

    def combine(self, out_RD: jax.Array, sent: Sent) -> jax.Array:
        """Returns this device's part of the sum."""
        return out_RD

    def own(self, shared_ND: jax.Array) -> jax.Array:
        """Returns all of it on the first device: every device has it, one may add it."""
        return jnp.where(jax.lax.axis_index("expert") == 0, shared_ND, 0)


@dataclass(frozen=True)
class Exchange:
    """Devices have different tokens and different experts: tokens are sent, once to each device.

    A device has room for `exchange_room` times the mean of what devices receive. Where one receives
    more, all take more passes: of the exchange, and, where the tokens of one of its passes have
    more experts than there is room for, of windows of their rows, for which they are sent again.
    """

    config: MoEConfig
    kernels: Kernels
    num_shards: int
    sum_axes: tuple[str, ...] = ()
    waits: bool = True

    @property
    def num_chunks(self) -> int:
        """Parts of a device's tokens that are sent one by one."""
        return self.kernels.exchange_chunks

    def plan(self, indices_NK: jax.Array) -> Routes:
        """Sends each token to every device that has any of its experts."""
        config, num_shards = self.config, self.num_shards
        num_tokens, top_k = indices_NK.shape
        room = exchange_room(config, self.kernels, num_shards, num_tokens)
        most = room * min(top_k, config.num_experts // num_shards)
        num_rows = min(_with_room(num_tokens * top_k, self.kernels), most)
        exchange = plan_exchange(
            indices_NK,
            num_experts=config.num_experts,
            max_shards=max_shards(config, num_shards),
            axis_name="expert",
            transport=self.kernels.expert_exchange,
            room=room,
        )
        num_passes = None if room == num_tokens * num_shards else exchange.num_passes
        windows = None
        if num_rows < most:
            windows = jnp.maximum(-(-most_assignments(indices_NK, exchange) // num_rows), 1)
            num_passes = windows if num_passes is None else num_passes * windows
        return Routes(indices_NK, num_passes, exchange, windows, num_rows)

    def send(
        self, routes: Routes, index: jax.Array | int, x_ND: jax.Array, gates_NK: jax.Array
    ) -> Sent:
        """Sends the tokens of a pass, with their experts and gates beside them."""
        assert routes.exchange is not None
        window: jax.Array | int = 0
        if routes.windows is not None:
            index, window = index // routes.windows, index % routes.windows
        whole = routes.num_passes is None
        exchange = routes.exchange if whole else routes.exchange.of_pass(index)
        rows_RD = send_tokens(x_ND, exchange)
        experts_RK, gates_RK = send_choices(routes.experts_NK, gates_NK, exchange)
        return Sent(rows_RD, experts_RK, gates_RK, window * routes.num_rows, exchange)

    def combine(self, out_RD: jax.Array, sent: Sent) -> jax.Array:
        """Sends results back, and sums each token's."""
        assert sent.exchange is not None
        return return_tokens(out_RD, sent.exchange)

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


def exchange_room(config: MoEConfig, kernels: Kernels, num_shards: int, num_tokens: int) -> int:
    """Returns the tokens that a device has room to receive in one pass of an exchange.

    Args:
        config: how tokens are routed.
        kernels: how much room there is, over the mean.
        num_shards: devices that divide the experts.
        num_tokens: tokens that each of them sends.
    """
    mean = num_tokens * _mean_shards(config, num_shards)
    return min(_with_room(mean, kernels), num_tokens * num_shards)


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
