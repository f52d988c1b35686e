"""The latent cache: what generation remembers of a sequence, 576 numbers a token and layer.

The pool lives as long as whatever generates from it; a view is what one call needs.
"""

from dsjax.cache.pool import (
    LatentPool,
    allocate_pool,
    full_bytes_per_token,
    latent_bytes_per_token,
    pool_dims,
)
from dsjax.cache.view import Part, View

__all__ = [
    "LatentPool",
    "Part",
    "View",
    "allocate_pool",
    "full_bytes_per_token",
    "latent_bytes_per_token",
    "pool_dims",
]
