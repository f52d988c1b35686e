"""DeepSeekMoE: routed experts beside the shared ones (§2.2).

`router` chooses each token's experts, `dispatch` brings tokens to the devices of their experts and
back, `experts` computes those of one device, `passes` adds up what there is not room for at once,
`balance` keeps them evenly loaded; `layer` is all.
"""

from dsjax.layers.moe.balance import Dropping
from dsjax.layers.moe.experts import ExpertWeights
from dsjax.layers.moe.layer import MoE
from dsjax.layers.moe.router import RouterStats

__all__ = ["Dropping", "ExpertWeights", "MoE", "RouterStats"]
