"""The alignment of language models as pure JAX functions."""
