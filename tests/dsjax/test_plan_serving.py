"""Plans of the engine's steps: what they read, and the cache's capacity."""

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from dsjax.configs.models import deepseek_v2_lite
from dsjax.counts import count_parameters, serving_flops, train_flops_per_token
from dsjax.engine.programs import RowShape
from dsjax.engine.state import ChunkShape
from dsjax.plan.expected import Expected, share_of_experts
from dsjax.plan.pods import RATES, Pod
from dsjax.plan.program import Program
from dsjax.plan.serving import largest_row
from dsjax.plan.timing import measure
from tests.conftest import require_module

SERVING = """HloModule m

%sliced (a: bf16[26,64,128], i: s32[]) -> bf16[1,64,128] {
  %a = bf16[26,64,128]{2,1,0} parameter(0)
  %flat = bf16[26,8192]{1,0} bitcast(%a)
  %i = s32[] parameter(1)
  ROOT %ds = bf16[1,8192]{1,0} dynamic-slice(%flat, %i), dynamic_slice_sizes={1,8192}
}

%product (x: bf16[8,64], w: bf16[26,64,128], i: s32[]) -> bf16[8,128] {
  %x = bf16[8,64]{1,0} parameter(0)
  %w = bf16[26,64,128]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %slice = bf16[64,128]{1,0} fusion(%w, %i), kind=kLoop, calls=%sliced
  ROOT %d = bf16[8,128]{1,0} convolution(%x, %slice), dim_labels=bf_io->bf
}

%append (p: bf16[512,64,512], j: s32[8], u: bf16[8,512]) -> bf16[512,64,512] {
  %p = bf16[512,64,512]{2,1,0} parameter(0)
  %j = s32[8]{0} parameter(1)
  %u = bf16[8,512]{1,0} parameter(2)
  ROOT %s = bf16[512,64,512]{2,1,0} scatter(%p, %j, %u), to_apply=%last
}

ENTRY %main () -> f32[] {
  %tokens = bf16[8,64]{1,0} parameter(0)
  %stack = bf16[26,64,128]{2,1,0} parameter(1)
  %layer = s32[]{:S(6)} parameter(2)
  %pool = bf16[512,64,512]{2,1,0} parameter(3)
  %rope = bf16[512,64,128]{2,1,0} parameter(4)
  %places = s32[8]{0:S(1)} parameter(5)
  %new = bf16[8,512]{1,0:S(1)} parameter(6)
  %read = bf16[8,128]{1,0:S(1)} fusion(%tokens, %stack, %layer), kind=kOutput, calls=%product
  %written = bf16[512,64,512]{2,1,0} fusion(%pool, %places, %new), kind=kLoop, calls=%append
  %q = bf16[8,16,512]{2,1,0} parameter(7)
  %r = bf16[8,16,128]{2,1,0} parameter(8)
  %mla_decode.3 = (bf16[1,8,16,512]{3,2,1,0}) custom-call(%t, %l, %q, %r, %written, %rope)
  %rows = bf16[256,64]{1,0} parameter(9)
  %grouped_matmul.1 = bf16[256,128]{1,0} custom-call(TEN, %rows, %experts), ESTIMATE
}
""".replace("TEN", ", ".join(["%t"] * 10)).replace(
    "ESTIMATE", 'x={"cost_estimate":{"flops":"4194304","bytes_accessed":"1146880"}}'
)


def test_a_step_of_the_engine_reads_what_its_sequences_hold_and_the_experts_chosen():
    """Slices of stacks within fusions, latents written in place, and the kernels."""
    pod = Pod((SimpleNamespace(coords=(0, 0, 0)),), RATES["TPU v6 lite"], 918e12)
    program, share = Program.of(SERVING), 0.25
    product = 2 * (8 * 64 + 64 * 128)
    attention = 8 * 4096 * 640 * 2 + 2 * (8 * 16 * 640 + 8 * 16 * 512)
    rows, experts = 2 * 256 * (64 + 128), 1146880 - 2 * 256 * (64 + 128)
    work = measure(program, pod, {}, Expected(1.0, 4096, share))
    assert work.hbm_bytes == product + 2 * 8 * 512 + attention + rows + share * experts
    assert work.flops == 2 * 8 * 64 * 128 + 2 * 8 * 16 * 4096 * (640 + 512) + 4194304
    all_read = measure(program, pod, {}, Expected(1.0, 4096))
    assert all_read.hbm_bytes - work.hbm_bytes == (1 - share) * experts


def test_experts_read_and_flops_of_generation_are_the_models_own():
    config = deepseek_v2_lite.config
    assert config.moe is not None
    assert share_of_experts(config.moe, 1) == pytest.approx(6 / 64)
    assert share_of_experts(config.moe, 64) > 0.99
    # One token alone: two FLOPs for each parameter that it meets, and its one key.
    _, active = count_parameters(config)
    vocabulary = 102_400 * 2048
    attended = 27 * 16 * 2 * (512 + 64 + 512)
    expected = 2 * (active - vocabulary) + attended
    assert serving_flops(config, 1, 1, 1, "absorbed") == expected
    expanded = serving_flops(config, 4096, 1, 4096 * 4096 // 2, "expanded")
    per_token = train_flops_per_token(config, 4096) / 3
    assert expanded < 4096 * per_token  # the head is run for one token only, and nothing backward
    assert expanded > 0.8 * 4096 * per_token


def plan_of_a_decode(*options: str) -> dict[str, Any]:
    """Plans eight sequences of 256 tokens of the smallest model on four chips."""
    require_module("libtpu")
    command = [sys.executable, "-m", "dsjax", "plan", "tiny", "--topology", "v5e:2x2", "--json"]
    command += ["--for", "decode", "--engine", "max_length=256", "--engine", "max_batch=8"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


@pytest.mark.tpu_program
def test_a_decode_is_planned_with_the_caches_capacity():
    """The small model, as larger ones take minutes; BENCHMARKS.md has those."""
    figures = plan_of_a_decode()
    # Room for so many pages beside what the step needs, and for no more.
    beside = figures["peak_bytes"] - figures["cache_bytes"]
    chips, per_token = figures["chips"], figures["cache_bytes_per_token"]
    most = figures["cache_capacity_tokens"] // chips
    assert per_token == 4 * (64 + 16) * 2
    assert 0 <= figures["capacity_bytes"] - beside - most * per_token < 64 * per_token
    # The pool itself is what the engine takes: pages for `max_batch` sequences, a fourth a lane.
    assert figures["cache_tokens"] == 8 * 256
    assert (figures["mesh"]["expert"], figures["sequences"]) == (4, 8)
    assert "all-reduce over expert" in figures["collectives"]
    assert figures["tokens_per_second"] == pytest.approx(8 / figures["modelled_seconds"])
    # Weights and cache are read, most of them once.
    held = figures["parameter_bytes"] + 2 * 256 * per_token
    assert 0.8 * held < figures["hbm_bytes"] < 1.5 * held


@pytest.mark.tpu_program
def test_chips_that_divide_heads_have_a_part_of_every_page():
    """Two lanes of two chips; each chip has half of the tokens of its lane's sequences."""
    figures = plan_of_a_decode("--mesh", "data=2", "--mesh", "tensor=2")
    chips, per_token = figures["chips"], figures["cache_bytes_per_token"]
    assert per_token == 4 * (64 + 16) * 2
    assert figures["cache_tokens"] == 8 * 256
    assert figures["cache_bytes"] == 8 * 256 // chips * per_token
    most = figures["cache_capacity_tokens"] // chips
    beside = figures["peak_bytes"] - figures["cache_bytes"]
    assert 0 <= figures["capacity_bytes"] - beside - most * per_token < 64 * per_token
    # Of each of 4 layers the outputs of 4 sequences' 4 heads, and their log-sum-exps.
    uses = figures["collectives"]
    assert uses["all-to-all over tensor"]["executions"] == 4
    assert uses["all-to-all over tensor"]["expected_bytes"] == 4 * 4 * 4 * (64 * 2 + 4) // 2


def test_a_prefill_is_the_longest_piece_of_a_prompt_and_a_decode_the_most_sequences():
    pieces = [ChunkShape(1, 256), ChunkShape(8, 256), ChunkShape(1, 2048)]
    shapes = [RowShape(size, None, size) for size in (1, 4, 16)]
    shapes += [RowShape(size, piece, size) for piece in pieces for size in (1, 16)]
    shapes += [RowShape(16, piece, 16, True) for piece in pieces]
    assert largest_row(shapes, "decode") == RowShape(16, None, 16)
    assert largest_row(shapes, "prefill") == RowShape(1, pieces[2], 1)
    with pytest.raises(ValueError, match="no step only decodes"):
        largest_row(shapes[3:], "decode")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--quantize", "int4"], "--quantize: is of the engine"),
        (["--for", "decode", "--engine", "max_batch=none"], "error: max_batch=none: must be int"),
        (["--for", "decode", "--mesh", "expert=3"], "error: mesh={"),
    ],
)
def test_a_plan_of_the_engine_says_what_is_wrong_in_one_line(options, said):
    require_module("libtpu")
    command = [sys.executable, "-m", "dsjax", "plan", "quickstart", "--topology", "v5e:2x2"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
