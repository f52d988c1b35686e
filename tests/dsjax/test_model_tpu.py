"""What a step of generation needs on a TPU, by the TPU's own compiler."""

import pytest

from tests.conftest import require_module
from tests.tpu_compiler import run_compiler


@pytest.mark.slow
@pytest.mark.tpu_program
def test_decoding_copies_no_layers_experts():
    require_module("libtpu")
    (found,) = run_compiler("tests.dsjax.decode_program", "v5p:2x2x1")
    # 4 MB; 743 MB where the scan over layers slices their experts.
    assert found["temporary"] < found["experts"] / 100
