"""Experiments: small files that compose the functions of rlhf_jax."""

import os

# transformers serves here for its tokenizers; that it finds no PyTorch is as it should be.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
