"""A layer of experts, forward and backward, compiled for TPUs with its exchange between them."""

import pytest

from tests.conftest import require_module
from tests.dsjax.expert_programs import compile_layers

MESH = "expert=4"
# Tokens a device; chunks; rows a token is sent as, at most, by V2's device-limited routing and by
# Lite's 4 devices; width.
PROGRAMS = {
    ("deepseek_v2", "v5p:2x2x1"): (256, 1, 3, 5120),
    ("deepseek_v2", "v6e:2x2"): (256, 1, 3, 5120),
    ("deepseek_v2_lite", "v5e:2x2"): (2048, 2, 4, 2048),
    ("deepseek_v2_lite", "tpu7x:2x2x1"): (256, 1, 4, 2048),
}


@pytest.mark.slow
@pytest.mark.tpu_program
def test_compiles_for_every_chip():
    require_module("libtpu")
    # Room for all in one pass: a second pass would compile every kernel once more.
    found = compile_layers(
        *[(*name, MESH, tokens, 4.0, chunks) for name, (tokens, chunks, *_) in PROGRAMS.items()]
    )
    assert [(each["model"], each["topology"]) for each in found] == list(PROGRAMS)
    for each in found:
        tokens, chunks, most, width = PROGRAMS[each["model"], each["topology"]]
        rows = [size for dtype, size in each["exchanges"] if dtype == "bf16"]
        row = tokens // chunks * width * 2
        received, returned = 4 * row, most * row
        # Out and back, forward and backward: what comes back is bounded by what was sent.
        assert sorted(rows) == sorted(2 * chunks * [received, returned]), each
        # Products hide some of them, where libtpu runs exchanges beside products.
        hidden = [
            products
            for (dtype, _), products in zip(each["exchanges"], each["beside"], strict=True)
            if dtype == "bf16" and products
        ]
        assert hidden or each["topology"].startswith("tpu7x"), each
        # In chunks, one chunk's experts hide the exchange of another.
        experts = [name for products in hidden for name in products if "grouped_swiglu" in name]
        assert chunks == 1 or (experts and len(hidden) >= 4 * chunks - 2), each
        # Experts and gates beside the rows, and the gates' gradient.
        assert len(each["exchanges"]) - len(rows) == 2 * chunks, each
        assert {"grouped_swiglu", "grouped_matmul", "grouped_weight_gradient"} <= set(
            each["kernels"]
        ), each
