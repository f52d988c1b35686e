"""Multi-head latent attention (§2.1): one set of weights, two forms.

`latent` is the layer. `parts` attends from the parts of a row to a paged cache, in the form that is
cheaper for each.
"""

from dsjax.layers.attention.latent import MLA

__all__ = ["MLA"]
