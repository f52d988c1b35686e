"""From router output to rows sorted by expert, and back (DeepSeekMoE, arXiv 2405.04434 §2.2).

`permute` is what happens on one device: a token's copies, sorted by expert, and their weighted sum.
`plan`, `exchange` and `transport` are what happens between the devices of a mesh axis that divides
the experts: a token is sent once to every shard that has any of its experts, so device-limited
routing (§2.2.2) bounds the bytes sent by M x tokens x width. Shape letters: N tokens of this shard,
K experts of a token, D width, P (and Q) shards, F shards that a token may go to, S = N F rows sent,
R = P N rows that might be received, E experts of this shard, M rows sorted by expert.
"""

from pallas_kernels.expert_exchange.exchange import return_tokens, send_choices, send_tokens
from pallas_kernels.expert_exchange.permute import (
    ExpertOrder,
    combine_rows,
    gather_rows,
    sort_by_expert,
)
from pallas_kernels.expert_exchange.plan import ExchangePlan, plan_exchange
from pallas_kernels.expert_exchange.transport import TRANSPORTS, exchange_rows

__all__ = [
    "TRANSPORTS",
    "ExchangePlan",
    "ExpertOrder",
    "combine_rows",
    "exchange_rows",
    "gather_rows",
    "plan_exchange",
    "return_tokens",
    "send_choices",
    "send_tokens",
    "sort_by_expert",
]
