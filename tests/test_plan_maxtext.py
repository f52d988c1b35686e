"""MaxText's programs, read as plans read ours."""

import json
import runpy

import pytest

from tests.dsjax.training.small_runs import REPOSITORY


@pytest.fixture
def script(monkeypatch):
    """What scripts/plan_maxtext.py defines."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
    return runpy.run_path(str(REPOSITORY / "scripts" / "plan_maxtext.py"))


def test_what_is_kept_is_of_the_settings_as_they_are(script):
    kept = json.loads((REPOSITORY / "docs" / "maxtext.json").read_text())
    assert kept
    for name, figures in kept.items():
        setting = script["SETTINGS"][name]
        assert figures["arguments"] == list(setting.arguments)
        assert figures["measured_seconds"] == setting.measured_seconds
        assert figures["peak_bytes"] < figures["capacity_bytes"]
        # No kernel is faster than its peak, and no step was measured faster than it is modelled.
        if setting.measured_seconds is not None:
            assert figures["modelled_seconds"] < setting.measured_seconds


GROUPED = (
    "  %gmm.5 = bf16[4096,2048]{1,0:T(8,128)(2,1)} custom-call(%a, %b, %c), "
    'custom_call_target="tpu_custom_call", operand_layout_constraints={s32[], s32[9]{0}, '
    "bf16[4096,1408]{1,0}, bf16[8,1408,2048]{2,1,0}}, frontend_attributes={}"
)
TRANSPOSED = GROUPED.replace("bf16[8,1408,2048]", "bf16[8,2048,1408]")
GRADIENT = GROUPED.replace("bf16[8,1408,2048]{2,1,0}}", "bf16[4096,2048]{1,0}}")
ATTENTION = (
    "  %splash_mha_dkv_x = (f32[2,512,192]{2,1,0}, bf16[2,16,256,128]{3,2,1,0}) custom-call(%a), "
    'custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,4,4]{2,1,0}, '
    "bf16[2,16,256,192]{3,2,1,0}, bf16[2,16,256,192]{3,2,1,0}, bf16[2,16,256,128]{3,2,1,0}, "
    "f32[2,16,8,256]{3,2,1,0}}, frontend_attributes={}"
)


def test_the_peers_kernels_are_counted_by_their_shapes(script):
    estimate = script["estimate"]
    product = 2 * 4096 * 1408 * 2048
    for line in (GROUPED, TRANSPOSED, GRADIENT):
        assert f'"flops":"{product}"' in estimate(line)
    moved = 2 * (4096 * 1408 + 8 * 1408 * 2048 + 4096 * 2048) + 4 * 9 + 4
    assert f'"bytes_accessed":"{moved}"' in estimate(GROUPED)
    pairs = 2 * 16 * 256 * 256 // 2
    assert f'"flops":"{2 * pairs * 2 * (192 + 128)}"' in estimate(ATTENTION)
    assert estimate(ATTENTION + ' cost_estimate":{') == ""
    for name, products in (("fwd", 192 + 128), ("dq", 2 * 192 + 128)):
        line = ATTENTION.replace("_dkv_", f"_{name}_")
        assert f'"flops":"{2 * pairs * products}"' in estimate(line)
    assert estimate("  %add = f32[] add(%a, %b)") == ""
    with pytest.raises(ValueError, match="%sort: no kernel of MaxText's that is known"):
        estimate(GROUPED.replace("%gmm.5", "%sort"))
