"""Data: sources of documents, tokenizers, packing into fixed-length rows, and the loader.

Imported module by module (`from dsjax.data.loader import make_loader`), so that a process that
only tokenizes does not pay for what only training needs.
"""
