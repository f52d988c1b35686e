"""Programs whose schedules `tpu_schedule.py` reads: each returns a function and its arguments."""

import functools
from typing import Any


def attention_forward(heads: int = 16, tokens: int = 4096, batch: int = 1) -> Any:
    """Returns the forward kernel, causal, and its arguments."""
    from pallas_kernels.mla_attention import tpu

    inputs, masks, _ = _arguments(heads, tokens, batch)
    return functools.partial(tpu.forward, scale=0.1, causal=True), (inputs, masks)


def attention_backward(heads: int = 16, tokens: int = 4096, batch: int = 1) -> Any:
    """Returns the backward kernel, causal, and its arguments."""
    from pallas_kernels.mla_attention import tpu

    inputs, masks, lse = _arguments(heads, tokens, batch)
    out = inputs.v_BSHV  # of the same shape
    backward = functools.partial(tpu.backward, scale=0.1, causal=True)
    return backward, (inputs, masks, out, lse, out)


def _arguments(heads: int, tokens: int, batch: int) -> tuple[Any, Any, Any]:
    import jax
    import jax.numpy as jnp

    from pallas_kernels.mla_attention.arguments import Inputs, Masks

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct((batch, *shape), dtype)

    nope = array(tokens, heads, 128)
    rope, k_rope = array(tokens, heads, 64), array(tokens, 64)
    lse = array(heads, tokens, dtype=jnp.float32)
    return Inputs(nope, rope, nope, k_rope, nope), Masks(), lse


def splash(
    heads: int = 16, tokens: int = 4096, blocks: Any = (1024, 1024, 512), grad: str = ""
) -> Any:
    """Returns jax's splash attention at 192/128, causal; `grad` is "", "fused" or "separate"."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    q, k, compute = blocks
    sizes = {"block_q_dkv": q, "block_kv_dkv": k, "block_kv_dkv_compute": compute}
    if grad == "separate":
        sizes |= {"block_q_dq": q, "block_kv_dq": k}
    mask = splash_attention_mask.MultiHeadMask(
        [splash_attention_mask.CausalMask((tokens, tokens))] * heads
    )
    attend = splash_attention_kernel.make_splash_mha(
        mask,
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=q,
            block_kv=k,
            block_kv_compute=compute,
            use_fused_bwd_kernel=grad == "fused",
            **(sizes if grad else {}),
        ),
        head_shards=1,
        q_seq_shards=1,
    )

    def loss(q: Any, k: Any, v: Any) -> Any:
        return attend(q, k, v).astype(jnp.float32).sum()

    wide = jax.ShapeDtypeStruct((heads, tokens, 192), jnp.bfloat16)
    value = jax.ShapeDtypeStruct((heads, tokens, 128), jnp.bfloat16)
    function = jax.grad(loss, argnums=(0, 1, 2)) if grad else lambda *args: attend(*args)
    return function, (wide, wide, value)


def decode(
    heads: int = 16,
    query_tokens: int = 1,
    batch: int = 128,
    tokens: int = 4096,
    page_size: int = 64,
    dtype: str = "bfloat16",
) -> Any:
    """Returns the decode kernel and its arguments, with a full page table."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.mla_decode import LatentPages, tpu

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    columns = -(-tokens // page_size)
    num_pages = batch * columns
    quantized = jnp.dtype(dtype).itemsize == 1
    pages = LatentPages(
        array(num_pages, page_size, 512, dtype=jnp.dtype(dtype)),
        array(num_pages, page_size, 64),
        array(num_pages, page_size, dtype=jnp.float32) if quantized else None,
    )
    queries = (array(batch, query_tokens, heads, 512), array(batch, query_tokens, heads, 64))
    table, lengths = array(batch, columns, dtype=jnp.int32), array(batch, dtype=jnp.int32)
    return functools.partial(tpu.decode, scale=0.1), (*queries, pages, table, lengths)
