"""Products with a quantised matrix in plain XLA: it is widened within the product."""

from pallas_kernels.quantised import widened_products as products

__all__ = ["products"]
