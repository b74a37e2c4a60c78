"""Token ids to batches: the shift, the masks, the padding."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.batches import Completions, Prompts
from rlhf_jax.data.lazy import Lazy
from rlhf_jax.data.tokens import join, narrowed, pack_sequences, pad_prompts, pad_sequences, padded_when_asked, take
from rlhf_jax.models import ModelConfig, Transformer
from rlhf_jax.scoring import sft_objective

PAD, EOS = 0, 2


def test_pad_sequences_by_hand():
    tokens = pad_sequences([([5, 6], [7, EOS]), ([8], [EOS])], length=5, pad_id=PAD)
    np.testing.assert_array_equal(tokens.inputs, [[5, 6, 7, EOS, PAD], [8, EOS, PAD, PAD, PAD]])
    np.testing.assert_array_equal(tokens.targets, [[6, 7, EOS, PAD, PAD], [EOS, PAD, PAD, PAD, PAD]])
    np.testing.assert_array_equal(tokens.mask, [[0, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(tokens.positions[0, :4], [0, 1, 2, 3])
    np.testing.assert_array_equal(tokens.segment_ids, [[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])


def test_eos_is_learned_where_it_is_the_padding_token_too():
    tokens = pad_sequences([([5], [7, EOS])], length=5, pad_id=EOS)
    np.testing.assert_array_equal(tokens.targets[tokens.mask], [7, EOS])


def test_join_equals_padding_the_same_sequences():
    prompts = pad_prompts([[5, 6], [8]], length=3, pad_id=PAD)
    np.testing.assert_array_equal(prompts.tokens, [[PAD, 5, 6], [PAD, PAD, 8]])
    completions = Completions(
        jnp.array([[7, EOS], [EOS, PAD]]), jnp.array([[True, True], [True, False]]), jnp.zeros((2, 2))
    )
    joined = join(Prompts(*map(jnp.asarray, prompts)), completions, pad_id=PAD)
    padded = pad_sequences([([5, 6], [7, EOS]), ([8], [EOS])], length=5, pad_id=PAD)
    for row in range(2):
        np.testing.assert_array_equal(
            np.asarray(joined.targets[row])[np.asarray(joined.mask[row])],
            padded.targets[row][padded.mask[row]],
        )
        real, same = np.asarray(joined.segment_ids[row]) > 0, padded.segment_ids[row] > 0
        np.testing.assert_array_equal(joined.inputs[row][real], padded.inputs[row][same])
        np.testing.assert_array_equal(joined.positions[row][real], padded.positions[row][same])


def test_the_last_response_token_is_an_input_even_in_a_full_row():
    tokens = pad_sequences([([5], [7, EOS])], length=3, pad_id=PAD)
    assert tokens.inputs[0, np.flatnonzero(tokens.mask[0])[-1] + 1] == EOS


def test_too_long_is_an_error_that_names_the_row():
    with pytest.raises(ValueError, match="sequence 1 has 4 tokens"):
        pad_sequences([([5], [7]), ([5, 5], [7, EOS])], length=3, pad_id=PAD)
    with pytest.raises(ValueError, match="prompt 0 has 2 tokens"):
        pad_prompts([[5, 6]], length=1, pad_id=PAD)


def test_take_reaches_into_nested_batches():
    tokens = pad_sequences([([5, 6], [7, EOS]), ([8], [EOS])], length=5, pad_id=PAD)
    np.testing.assert_array_equal(take((tokens, tokens.mask), [1])[0].inputs, tokens.inputs[[1]])


def test_pack_by_hand():
    tokens = pack_sequences([([5, 6], [7, EOS]), ([8, 9, 9], [EOS]), ([8], [EOS])], length=6, pad_id=PAD)
    np.testing.assert_array_equal(tokens.inputs, [[5, 6, 7, EOS, 8, EOS], [8, 9, 9, EOS, PAD, PAD]])
    np.testing.assert_array_equal(tokens.mask, [[0, 1, 1, 0, 1, 0], [0, 0, 1, 0, 0, 0]])
    np.testing.assert_array_equal(tokens.positions, [[0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 0, 0]])
    np.testing.assert_array_equal(tokens.segment_ids, [[1, 1, 1, 1, 2, 2], [1, 1, 1, 1, 0, 0]])


def test_packed_loss_and_gradient_are_those_of_the_separate_sequences():
    rng = np.random.default_rng(0)
    pairs = [
        (
            rng.integers(3, 20, rng.integers(1, 6)).tolist(),
            [*rng.integers(3, 20, rng.integers(0, 6)).tolist(), EOS],
        )
        for _ in range(12)
    ]
    config = ModelConfig(
        vocab_size=20, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=32, rope_theta=1e4,
        norm_eps=1e-5, tie_embeddings=True, max_length=32,
    )  # fmt: skip
    model = Transformer(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]

    @jax.jit
    def loss_and_grad(tokens):
        return jax.value_and_grad(lambda p: sft_objective(model, p, tokens)[0])(params)

    packed, separate = (f(pairs, length=24, pad_id=PAD) for f in (pack_sequences, pad_sequences))
    assert len(packed.mask) < len(separate.mask) / 2 and packed.mask.sum() == separate.mask.sum()
    (loss, grad), (expected, expected_grad) = loss_and_grad(packed), loss_and_grad(separate)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    chex.assert_trees_all_close(grad, expected_grad, rtol=1e-4, atol=1e-6)
    leaky = packed._replace(segment_ids=np.minimum(packed.segment_ids, 1))
    assert abs(loss_and_grad(leaky)[0] - expected) > 1e-3


def test_prompts_are_padded_when_they_are_asked_for():
    """Nothing is read of the others, and what comes is what `pad_prompts` makes."""
    read = []

    def prompt(number):
        read.append(number)
        return list(range(number + 1))

    found = padded_when_asked(Lazy(6, prompt), length=8, pad_id=9)
    assert found.tokens.shape == found.mask.shape == (6, 8) and len(found.row) == 6
    read.clear()  # the checks of annotations look at some
    rows = np.array([4, 1, 1])
    some = take(found, rows)
    assert set(read) == {1, 4}
    whole = pad_prompts([list(range(n + 1)) for n in range(6)], length=8, pad_id=9)
    for asked in (rows, slice(2, 5), slice(None), rows.reshape(1, 3)):
        for ours, expected in zip(take(found, asked), take(whole, asked), strict=True):
            assert ours.dtype == expected.dtype
            np.testing.assert_array_equal(ours, expected)
    np.testing.assert_array_equal(np.asarray(found.tokens), whole.tokens)
    assert narrowed(some).tokens.shape == (3, 8)
    with pytest.raises(ValueError, match="prompt 0 has 6 tokens, more than the batch's length of 5"):
        take(padded_when_asked(Lazy(6, prompt), length=5, pad_id=9), [5])
