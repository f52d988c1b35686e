"""The shapes of products with quantised matrices: those that values are checked on, and models'."""

import dataclasses

from pallas_kernels.quantised import Format

# Every form of storage: whole columns, blocks, groups, each with and without what it may have.
FORMATS = {
    "int8": Format("int8"),
    "fp8": Format("float8_e4m3fn"),
    "fp8_block128": Format("float8_e4m3fn", 128, 128, scale_dtype="float32"),
    "fp8_row128": Format("float8_e4m3fn", 128, scale_dtype="float32"),
    "int4_g32": Format("int4", 32),
    "int4_g64_zero": Format("uint4", 64),
    "int4_g128": Format("int4", 128),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows [M, K] and a matrix [K, N]."""

    name: str
    rows: int
    width_in: int
    width_out: int

    def __str__(self) -> str:
        return self.name


# The last group and block partial, as V2-Lite's 10,944 and 576 are no multiples either.
CASES = (Case("whole", 5, 256, 128), Case("partial", 3, 202, 150), Case("small", 2, 10, 6))
# Matrices of V2-Lite's decode: dense and shared feed-forward, queries, latents, output, head.
MODELS = (
    Case("dense_up", 1, 2048, 10944),
    Case("dense_down", 1, 10944, 2048),
    Case("shared_up", 1, 2048, 2816),
    Case("shared_down", 1, 2816, 2048),
    Case("queries", 1, 2048, 3072),
    Case("latents", 1, 2048, 576),
    Case("output", 1, 2048, 2048),
    Case("head", 1, 2048, 102400),
)
# Of many rows, timed in float8 beside bfloat16: V2-Lite's and V2's prefill.
PREFILL = tuple(
    Case(f"{rows}x{width_in}x{width_out}", rows, width_in, width_out)
    for rows in (4096, 16384)
    for width_in, width_out in ((2048, 2048), (2048, 3072), (2048, 5120), (5120, 5120))
)
# What the Hopper kernel of float8 products is held to: more rows than are few, the last tiles of
# rows, of columns and of the contraction partial, and a second piece of columns that is not there.
FP8_CASES = (
    Case("one_tile", 128, 128, 256),
    Case("last_rows", 321, 384, 512),
    Case("last_columns", 130, 256, 320),
    Case("last_of_contraction", 200, 272, 192),
    Case("one_lane", 65, 128, 64),
    Case("many_tiles", 1500, 640, 1408),
)
