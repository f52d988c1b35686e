"""Tile sizes of latent attention, by implementation and chip."""

# Queries and keys of a block of the plain JAX path: a cache holds it, and the steps are few.
XLA_BLOCK = 512
