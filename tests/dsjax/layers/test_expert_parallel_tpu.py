"""A layer of experts, forward and backward, compiled for TPUs with its exchange between them."""

import pytest

from tests.conftest import require_module
from tests.dsjax.expert_programs import compile_layers

MESH, TOKENS = "expert=4", 256
# Rows a token is sent as, at most, by V2's device-limited routing and by Lite's 4 devices; width.
PROGRAMS = {
    ("deepseek_v2", "v5p:2x2x1"): (3, 5120),
    ("deepseek_v2", "v6e:2x2"): (3, 5120),
    ("deepseek_v2_lite", "v5e:2x2"): (4, 2048),
    ("deepseek_v2_lite", "tpu7x:2x2x1"): (4, 2048),
}


@pytest.mark.slow
def test_compiles_for_every_chip():
    require_module("libtpu")
    # Room for all in one pass: a second pass would compile every kernel once more.
    found = compile_layers(*[(*program, MESH, TOKENS, 4.0) for program in PROGRAMS])
    assert [(each["model"], each["topology"]) for each in found] == list(PROGRAMS)
    for each in found:
        most, width = PROGRAMS[each["model"], each["topology"]]
        rows = [size for dtype, size in each["exchanges"] if dtype == "bf16"]
        received, returned = 4 * TOKENS * width * 2, most * TOKENS * width * 2
        # Out and back, forward and backward: what comes back is bounded by what was sent.
        assert sorted(rows) == sorted(2 * [received] + 2 * [returned]), each
        # Products hide some of them, where libtpu runs exchanges beside products.
        hidden = [
            products
            for (dtype, _), products in zip(each["exchanges"], each["beside"], strict=True)
            if dtype == "bf16" and products
        ]
        assert hidden or each["topology"].startswith("tpu7x"), each
        # Experts and gates beside the rows, and the gates' gradient.
        assert len(each["exchanges"]) - len(rows) == 2, each
        assert {"grouped_swiglu", "grouped_matmul", "grouped_weight_gradient"} <= set(
            each["kernels"]
        ), each
