"""Counting a compiled program's collectives."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from dsjax.plan import CollectiveUse, count_collectives
from dsjax.plan.expected import attention_flops, without_further_passes
from dsjax.plan.picture import draw_plan
from dsjax.plan.pods import RATES, SOURCES, Pod
from dsjax.plan.program import Program
from dsjax.plan.timing import collective_seconds, measure
from tests.conftest import require_module

TEXTS = Path(__file__).with_name("tpu_texts")
MIB = 2**20


def use(instructions: int, executions: int, sent: int, expected: int | None = None):
    return CollectiveUse(instructions, executions, sent, sent if expected is None else expected)


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
        "all-gather over data": use(1, 7, 7 * row),
        "all-reduce over expert": use(1, 7, 7 * 2 * row * 3 // 4),
        "all-to-all over expert": use(1, 1, row * 3 // 4),
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
        "all-gather over fsdp": use(1, 59, 59 * 32 * 8 * 2 * 7 // 8),
        "all-reduce over 8 chips": use(1, 1, 2 * 2 * 16 * 4 * 7 // 8),
        "collective-permute over pairs": use(1, 59, 59 * 2 * 8 * 4),
        "ragged-all-to-all over 8 chips": use(1, 59, 59 * 24 * 8 * 2 * 7 // 8),
        "reduce-scatter over fsdp+expert": use(1, 59, 59 * 4 * 8 * 4 * 63),
    }


# Lines of small programs that libtpu 0.0.48.1 compiled for meshes fsdp x expert of 2 x 2, 8 x 8 and
# 4 x 4 chips of v5p and v6e. Arrays are 2 MiB a chip unless it says otherwise.
FORMS = {
    # Gradients of weights that all chips divide: fusions that call an all-reduce and a slice.
    "scatter_over_all": (
        2,
        {
            "all-gather over fsdp+expert": use(2, 10, 10 * 2 * MIB * 3 // 4),
            "reduce-scatter over fsdp+expert": use(1, 5, 5 * 2 * MIB * 3 // 4),
        },
    ),
    # Gradients of weights that fsdp divides: scattered over fsdp, then summed over expert.
    "scatter_and_reduce": (
        8,
        {
            "all-gather over fsdp": use(2, 10, 10 * 2 * MIB * 7 // 8),
            "all-reduce over expert": use(1, 5, 5 * 2 * (MIB // 4) * 7 // 8),
            "reduce-scatter over fsdp": use(1, 5, 5 * 2 * MIB * 7 // 8),
        },
    ),
    # Three dims of the torus at once: libtpu sums arrays that are zero elsewhere, twice the bytes.
    "gather_as_reduce": (
        8,
        {"all-reduce over fsdp+expert": use(3, 15, 15 * 2 * 2 * MIB * 63 // 64)},
    ),
    # A gather beside a product (v5e, v2_lite_v5e_16): written in the fusion that starts it, in the
    # product's, and in that which waits.
    "gather_beside_product": (
        4,
        {"all-gather over fsdp": use(1, 1, 2048 * 16 * 128 * 2 * 3 // 4)},
    ),
    "psum_scatter": (4, {"reduce-scatter over expert": use(1, 1, MIB * 3)}),
    "all_to_all": (4, {"all-to-all over expert": use(1, 1, 8 * MIB * 3 // 4)}),
    "permute": (4, {"collective-permute over expert": use(1, 1, 8 * MIB)}),
    # Three trips of a loop; room for 1.25 times the rows expected.
    **dict.fromkeys(
        ("ragged", "ragged_async"),
        (
            4,
            {
                "ragged-all-to-all over expert": use(
                    1, 3, 3 * 2 * MIB * 3 // 4, round(2 * MIB * 3 / 4 / 1.25) * 3
                )
            },
        ),
    ),
}


@pytest.mark.core
@pytest.mark.parametrize("form", FORMS)
def test_each_form_that_libtpu_emits_is_counted_once_over_its_axes(form: str):
    side, expected = FORMS[form]
    text = (TEXTS / f"{form}.txt").read_text(encoding="utf-8")
    assert count_collectives(text, {"fsdp": side, "expert": side}, 1.25) == expected


def test_a_gather_beside_a_product_takes_its_time_once_and_hides_what_it_can():
    pod = Pod((SimpleNamespace(coords=(0, 0, 0)),) * 16, RATES["TPU v5 lite"], 197e12)
    text = (TEXTS / "gather_beside_product.txt").read_text(encoding="utf-8")
    mesh = {"fsdp": 4, "expert": 4}
    work = measure(Program.of(text), pod, mesh)
    sent = 2048 * 16 * 128 * 2 * 3 // 4
    assert work.collective_seconds == pytest.approx(sent / 45e9)
    assert work.flops == 2 * 2 * 4096 * 512 * 16 * 128
    # What the fusions hand on of the gather is no work of the product, and the rest is in VMEM.
    assert work.hbm_bytes == 0
    assert work.compute_seconds == pytest.approx(work.flops / 197e12)
    assert work.scheduled_seconds == max(work.collective_seconds, work.compute_seconds)
    # Started later, behind the product, it hides nothing.
    start = next(line for line in text.splitlines() if "%async-collective-start.24 =" in line)
    done = next(line for line in text.splitlines() if "%async-collective-done.24 =" in line)
    late = text.replace(start + "\n", "").replace(done, f"{start}\n{done}")
    late_work = measure(Program.of(late), pod, mesh)
    assert late_work.scheduled_seconds == pytest.approx(work.serial_seconds)


def test_axes_follow_the_mesh_whatever_way_the_program_writes_its_groups():
    line = (
        "ENTRY %main () -> f32[] {{\n  %x = f32[64]{{0}} all-gather(%y), {}, dimensions={{0}}\n}}"
    )
    mesh = {"data": 2, "fsdp": 2, "expert": 2}
    for written, axes in (
        ("replica_groups={{0,2},{1,3},{4,6},{5,7}}", "fsdp"),
        ("replica_groups={{0,5},{1,4},{2,7},{3,6}}", "data+expert"),
        ("replica_groups=[4,2]<=[8]", "expert"),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", "data"),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", "fsdp+expert"),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", "expert"),
        ("replica_groups={}", "data+fsdp+expert"),
    ):
        (name,) = count_collectives(line.format(written), mesh)
        assert name == f"all-gather over {axes}", written


PRODUCTS = """HloModule m

%body (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %x = bf16[8,16]{1,0} parameter(0)
  %w = bf16[16,32]{1,0} constant({...})
  %d = bf16[8,32]{1,0} convolution(%x, %w), dim_labels=bf_io->bf, metadata={op_name="a"}
  %s = bf16[8,4096]{1,0} all-gather-start(%x), replica_groups=mesh['fsdp'=4] {'fsdp'}
  %e = bf16[24,8,16,4]{3,2,1,0} convolution(%y, %z), WINDOW, {op_name="rematted_computation"}
  %y = bf16[24,8,64,1]{3,2,1,0} parameter(1)
  %z = bf16[64,16,4,1]{3,2,1,0} parameter(2)
}

ENTRY %main (q: (s32[])) -> (s32[]) {
  %l = (s32[]) while(%t), body=%body, backend_config={"known_trip_count":{"n":"3"}}
}
""".replace(
    "WINDOW", "window={size=1x16 pad=0_0x15_15 rhs_reversal=0x1}, dim_labels=0bf1_i1o0->0b1f"
)


def test_flops_of_products_are_those_of_what_they_meet_with_trips_multiplied_in():
    """Libtpu writes a dim of heads as a window of which one tap meets an input."""
    chip = SimpleNamespace(coords=(0, 0, 0), slice_index=0)
    pod = Pod((chip,) * 4, RATES["TPU v5"], 459e12)
    work = measure(Program.of(PRODUCTS), pod, {"fsdp": 4})
    heads = 2 * 24 * 8 * 16 * 4 * 64
    assert work.flops == 3 * (2 * 8 * 16 * 32 + heads)
    assert work.recomputed == 3 * heads
    assert work.collective_seconds > 0
    # The gather begins before the second product, and ends with the body.
    assert work.scheduled_seconds < work.serial_seconds


def test_a_loop_whose_trips_depend_on_data_is_not_expected():
    loop = PRODUCTS.replace(', backend_config={"known_trip_count":{"n":"3"}}', "")
    assert without_further_passes(Program.of(loop)).bodies[""] == ()
    known = Program.of(PRODUCTS)
    assert without_further_passes(known).bodies == known.bodies


def test_attention_is_counted_over_the_keys_that_a_query_sees():
    hlo = """ENTRY %main () -> f32[] {
  %k = bf16[2,KEYS,2048]{2,1,0} parameter(0)
  %mla_attention_forward.3 = (bf16[2,512,2048]{2,1,0}, f32[2,8,2,512]) custom-call(OPERANDS)
}
""".replace("OPERANDS", ", ".join(["%t"] * 5 + ["%q", "%r", "%k", "%v"]))
    for keys, pairs in ((512, 512 * 512 / 2), (1024, 512 * 512 + 512 * 512 / 2)):
        body = Program.of(hlo.replace("KEYS", str(keys))).bodies[""]
        named = {each.name: each for each in body}
        assert attention_flops(body[1], named) == 2 * 2 * 16 * pairs * (192 + 128)
        assert attention_flops(body[0], named) == 0


def test_the_time_of_each_collective_adds_up_and_every_rate_has_a_source():
    chip = SimpleNamespace(coords=(0, 0, 0), slice_index=0)
    pod = Pod((chip,) * 64, RATES["TPU v5"], 459e12)
    text = (TEXTS / "scatter_and_reduce.txt").read_text(encoding="utf-8")
    program, mesh = Program.of(text), {"fsdp": 8, "expert": 8}
    taken = collective_seconds(program, pod, mesh)
    assert set(taken) == set(count_collectives(program, mesh))
    assert sum(taken.values()) == pytest.approx(measure(program, pod, mesh).collective_seconds)
    assert set(pod.assumptions()) == set(SOURCES)


def test_a_picture_is_a_png(tmp_path):
    names = ("parameter_bytes", "optimizer_bytes", "activation_bytes", "capacity_bytes")
    seconds = ("compute_seconds", "copy_seconds", "collective_seconds", "modelled_seconds")
    figures: dict[str, object] = dict.fromkeys((*names, *seconds), 1.0)
    figures |= {"topology": "v5p:4x4x4", "slices": 2, "modelled_mfu": 0.4}
    draw_plan(figures, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="must end in"):
        draw_plan(figures, tmp_path / "plan.pdf")


def test_an_unknown_topology_is_one_line():
    require_module("libtpu")
    command = [sys.executable, "-m", "dsjax", "plan", "quickstart", "--topology", "v9:2x2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: topology 'v9:2x2'")
    assert done.stderr.count("\n") == 1
