"""The exact sizes of the released models, for every test that is about one of them."""

from typing import NamedTuple


class Sizes(NamedTuple):
    """What a released model consists of.

    Attributes:
        parameters: of the whole model.
        active_parameters: of these, what one token uses.
        hf_tensors: tensors of the Hugging Face checkpoint.
        cache_bytes: of the latent cache, a token, in bfloat16.
    """

    parameters: int
    active_parameters: int
    hf_tensors: int
    cache_bytes: int


_V2 = Sizes(235_741_434_880, 21_375_800_320, 29_102, 69_120)
SIZES = {
    "deepseek_v2": _V2,
    "deepseek_v2_5": _V2,
    "deepseek_v2_lite": Sizes(15_706_484_224, 2_661_150_208, 5_291, 31_104),
}
