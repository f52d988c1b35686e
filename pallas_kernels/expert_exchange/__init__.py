"""From router output to rows sorted by expert, and back (DeepSeekMoE, arXiv 2405.04434 §2.2)."""

from pallas_kernels.expert_exchange.permute import (
    ExpertOrder,
    combine_rows,
    gather_rows,
    sort_by_expert,
)

__all__ = ["ExpertOrder", "combine_rows", "gather_rows", "sort_by_expert"]
