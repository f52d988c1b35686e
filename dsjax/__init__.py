"""DeepSeek-V2 in JAX and Flax."""
