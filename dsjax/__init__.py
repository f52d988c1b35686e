"""DeepSeek-V2 in JAX and Flax: load, run, train and save models.

import dsjax

model = dsjax.load("deepseek-ai/DeepSeek-V2-Lite", dtype="bfloat16")
model.generate("def quicksort(", max_tokens=64)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsjax.api import LanguageModel, load, save, train

__version__ = "0.1.0"
__all__ = ["LanguageModel", "load", "save", "train"]


def __getattr__(name: str) -> Any:
    # Loaded when first used, so that `dsjax info` need not wait for all that training imports.
    if name not in __all__:
        raise AttributeError(f"module 'dsjax' has no attribute {name!r}")
    from dsjax import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__", "__doc__", "__file__", "__name__", "__path__"])
