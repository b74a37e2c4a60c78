"""A small model that the tests of its parts share."""

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.models import ModelConfig, Transformer

CONFIG = ModelConfig(
    vocab_size=13, d_model=12, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=16, rope_theta=10_000.0,
    norm_eps=1e-5, tie_embeddings=True, max_length=32,
)  # fmt: skip
TOKENS = jnp.asarray([[3, 1, 4, 1, 5, 9, 2], [2, 7, 1, 8, 2, 8, 1]])


def random_tree(tree, seed, scale):
    """Normal numbers in the shapes and types of a tree."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, scale, leaf.shape), leaf.dtype), tree)


def new_params(config):
    """Of a Transformer; norms and biases are random too."""
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), TOKENS)["params"]
    return random_tree(shapes, 0, 0.5)
