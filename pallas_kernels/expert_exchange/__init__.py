"""Tokens to the devices of their experts, and back (DeepSeekMoE, arXiv 2405.04434, 2.2).

This is what happens between the devices of a mesh axis that divides the experts; `expert_permute`
is what happens on one device. A token is sent once to every shard that has any of its experts, so
device-limited routing (2.2.2) bounds the bytes sent by F x tokens x width.

`plan` says what is sent, `exchange` is the op and its gradients, `transport` moves the rows: three
transports have one meaning. Shape letters: N tokens of this shard, K experts of a token, D width,
P (and Q) shards, F shards that a token may go to, S = N F rows sent, R rows that there is room
to receive.
"""

from pallas_kernels.expert_exchange.exchange import return_tokens, send_choices, send_tokens
from pallas_kernels.expert_exchange.limits import TRANSPORTS, supported
from pallas_kernels.expert_exchange.plan import ExchangePlan, most_assignments, plan_exchange
from pallas_kernels.expert_exchange.transport import exchange_rows

__all__ = [
    "TRANSPORTS",
    "ExchangePlan",
    "exchange_rows",
    "most_assignments",
    "plan_exchange",
    "return_tokens",
    "send_choices",
    "send_tokens",
    "supported",
]
