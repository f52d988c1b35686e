"""Grouped matmul for TPUs (Pallas, Mosaic): bfloat16 or float32, widths in multiples of 128.

Rows and weights move by hand-written copies. How and why stands in `tpu_rows` for the products and
the rows' gradients, and in `tpu_weight_gradient`.
"""

from pallas_kernels.grouped_matmul.tpu_rows import row_products
from pallas_kernels.grouped_matmul.tpu_weight_gradient import weight_gradient

__all__ = ["row_products", "weight_gradient"]
