"""Rankings to batches: what is packed is worth what the answers are worth one to a row, and so are its gradients."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data.encode import EncodedRanking, EncodedUnpaired
from rlhf_jax.data.preferences import (
    pack_rankings,
    packed_logprobs,
    packed_rewards,
    pad_preferences,
    pad_rankings,
    pad_unpaired,
)
from rlhf_jax.logprobs import sequence_logprobs
from rlhf_jax.losses import dpo_loss, ranking_loss
from rlhf_jax.models import ModelConfig, ScalarModel, Transformer
from rlhf_jax.scoring import response_rewards, token_scores, token_values

PAD, EOS, LENGTH = 0, 2, 24
CONFIG = ModelConfig(
    vocab_size=20, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=8, d_ff=32, rope_theta=1e4,
    norm_eps=1e-5, tie_embeddings=True, max_length=32,
)  # fmt: skip


def rankings(counts, seed=0):
    rng = np.random.default_rng(seed)

    def ids(low, high):
        return rng.integers(3, 20, rng.integers(low, high)).tolist()

    return [
        EncodedRanking(ids(1, 6), [[*ids(0, 6), EOS] for _ in range(k)], tuple(rng.permutation(k).tolist()), 0.5)
        for k in counts
    ]


def params_of(model):
    return model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]


def on_device(batch):
    return jax.tree.map(jnp.asarray, batch)


def leaky(batch):
    """The same without walls between the documents."""
    return batch._replace(tokens=batch.tokens._replace(segment_ids=jnp.minimum(batch.tokens.segment_ids, 1)))


def test_packed_by_hand():
    one = EncodedRanking([5, 6], [[7, EOS], [EOS]], (1, 0), 0.0)
    two = EncodedRanking([8], [[9, EOS]], (0,), 0.0)
    batch = pack_rankings([one, two], length=7, pad_id=PAD)
    np.testing.assert_array_equal(batch.tokens.inputs, [[5, 6, 7, EOS, 5, 6, EOS], [8, 9, EOS, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.tokens.positions, [[0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.tokens.segment_ids, [[1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.owner, [[4, 0, 0, 4, 4, 1, 4], [2, 2, 4, 4, 4, 4, 4]])
    np.testing.assert_array_equal(batch.row, [[0, 0], [1, 0]])
    np.testing.assert_array_equal(batch.column, [[3, 6], [2, 0]])
    np.testing.assert_array_equal(batch.ranks, [[1, 0], [0, 0]])
    np.testing.assert_array_equal(batch.mask, [[True, True], [True, False]])
    with pytest.raises(ValueError, match="more than the row's length of 3"):
        pack_rankings([one], length=3, pad_id=PAD)


def test_the_reward_models_packed_loss_and_gradient_are_those_of_answers_apart():
    some = rankings([2, 4, 3, 2, 4, 2])
    padded, packed = (on_device(f(some, length=LENGTH, pad_id=PAD)) for f in (pad_rankings, pack_rankings))
    assert len(packed.tokens.mask) < len(padded.responses.mask) / 2
    model = ScalarModel(CONFIG)
    params = params_of(model)

    @jax.jit
    def apart(params):
        rewards = response_rewards(model, params, padded.responses).reshape(padded.ranks.shape)
        return ranking_loss(rewards, padded.ranks, padded.mask)[0]

    def together(params, batch):
        return ranking_loss(packed_rewards(token_values(model, params, batch.tokens), batch), batch.ranks, batch.mask)[
            0
        ]

    loss, grad = jax.jit(jax.value_and_grad(together))(params, packed)
    expected, expected_grad = jax.value_and_grad(apart)(params)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    chex.assert_trees_all_close(grad, expected_grad, rtol=1e-4, atol=1e-6)
    assert abs(together(params, leaky(packed)) - expected) > 1e-4
    # Prompts that only fill the batch change nothing.
    filled = on_device(pack_rankings(some, length=LENGTH, pad_id=PAD, prompts=9, answers=5))
    assert filled.ranks.shape == (9, 5)
    np.testing.assert_allclose(together(params, filled), expected, rtol=1e-5)


def test_dpos_packed_loss_and_gradient_are_those_of_pairs_apart():
    some = rankings([2] * 8, seed=1)
    padded, packed = (on_device(f(some, length=LENGTH, pad_id=PAD)) for f in (pad_preferences, pack_rankings))
    model = Transformer(CONFIG)
    params = params_of(model)
    reference = jax.tree.map(lambda x: x * 1.1, params)

    def apart(params, tokens):
        return sequence_logprobs(token_scores(model, params, tokens)[0], tokens.mask)

    def together(params, batch):
        both = packed_logprobs(token_scores(model, params, batch.tokens)[0], batch)
        return (jnp.take_along_axis(both, jnp.argsort(batch.ranks, axis=1), axis=1)).T

    def loss_apart(params):
        policy = [apart(params, side) for side in (padded.chosen, padded.rejected)]
        ref = [apart(reference, side) for side in (padded.chosen, padded.rejected)]
        return dpo_loss(*policy, *ref, beta=0.3)[0]

    def loss_together(params, batch):
        return dpo_loss(*together(params, batch), *together(reference, batch), beta=0.3)[0]

    loss, grad = jax.jit(jax.value_and_grad(loss_together))(params, packed)
    expected, expected_grad = jax.jit(jax.value_and_grad(loss_apart))(params)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    chex.assert_trees_all_close(grad, expected_grad, rtol=1e-4, atol=1e-6)
    assert abs(loss_together(params, leaky(packed)) - expected) > 1e-4


def test_no_document_of_a_row_reaches_another():
    packed = on_device(pack_rankings(rankings([3, 3]), length=64, pad_id=PAD))
    model = ScalarModel(CONFIG)
    params = params_of(model)
    values = token_values(model, params, packed.tokens)
    first = packed.tokens.segment_ids == 1
    others = jnp.where(first, packed.tokens.inputs, 7)
    changed = token_values(model, params, packed.tokens._replace(inputs=others))
    np.testing.assert_array_equal(np.asarray(values)[first], np.asarray(changed)[first])


def test_padding_of_rankings_pairs_and_unpaired_answers():
    some = rankings([2, 3])
    padded = pad_rankings(some, length=LENGTH, pad_id=PAD)
    assert padded.responses.mask.shape == (6, LENGTH) and padded.mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert not padded.responses.mask[2].any()
    with pytest.raises(ValueError, match="more than two answers"):
        pad_preferences(some, length=LENGTH, pad_id=PAD)
    pair = pad_preferences(some[:1], length=LENGTH, pad_id=PAD)
    best = some[0].responses[some[0].ranks.index(0)]
    assert pair.chosen.targets[pair.chosen.mask].tolist() == best and pair.margin.tolist() == [0.5]
    rows = [EncodedUnpaired([5] * 30, [6, EOS], True), EncodedUnpaired([5], [EOS], False)]
    unpaired = pad_unpaired(rows, longest=48, pad_id=PAD)
    assert unpaired.tokens.mask.shape == (2, 32) and unpaired.good.tolist() == [True, False]
    rows.append(EncodedUnpaired([5] * 40, [EOS], True))
    assert pad_unpaired(rows, longest=48, pad_id=PAD).tokens.mask.shape == (3, 48)


def test_ragged_batches_have_few_shapes():
    batches = [
        pack_rankings(rankings([2, 3, 4, 2, 3], seed=s), length=32, pad_id=PAD, prompts=5, answers=4)
        for s in range(40)
    ]
    shapes = {jax.tree.map(np.shape, tuple(batch)) for batch in batches}
    assert len(shapes) <= 2 < len({int(batch.tokens.segment_ids.astype(bool).sum()) for batch in batches})
    compiled = jax.jit(lambda batch: packed_logprobs(batch.tokens.mask.astype(jnp.float32), batch).sum())
    for batch in batches:
        compiled(on_device(batch))
    assert compiled._cache_size() == len(shapes)
