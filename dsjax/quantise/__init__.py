"""Forms of weights in fewer bits, and recipes: which weights are stored in which form."""

from dsjax.quantise.formats import format_of
from dsjax.quantise.recipes import choose_formats, form_of
from dsjax.quantise.sides import Sides, dims_within

__all__ = ["Sides", "choose_formats", "dims_within", "form_of", "format_of"]
