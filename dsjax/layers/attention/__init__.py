"""Multi-head latent attention (§2.1): one set of weights, two forms.

`latent` is the layer, which attends from the parts of a row to a paged cache in the form that is
cheaper for each. `divided` is the absorbed form where devices divide heads, `context` the expanded
one where they divide rows, in training.
"""

from dsjax.layers.attention.latent import MLA, costs_less_absorbed

__all__ = ["MLA", "costs_less_absorbed"]
