"""Many requests over one pool of latents: continuous batching, chunks, shared prefixes.

`scheduler` and `pages` decide, without a device; `runner` and `programs` compute; `engine` is the
loop between them.
"""

from dsjax.engine.engine import Engine, EngineError
from dsjax.engine.figures import Figures
from dsjax.engine.generate import generate, stream
from dsjax.engine.request import (
    Generation,
    Request,
    Stream,
    TextPiece,
    TokenLogProb,
    TokenMask,
    samples,
)

__all__ = [
    "Engine",
    "EngineError",
    "Figures",
    "Generation",
    "Request",
    "Stream",
    "TextPiece",
    "TokenLogProb",
    "TokenMask",
    "generate",
    "samples",
    "stream",
]
