"""Kernels for latent attention and mixtures of experts: arrays in, arrays out, on JAX alone."""
