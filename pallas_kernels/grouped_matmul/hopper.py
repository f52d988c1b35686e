"""Grouped matmul for Hopper (Pallas, Mosaic GPU, sm_90a): bfloat16, widths in multiples of 64.

One persistent block per multiprocessor walks over output tiles. Its memory warpgroup fills a ring
of shared-memory stages through TMA, and its two compute warpgroups multiply from them with wgmma.
The ring runs on from one tile to the next, so loads never wait for a tile's end.

Row tiles start at their group's first row, whatever its alignment. TMA allows that for a plain
[rows, 64] window, but not for one cut into the [8, 64] pieces that wgmma reads. So rows are loaded
and stored through a second, uncut view of the same memory: with 64 columns of two bytes the two
orders are the same bytes.
"""

from pallas_kernels.grouped_matmul.hopper_rows import row_products
from pallas_kernels.grouped_matmul.hopper_weight_gradient import weight_gradient

__all__ = ["row_products", "weight_gradient"]
