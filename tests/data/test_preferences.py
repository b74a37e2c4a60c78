"""Rankings to batches: what is packed is worth what the answers are worth one to a row, and so are its gradients."""

from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.batches import Completions, RankedAnswers
from rlhf_jax.data.preferences import (
    join_rankings,
    pack_answers,
    pack_rankings,
    packed_logprobs,
    packed_rewards,
    pad_rankings,
    stack_packed,
)
from rlhf_jax.data.tokens import join, pad_prompts, pad_sequences
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
        RankedAnswers(ids(1, 6), [[*ids(0, 6), EOS] for _ in range(k)], tuple(rng.permutation(k).tolist()), 0.5)
        for k in counts
    ]


@cache
def params_of(model):
    return jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]


def on_device(batch):
    return jax.tree.map(jnp.asarray, batch)


def leaky(batch):
    """The same without walls between the documents."""
    return batch._replace(tokens=batch.tokens._replace(segment_ids=jnp.minimum(batch.tokens.segment_ids, 1)))


joined = partial(join_rankings, prompt_length=4, answer_length=4, pad_id=PAD)


def test_packed_by_hand():
    one = RankedAnswers([5, 6], [[7, EOS], [EOS]], (1, 0), 0.0, 0.25)
    two = RankedAnswers([8], [[9, EOS]], (0,), 0.0)
    batch = pack_rankings([one, two], length=7, pad_id=PAD)
    np.testing.assert_array_equal(batch.tokens.inputs, [[5, 6, 7, EOS, 5, 6, EOS], [8, 9, EOS, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.tokens.positions, [[0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.tokens.segment_ids, [[1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.owner, [[4, 0, 0, 4, 4, 1, 4], [2, 2, 4, 4, 4, 4, 4]])
    np.testing.assert_array_equal(batch.row, [[0, 0], [1, 0]])
    np.testing.assert_array_equal(batch.column, [[3, 6], [2, 0]])
    np.testing.assert_array_equal(batch.ranks, [[1, 0], [0, 0]])
    np.testing.assert_array_equal(batch.mask, [[True, True], [True, False]])
    filled = pack_rankings([one, two], length=7, pad_id=PAD, prompts=3)
    for some in (filled, pad_rankings([one, two], length=7, pad_id=PAD), joined([one, two])):
        assert some.doubt.dtype == np.float32 and some.doubt[:2].tolist() == [0.25, 0.0]
    assert filled.doubt.tolist() == [0.25, 0.0, 0.0]
    with pytest.raises(ValueError, match="more than the row's length of 3"):
        pack_rankings([one], length=3, pad_id=PAD)
    for wrong in ({"prompts": 1}, {"answers": 1}):
        with pytest.raises(ValueError, match="2 prompts with up to 2 answers do not fit into"):
            pack_rankings([one, two], length=7, pad_id=PAD, **wrong)


def test_answers_are_packed_without_a_ranking():
    """The very arrays of rankings of one answer each; a number without an answer has no row, and is masked."""
    some = rankings([1] * 5)
    answers = [(ranking.prompt, ranking.responses[0]) for ranking in some]
    packed, ranked = pack_answers(answers, length=LENGTH, pad_id=PAD), pack_rankings(some, length=LENGTH, pad_id=PAD)
    chex.assert_trees_all_equal((packed.tokens, packed.owner), (ranked.tokens, ranked.owner))
    for field in ("row", "column", "mask"):
        np.testing.assert_array_equal(getattr(packed, field), getattr(ranked, field)[:, 0])
    filled = on_device(pack_answers([None, *answers], length=LENGTH, pad_id=PAD, slots=8))
    assert filled.mask.tolist() == [False, *[True] * 5, False, False]
    np.testing.assert_array_equal(filled.row[1:6], packed.row)
    numbers = jnp.arange(filled.owner.size, dtype=jnp.float32).reshape(filled.owner.shape)
    for found, expected in (
        (packed_logprobs(numbers, filled), packed_logprobs(numbers, on_device(packed))),
        (packed_rewards(numbers + 1, filled), packed_rewards(numbers + 1, on_device(packed))),
    ):
        np.testing.assert_array_equal(found, [0, *expected, 0, 0])
    # Of unequal numbers of rows, stacked: nobody's targets stay nobody's.
    short, long = pack_answers(answers, length=96, pad_id=PAD), packed
    assert len(short.owner) < len(long.owner)
    short = pack_answers(answers[:1], length=LENGTH, pad_id=PAD, slots=5)
    stacked = stack_packed([short, long])
    assert stacked.owner.shape == (2, *long.owner.shape) and stacked.row.shape == (2, 5)
    assert (stacked.owner[~stacked.tokens.mask] == 5).all()
    with pytest.raises(ValueError, match="5 answers are more than 4"):
        pack_answers(answers, length=LENGTH, pad_id=PAD, slots=4)


def test_joined_rankings_are_the_sampled_arrays():
    """Ids taken out of prompts and completions make the same batch again, bit for bit, missing answers too."""
    some = rankings([2, 3, 1], seed=3)
    found = join_rankings(some, prompt_length=7, answer_length=9, pad_id=PAD)
    answers = [[*((r.prompt, a) for a in r.responses), *[([], [])] * (3 - len(r.responses))] for r in some]
    flat = [answer for each in answers for answer in each]
    tokens = np.array([[*response, *[PAD] * (9 - len(response))] for _, response in flat])
    mask = np.array([[t < len(response) for t in range(9)] for _, response in flat])
    prompts = pad_prompts([prompt for prompt, _ in flat], length=7, pad_id=PAD)
    expected = jax.tree.map(np.asarray, join(prompts, Completions(tokens, mask, None), pad_id=PAD))
    chex.assert_trees_all_equal(found.responses, expected)
    assert jax.tree.map(lambda x: x.dtype, found.responses) == jax.tree.map(lambda x: x.dtype, expected)
    assert found.mask.tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]
    assert [row[real].tolist() for row, real in zip(found.ranks, found.mask, strict=True)] == [
        list(ranking.ranks) for ranking in some
    ]
    for lengths, message in (((3, 9), "prompt . has"), ((7, 3), "answer . has . tokens, more than the batch's 3")):
        with pytest.raises(ValueError, match=message):
            join_rankings(some, prompt_length=lengths[0], answer_length=lengths[1], pad_id=PAD)


def test_the_reward_models_packed_loss_and_gradient_are_those_of_answers_apart():
    some = rankings([2, 4, 3, 2, 4, 2])
    padded, packed = (on_device(f(some, length=LENGTH, pad_id=PAD)) for f in (pad_rankings, pack_rankings))
    assert len(packed.tokens.mask) < len(padded.responses.mask) / 2
    model = ScalarModel(CONFIG)
    params = params_of(model)

    def apart(params):
        rewards = response_rewards(model, params, padded.responses).reshape(padded.ranks.shape)
        return ranking_loss(rewards, padded.ranks, padded.mask)[0]

    @jax.jit
    def together(params, batch):
        return ranking_loss(packed_rewards(token_values(model, params, batch.tokens), batch), batch.ranks, batch.mask)[
            0
        ]

    loss, grad = jax.jit(jax.value_and_grad(together))(params, packed)
    expected, expected_grad = jax.jit(jax.value_and_grad(apart))(params)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    chex.assert_trees_all_close(grad, expected_grad, rtol=1e-4, atol=1e-6)
    assert abs(together(params, leaky(packed)) - expected) > 1e-4
    # Prompts that only fill the batch change nothing.
    filled = on_device(pack_rankings(some, length=LENGTH, pad_id=PAD, prompts=9, answers=5))
    assert filled.ranks.shape == (9, 5)
    np.testing.assert_allclose(together(params, filled), expected, rtol=1e-5)


def test_dpos_packed_loss_and_gradient_are_those_of_pairs_apart():
    some = rankings([2] * 8, seed=1)
    packed = on_device(pack_rankings(some, length=LENGTH, pad_id=PAD))
    documents = [[(pair.prompt, pair.responses[pair.ranks.index(rank)]) for pair in some] for rank in (0, 1)]
    padded = [on_device(pad_sequences(side, length=LENGTH, pad_id=PAD)) for side in documents]
    model = Transformer(CONFIG)
    params = params_of(model)
    reference = jax.tree.map(lambda x: x * 1.1, params)

    def apart(params, tokens):
        return sequence_logprobs(token_scores(model, params, tokens)[0], tokens.mask)

    def together(params, batch):
        both = packed_logprobs(token_scores(model, params, batch.tokens)[0], batch)
        return (jnp.take_along_axis(both, jnp.argsort(batch.ranks, axis=1), axis=1)).T

    def loss_apart(params):
        policy = [apart(params, side) for side in padded]
        ref = [apart(reference, side) for side in padded]
        return dpo_loss(*policy, *ref, beta=0.3)[0]

    @jax.jit
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
    values_of = jax.jit(partial(token_values, model))
    values = values_of(params, packed.tokens)
    first = packed.tokens.segment_ids == 1
    others = jnp.where(first, packed.tokens.inputs, 7)
    changed = values_of(params, packed.tokens._replace(inputs=others))
    np.testing.assert_array_equal(np.asarray(values)[first], np.asarray(changed)[first])


def test_padded_rankings_of_unequal_length():
    padded = pad_rankings(rankings([2, 3]), length=LENGTH, pad_id=PAD)
    assert padded.responses.mask.shape == (6, LENGTH) and padded.mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert not padded.responses.mask[2].any()


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
