"""Counting a compiled program's collectives."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from dsjax.plan import CollectiveUse, count_collectives


def test_collectives_of_a_loop_are_multiplied_out():
    """Seven trips of a gather and a sum over half the mesh, one exchange behind them."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "expert"))

    def run(x_MD):
        def body(sum_MD, _):
            whole_ND = jax.lax.all_gather(sum_MD, "data", tiled=True)
            return jax.lax.psum(jnp.sin(whole_ND[: sum_MD.shape[0]]), "expert"), None

        x_MD, _ = jax.lax.scan(body, x_MD, None, length=7)
        return jax.lax.all_to_all(x_MD, "expert", 0, 0, tiled=True)

    spec = PartitionSpec(("data", "expert"))
    mapped = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    x = jax.ShapeDtypeStruct((64, 16), jnp.float32)
    text = jax.jit(mapped).lower(x).compile().as_text()
    assert text is not None
    uses = count_collectives(text)
    row = 8 * 16 * 4  # bytes of one device's array
    assert uses == {
        "all-gather over data": CollectiveUse(1, 7, 7 * row),
        "all-reduce over expert": CollectiveUse(1, 7, 7 * 2 * row * 3 // 4),
        "all-to-all over expert": CollectiveUse(1, 1, row * 3 // 4),
    }


TPU_PROGRAM = """HloModule jit_step

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %add = f32[] add(%a, %b)
}

%condition (p: (s32[], bf16[4,8])) -> pred[] {
  %constant.5 = s32[]{:T(128)} constant(59)
  %p = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.5), direction=LT
}

%body (p.1: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %x = bf16[4,8]{1,0} parameter(0)
  %ag = bf16[32,8]{1,0:T(8,128)} all-gather(%x), replica_groups=mesh['fsdp'=8,'expert'=8] {'fsdp'}
  %rs = f32[4,8]{1,0} reduce-scatter(%y), replica_groups=mesh['fsdp'=8,'expert'=8] {'expert','fsdp'}
  %cp = (f32[2,8]{1,0}, f32[2,8]{1,0}, u32[]) collective-permute-start(%z), pairs={{0,1}}
  %cpd = f32[2,8]{1,0} collective-permute-done(%cp)
  %ra = ((bf16[9,8], bf16[24,8]), bf16[24,8]) ragged-all-to-all-start(%v), replica_groups=[8,8]
  %rad = bf16[24,8]{1,0} ragged-all-to-all-done(%ra)
}

ENTRY %main (q: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %w = (s32[]{:T(128)}, bf16[4,8]{1,0}) while(%t), condition=%condition, body=%body
  %ar = (f32[16]{0}, f32[16]{0}) all-reduce(%u, %v), replica_groups=[8,8]<=[64], to_apply=%sum
}
"""


def test_axes_and_trip_counts_of_a_tpu_program():
    assert count_collectives(TPU_PROGRAM) == {
        "all-gather over fsdp": CollectiveUse(1, 59, 59 * 32 * 8 * 2 * 7 // 8),
        "all-reduce over 8 chips": CollectiveUse(1, 1, 2 * 2 * 16 * 4 * 7 // 8),
        "collective-permute over pairs": CollectiveUse(1, 59, 59 * 2 * 8 * 4),
        "ragged-all-to-all over 8 chips": CollectiveUse(1, 59, 59 * 24 * 8 * 2 * 7 // 8),
        "reduce-scatter over expert+fsdp": CollectiveUse(1, 59, 59 * 4 * 8 * 4 * 63),
    }
