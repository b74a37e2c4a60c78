"""The alignment of language models as pure JAX functions."""

__version__ = "0.4.0"
