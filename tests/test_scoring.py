"""Forward passes in batches give what one pass over all rows gives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data.tokens import pad_sequences
from rlhf_jax.models import ModelConfig
from rlhf_jax.scoring import in_parts, mean_in_batches, rows_at_once, score_documents, score_in_batches
from rlhf_jax.sharding import make_mesh

DOCUMENTS = [([n % 5 + 1] * (n % 7 + 1), [n % 3 + 6] * (n % 4 + 1)) for n in range(11)]
TOKENS = pad_sequences(DOCUMENTS, length=16, pad_id=0)


def row_sum(params, tokens):
    return params * jnp.where(tokens.mask, tokens.targets, 0).sum(axis=1).astype(jnp.float32)


def token_mean(params, tokens):
    return params * jnp.where(tokens.mask, tokens.targets, 0).sum() / tokens.mask.sum()


EXPECTED = np.array([2.0 * sum(response) for _, response in DOCUMENTS])


@pytest.mark.parametrize("batch_size", [1, 4, 11, 100])
def test_scores_in_batches(batch_size):
    np.testing.assert_allclose(score_in_batches(row_sum, batch_size)(2.0, TOKENS), EXPECTED)
    found = score_documents(row_sum, 2.0, DOCUMENTS, batch_size=batch_size, longest=16, pad_id=0)
    np.testing.assert_allclose(found, EXPECTED)


@pytest.mark.parametrize("batch_size", [1, 4, 11, 100])
def test_a_mean_over_tokens_weighs_batches_by_their_tokens(batch_size):
    answers = [token for _, response in DOCUMENTS for token in response]
    np.testing.assert_allclose(mean_in_batches(token_mean, batch_size)(3.0, TOKENS), 3.0 * np.mean(answers), rtol=1e-6)


def test_what_is_computed_in_parts_keeps_its_rows():
    tokens = pad_sequences(DOCUMENTS[:6], length=16, pad_id=0)

    def sums(some):
        assert len(some.inputs) in (2, 6)
        return some.inputs.sum(axis=1), some.targets * 2

    for whole, parts in zip(sums(tokens), jax.jit(partial(in_parts, sums, number=3))(tokens), strict=True):
        np.testing.assert_array_equal(whole, parts)
    with pytest.raises(ValueError, match="6 rows do not divide into 4 parts"):
        in_parts(sums, tokens, 4)


def test_rows_at_once_are_fewer_of_a_larger_model_and_of_longer_rows():
    """By hand: a token of SmolLM2-135M takes 4·(4·576 + 2·1536 + 9·256) bytes in a layer at 256 tokens."""

    def config(d_model, n_heads, d_ff):
        return ModelConfig(
            vocab_size=49152, d_model=d_model, n_layers=30, n_heads=n_heads, n_kv_heads=n_heads, head_dim=64,
            d_ff=d_ff, rope_theta=1e5, norm_eps=1e-5, tie_embeddings=True, max_length=8192,
        )  # fmt: skip

    small, large, tiny = config(576, 9, 1536), config(4096, 32, 14336), config(64, 4, 128)
    assert rows_at_once(small, 256, 134_515_008) == 2**28 // (4 * (4 * 576 + 2 * 1536 + 9 * 256) * 256) == 34
    assert rows_at_once(small, 1024, 134_515_008) == 4 and rows_at_once(small, 8192, 134_515_008) == 1
    token = 4 * (4 * 4096 + 2 * 14336 + 32 * 1024)
    assert rows_at_once(large, 1024, 8_000_000_000) == 4_000_000_000 // (token * 1024)
    assert rows_at_once(tiny, 64, 260_000) == 256
    with jax.set_mesh(make_mesh("data=2,fsdp=4")):
        assert rows_at_once(small, 8192, 134_515_008) == 8 and rows_at_once(tiny, 64, 260_000) % 8 == 0
